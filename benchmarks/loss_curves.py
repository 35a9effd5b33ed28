"""Losses of the same run on real text by different implementations: plain torch, the kernels, products in 8 bits.

The text is Python's standard library, as in the demo. Every arm trains the same model on the same rows with the same windows, from
several seeds of the initial weights: how far the seeds of one arm lie apart says how far two sound runs may. One JSON line a run and,
last, of every arm the mean loss of its last 50 steps, in nats: of each seed, over the seeds with their standard deviation, and each
seed's difference to the reference of the same seed. Runs take turns on the GPUs that are visible; nothing is timed.
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
from typing import Any

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
optimizer: {learning_rate: 1.0e-3, warmup: 50}
train: {micro_batch_size: 8, global_batch_size: 16, precision: bf16}
validation: {interval: 0}
checkpoint: {interval: 0}
monitor: {log_interval: 50}
"""
LAST = 50  # steps whose mean loss is compared


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.loss_curves",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="example:\n  python -m benchmarks.loss_curves --seeds 4 --out benchmarks/results/loss_curves.jsonl",
    )
    parser.add_argument("--steps", type=int, default=200, help="updates of every arm (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=3, help="seeds of every arm (default: %(default)s)")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS), help="default: all")
    parser.add_argument("--out", type=Path, help="append the lines to this file as well")
    options = parser.parse_args()
    about = {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
        "torch": torch.__version__,
        "date": time.strftime("%F"),
        "command": "python -m benchmarks.loss_curves " + " ".join(sys.argv[1:]),
    }
    curves: dict[tuple[str, int], list[float]] = {}

    def tell(line: dict[str, Any], most: int | None = None) -> None:
        print(json.dumps(line)[:most], flush=True)
        if options.out is not None:
            with options.out.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")

    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        prepare_data(work / "data", 8192)
        (work / "config.yaml").write_text(CONFIG.replace("DATA", str(work / "data")), encoding="utf-8")
        cases = [(arm, seed) for arm in options.arms for seed in range(1, 1 + options.seeds)]
        jobs = {case: start(work, *case, options.steps, place) for place, case in enumerate(cases)}  # side by side
        try:
            for (arm, seed), job in jobs.items():
                curves[arm, seed] = losses(work, arm, seed, job)
                tell({"case": "losses on real text", "arm": arm, "seed": seed, "losses": curves[arm, seed]}, most=200)
        finally:
            for job in jobs.values():  # those that still run, where one failed
                job.kill()
                job.wait()
    tell({"case": f"mean losses of the last {LAST} steps, nats", **compare(curves), **about})
    return 0


def start(work: Path, arm: str, seed: int, steps: int, place: int) -> subprocess.Popen:
    """One run in a process of its own, on one of the visible GPUs."""
    overrides = [*ARMS[arm], f"train.model_seed={seed}", f"train.steps={steps}", f"run_dir={work}/{arm}-{seed}"]
    command = [sys.executable, "-m", "swax_megatron.train", str(work / "config.yaml"), *overrides]
    environment = {**os.environ, "OMP_NUM_THREADS": "2"}
    if torch.cuda.is_available():
        visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(torch.cuda.device_count())))
        environment["CUDA_VISIBLE_DEVICES"] = visible.split(",")[place % torch.cuda.device_count()]
    with (work / f"{arm}-{seed}.log").open("w", encoding="utf-8") as log:
        return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)


def losses(work: Path, arm: str, seed: int, job: subprocess.Popen) -> list[float]:
    """Of every step. Raises RuntimeError with the end of its log where the arm failed."""
    if job.wait():
        raise RuntimeError(f"{arm}, seed {seed}: {(work / f'{arm}-{seed}.log').read_text(encoding='utf-8')[-2000:]}")
    lines = [json.loads(line) for line in (work / f"{arm}-{seed}" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [round(line["loss/train"], 5) for line in lines if "loss/train" in line]


def compare(curves: dict[tuple[str, int], list[float]]) -> dict[str, dict[str, Any]]:
    """Of every arm: the mean loss of the last steps, and how it differs from the reference's of the same seed."""
    ends = {case: float(np.mean(curve[-LAST:])) for case, curve in curves.items()}
    found: dict[str, dict[str, Any]] = {}
    for arm in dict.fromkeys(arm for arm, _ in curves):
        of = {seed: end for (name, seed), end in ends.items() if name == arm}
        apart = [end - ends["reference", seed] for seed, end in of.items() if ("reference", seed) in ends and arm != "reference"]
        spread = float(np.std(list(of.values()), ddof=1)) if len(of) > 1 else None
        found[arm] = {"mean": float(np.mean(list(of.values()))), "standard deviation": spread, "by seed": of, "minus reference": apart}
    return found


if __name__ == "__main__":
    sys.exit(main())
