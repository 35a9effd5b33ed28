"""Time whole training steps of a configuration, and of other models of the same size, on one GPU.

Ours is the trainer itself: its data path, bf16 with fp32 masters, loss, clipping and AdamW, at every window of the configuration and every
number of micro-batches an update. The peers (``benchmarks/step_peers.py``) train on random ids that lie on the GPU already, with fp32
masters and the same AdamW. Each side runs in a process of its own, one after another. One JSON line a case: medians, tokens a second,
model FLOPs utilisation, peak memory and, with --profile, seconds of GPU kernels by part of the model.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from benchmarks.step_parts import idle, marked, measure
from swax_megatron.config import load_config
from swax_megatron.hardware import known_peak
from swax_megatron.parallel import device
from swax_megatron.train import quiet_libraries
from swax_megatron.validate import validate

PEERS = ("llama", "llama-layers-causal", "llama-compiled", "llama-compiled-causal", "megatron-gpt", "xlstm")
EPILOG = """example (the 1.4B model, one row of 16,384 tokens a micro-batch, and every peer, on one H100):
  python -m benchmarks.train_step configs/swax_1p4b.yaml parallel.tensor=1 --shapes 1x16384 4x4096 --accumulate 1 8 --profile --peers all
"""


def random_documents(folder: Path, vocabulary: int, tokens: int) -> None:
    """A data set of random ids in documents of 4,000 tokens on average."""
    from swax_megatron.data.writer import DatasetWriter

    random = np.random.default_rng(0)
    folder.mkdir(parents=True)
    model = folder.with_suffix(".json")
    model.write_text("{}", encoding="utf-8")
    writer, written = DatasetWriter(folder, vocabulary), 0
    while written < tokens:
        lengths = np.clip(random.lognormal(7.8, 1.0, 256).astype(np.int64), 2, 60_000)
        ids = random.integers(3, vocabulary, lengths.sum())
        ids[np.cumsum(lengths) - 1] = 2
        writer.add(ids, lengths)
        written += len(ids)
    writer.finish(model, {"unk_id": 0, "bos_id": 1, "eos_id": 2}, source="random ids")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", help="YAML file")
    parser.add_argument("overrides", nargs="*", help="section.field=value; the layout must be that of one process")
    parser.add_argument("--shapes", nargs="+", default=["1x16384"], help="rows x tokens of a micro-batch (default: 1x16384)")
    parser.add_argument("--accumulate", nargs="+", type=int, default=[1, 8], help="micro-batches an update (default: 1 8)")
    parser.add_argument("--recompute", nargs="+", choices=("none", "selective"), help="of our side (default: train.recompute)")
    parser.add_argument("--fp8", action="store_true", help="every case of ours again with the projections in 8 bits")
    parser.add_argument("--quick-start", action="store_true", help="all our weights drawn on the device at once, not by their names")
    parser.add_argument("--steps", type=int, default=10, help="timed updates of each case (default: %(default)s)")
    parser.add_argument("--data", type=Path, help="shards written by data_prep/shard.py (default: random documents)")
    profile = "also where the GPU's time goes, from one more update of each case with the first --accumulate"
    parser.add_argument("--profile", action="store_true", help=profile)
    parser.add_argument("--peers", nargs="*", default=[], help=f"'all' or some of {', '.join(PEERS)}")
    parser.add_argument("--peers-only", action="store_true", help="leave our side out")
    parser.add_argument("--out", type=Path, help="append the lines to this file as well")
    parser.add_argument("--side", help=argparse.SUPPRESS)  # one side in this process
    options = parser.parse_intermixed_args()
    try:
        check(options)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if options.side is not None:
        one_side(options)
        return 0
    sides = [*([] if options.peers_only else ["ours"]), *(PEERS if options.peers == ["all"] else options.peers)]
    failed = 0
    with tempfile.TemporaryDirectory() as work:
        if options.data is None:
            random_documents(Path(work) / "data", load_config(options.config, options.overrides).model.vocab_size, 4_000_000)
        for side in sides:
            arguments = ["--data", f"{work}/data"] if options.data is None else []
            command = [sys.executable, "-m", "benchmarks.train_step", *sys.argv[1:], *arguments, "--side", side]
            environment = {**os.environ, "SWAX_BENCHMARK_WORK": work}
            with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
                for line in process.stdout:
                    tell(line.rstrip(), options.out)
            if process.returncode:
                failed += 1
                tell(json.dumps({"case": "training step", "side": side, "failed": f"exit code {process.returncode}"}), options.out)
    return 1 if failed else 0


def tell(line: str, out: Path | None) -> None:
    print(line, flush=True)
    if out is not None and line.startswith("{"):
        with out.open("a", encoding="utf-8") as file:
            file.write(line + "\n")


def check(options: argparse.Namespace) -> None:
    """Raises ValueError where an argument is wrong."""
    for shape in options.shapes:
        if [part.isdigit() and int(part) > 0 for part in shape.split("x")] != [True, True]:
            raise ValueError(f"--shapes {shape}: give rows x tokens, e.g. 1x16384")
    unknown = sorted(set(options.peers) - {*PEERS, "all"})
    if unknown:
        raise ValueError(f"--peers {' '.join(unknown)}: choose from all, {', '.join(PEERS)}")
    for name in ("steps", "accumulate"):
        if min(np.atleast_1d(getattr(options, name))) < 1:
            raise ValueError(f"--{name}: must be at least 1")
    if options.data is not None and not (options.data / "manifest.json").exists():
        raise ValueError(f"--data {options.data}: holds no manifest.json; give a folder that data_prep/shard.py wrote")
    for shape in options.shapes:
        validate(settings(options, shape, 1), 1)


def settings(options: argparse.Namespace, shape: str, accumulate: int) -> Any:
    """The configuration of one case."""
    rows, length = map(int, shape.split("x"))
    data = [f"data.train=[{{path: {options.data}}}]"] if options.data is not None else []
    return load_config(
        options.config,
        [
            *options.overrides,
            *data,
            f"run_dir={os.environ.get('SWAX_BENCHMARK_WORK', '.')}/run",
            f"data.sequence_length={length}",
            f"train.micro_batch_size={rows}",
            f"train.global_batch_size={rows * accumulate}",
            "validation.interval=0",
            "checkpoint.interval=0",
        ],
    )


def one_side(options: argparse.Namespace) -> None:
    """Every case of one side, a line each."""
    cuda = torch.cuda.is_available()
    for case in ours(options) if options.side == "ours" else peer(options):
        line = {
            "case": f"training step of {Path(options.config).stem}",
            "side": options.side,
            **case,
            "device": torch.cuda.get_device_name() if cuda else "CPU",
            "torch": torch.__version__,
            "date": time.strftime("%F"),
            "command": "python -m benchmarks.train_step " + " ".join(sys.argv[1 : sys.argv.index("--side")]),
        }
        print(json.dumps(line), flush=True)


def peer(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    from benchmarks.step_peers import cases

    for shape in options.shapes:
        for case in cases(options.side, settings(options, shape, 1), options.accumulate, options.steps):
            yield {"shape": shape, **case}


def ours(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Our trainer at every shape, window and number of micro-batches. The model is built once: it does not depend on them."""
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}.items():
        os.environ.setdefault(name, value)
    quiet_libraries()
    device.install_cpu_shim()
    from swax_megatron.kernels.fp8 import Weights
    from swax_megatron.model import parameters
    from swax_megatron.model.linear import ColumnLinear, RowLinear
    from swax_megatron.model.swax import build_model
    from swax_megatron.model.window import WindowSchedule
    from swax_megatron.optim.build import build_optimizer
    from swax_megatron.parallel import groups
    from swax_megatron.sources import build_mixture
    from swax_megatron.trainer import Trainer, spare_collector

    config = settings(options, options.shapes[0], 1)
    joined = groups.initialize(config)
    if options.quick_start:
        parameters.fill = lambda block, *_: block.normal_(0.0, config.model.init_std)
    cuda = joined.device.type == "cuda"
    began = time.perf_counter()
    backend = build_optimizer(config, build_model(config, joined), joined)
    build_seconds = time.perf_counter() - began
    spare_collector()
    products = [False, True] if options.fp8 else [config.train.fp8]
    cases = itertools.product(options.accumulate, options.shapes, options.recompute or [config.train.recompute], products)
    for accumulate, shape, recompute, small in cases:
        config = settings(options, shape, accumulate)
        for chunk in backend.chunks:
            chunk.config.recompute_granularity = None if recompute == "none" else recompute
            for module in chunk.modules():
                if isinstance(module, (ColumnLinear, RowLinear)):
                    module.small = Weights() if small else None
        trainer = Trainer(config, joined, backend, build_mixture(config, config.data.train, "train", config.train.data_seed))
        for window in sorted(set(config.window.windows)):
            fixed = dataclasses.replace(config.window, schedule="fixed", windows=[window], anneal_fraction=0.0, anneal_window=window)
            trainer.windows = WindowSchedule.from_config(dataclasses.replace(config, window=fixed))
            measured = one_case(trainer, options, cuda, options.profile and accumulate == options.accumulate[0])
            named = {"shape": shape, "window": window, "micro-batches": accumulate, "recompute": recompute, "fp8": small}
            yield named | measured | {"build_seconds": round(build_seconds, 1)}
        trainer.feed.close()
    groups.shut_down()


def one_case(trainer: Any, options: argparse.Namespace, cuda: bool, profiled: bool) -> dict[str, Any]:
    """Figures of a trainer's steps as it stands."""
    from swax_megatron.model.cost import training_flops

    config = trainer.config
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    first = trainer.train_step()  # compiles, allocates
    steps = [trainer.train_step() for _ in range(options.steps)]
    seconds = median(step.seconds for step in steps)
    rate = steps[0].tokens / seconds
    flops = training_flops(config.model, config.data.sequence_length, steps[0].windows) * rate
    peak = known_peak(torch.cuda.get_device_name()) if cuda else None
    case = {
        "seconds": round(seconds, 4),
        "slowest": round(max(step.seconds for step in steps), 4),
        "first": round(first.seconds, 2),
        "tokens_per_second": round(rate),
        "model_tflops": round(flops / 1e12, 1),
        "mfu": round(flops / 1e12 / peak, 4) if peak else None,
        "data_wait": round(median(step.metrics["time/data_wait_fraction"] for step in steps), 5),
        "loss": round(steps[-1].metrics["loss/train"], 4),
    }
    if cuda:
        case["peak_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
        gaps, pauses = idle(trainer.train_step, times=3 if config.train.global_batch_size == config.train.micro_batch_size else 1)
        case |= {"launch_gaps": round(gaps, 4), "pauses_ms": pauses}
    if profiled:
        calls = {(trainer.backend, "update"): "update", (trainer.backend, "reduce"): "gradient norm", (trainer.feed, "take"): "data"}
        with marked(modules(trainer.backend.chunks), calls):
            case["profile"] = measure(trainer.train_step, cuda)
    return case


def modules(chunks: list[torch.nn.Module]) -> dict[torch.nn.Module, str]:
    """The parts of our model."""
    from megatron.core.models.common.embeddings.language_model_embedding import LanguageModelEmbedding

    from swax_megatron.model.feedforward import SwiGLU
    from swax_megatron.model.head import Head
    from swax_megatron.model.layers.specs import MIXERS
    from swax_megatron.model.norm import RMSNorm

    names = {SwiGLU: "SwiGLU", Head: "head and loss", RMSNorm: "RMSNorm", LanguageModelEmbedding: "embedding"}
    names |= {mixer: f"{kind} mixer" for kind, mixer in MIXERS.items()}
    return {module: names[type(module)] for chunk in chunks for module in chunk.modules() if type(module) in names}


if __name__ == "__main__":
    sys.exit(main())
