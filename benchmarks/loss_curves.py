"""Losses of the same run on real text by different implementations: plain torch, the kernels, products in 8 bits.

The text is Python's standard library, as in the demo. Every arm trains the same model on the same rows with the same windows; ``reference``
runs with further seeds of the initial weights as well, which say how far two sound runs lie apart. One JSON line an arm and, last, the
differences: of smoothed losses, in nats, between each arm and the reference of its seed, beside those between the reference's seeds.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from scripts.demo import prepare_data

ARMS = {
    "reference": ["kernels.backend=reference"],
    "kernels": ["kernels.backend=auto"],
    "fp8": ["kernels.backend=auto", "train.fp8=true"],
}
CONFIG = """
model: {pattern: (MS)x4, hidden_size: 512, ffn_hidden_size: 1408, vocab_size: 8192, attention_heads: 8, attention_kv_heads: 4,
  attention_head_dim: 64, mlstm_heads: 4, mlstm_qk_dim: 64, mlstm_v_dim: 128}
window: {schedule: stochastic, windows: [64, 512], probabilities: [0.5, 0.5], anneal_fraction: 0.1}
data: {train: [{path: DATA/train}], validation: [{path: DATA/validation}], sequence_length: 1024}
optimizer: {learning_rate: 2.0e-3, warmup: 20}
train: {micro_batch_size: 8, global_batch_size: 16, precision: bf16}
validation: {interval: 0}
checkpoint: {interval: 0}
monitor: {log_interval: 50}
"""
SMOOTH = 20  # steps that a smoothed loss is the mean of


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.loss_curves",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="example:\n  python -m benchmarks.loss_curves --seeds 2 --out benchmarks/results/loss_curves.jsonl",
    )
    parser.add_argument("--steps", type=int, default=200, help="updates of every arm (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=3, help="seeds of the reference (default: %(default)s)")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS), help="default: all")
    parser.add_argument("--out", type=Path, help="append the lines to this file as well")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        prepare_data(work / "data", 8192)
        (work / "config.yaml").write_text(CONFIG.replace("DATA", str(work / "data")), encoding="utf-8")
        cases = [(arm, seed) for arm in options.arms for seed in range(1, 1 + (options.seeds if arm == "reference" else 1))]
        jobs = {case: start(work, *case, options.steps) for case in cases}  # side by side: nothing is timed
        curves = {case: losses(work, *case, job) for case, job in jobs.items()}
    about = {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
        "torch": torch.__version__,
        "date": time.strftime("%F"),
        "command": "python -m benchmarks.loss_curves " + " ".join(sys.argv[1:]),
    }
    lines = [{"case": "losses on real text", "arm": arm, "seed": seed, "losses": curve} for (arm, seed), curve in curves.items()]
    for line in [*lines, {"case": "differences of smoothed losses, nats", **compare(curves), **about}]:
        print(json.dumps(line)[:400], flush=True)
        if options.out is not None:
            with options.out.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
    return 0


def start(work: Path, arm: str, seed: int, steps: int) -> subprocess.Popen:
    """One arm in a process of its own."""
    overrides = [*ARMS[arm], f"train.model_seed={seed}", f"train.steps={steps}", f"run_dir={work}/{arm}-{seed}"]
    command = [sys.executable, "-m", "swax_megatron.train", str(work / "config.yaml"), *overrides]
    log = (work / f"{arm}-{seed}.log").open("w", encoding="utf-8")
    return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env={**os.environ, "OMP_NUM_THREADS": "2"})


def losses(work: Path, arm: str, seed: int, job: subprocess.Popen) -> list[float]:
    """Of every step. Raises RuntimeError with the end of its log where the arm failed."""
    if job.wait():
        raise RuntimeError(f"{arm}, seed {seed}: {(work / f'{arm}-{seed}.log').read_text(encoding='utf-8')[-2000:]}")
    lines = [json.loads(line) for line in (work / f"{arm}-{seed}" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [round(line["loss/train"], 5) for line in lines if "loss/train" in line]


def compare(curves: dict[tuple[str, int], list[float]]) -> dict[str, dict[str, float]]:
    """Mean and largest absolute difference of smoothed losses, and the difference of the last ones, of every pair that says something."""
    smooth = {case: np.convolve(curve, np.ones(SMOOTH) / SMOOTH, "valid") for case, curve in curves.items()}
    pairs = [(("reference", 1), case) for case in curves if case != ("reference", 1)] if ("reference", 1) in curves else []
    found = {}
    for base, case in pairs:
        apart = smooth[case] - smooth[base]
        name = f"{case[0]} seed {case[1]} - {base[0]} seed {base[1]}"
        found[name] = {"mean": float(np.abs(apart).mean()), "largest": float(np.abs(apart).max()), "last": float(apart[-1])}
    return {name: {key: round(value, 5) for key, value in entry.items()} for name, entry in found.items()}


if __name__ == "__main__":
    sys.exit(main())
