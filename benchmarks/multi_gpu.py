"""Time training steps of one configuration in many layouts over NCCL, one process a GPU, beside one GPU in the same run.

Every layout trains with the same number of rows a GPU (weak scaling); its efficiency is tokens a second and GPU over those of one GPU.
One pool of processes takes one layout after another. Timed is the trainer itself, with its data path, at each window of the
configuration. Weights are drawn on the GPU (a run draws them by name on the CPU), so losses of two lines do not compare. One JSON line
a case: medians, tokens a second, model FLOPs utilisation, what the plan says, and, at the first window, from a profile of one more step
the seconds of NCCL's kernels, how much of them ran beside others, and the seconds in which nothing ran.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.step_parts import union
from benchmarks.train_step import random_documents
from swax_megatron.config import from_dict, load_config, to_dict
from swax_megatron.hardware import known_peak
from tests import runs
from tests.workers import Workers, free_port

# overrides of a layout of all GPUs; {n}: their number; {many}: four times the rows of the others; micro-batches have one row
LAYOUTS: dict[str, list[str]] = {
    "DP ZeRO-1": [],
    "TP SP": ["parallel.tensor={n}"],
    "PP": ["parallel.pipeline={n}"],
    "CP": ["parallel.context={n}"],
    "PP, four times the rows": ["parallel.pipeline={n}", "train.global_batch_size={many}"],
    "TP": ["parallel.tensor={n}", "parallel.sequence=false"],
    "TP SP overlapped": ["parallel.tensor={n}", "parallel.overlap=true"],
    # what the host takes to launch a step
    "TP SP, rows of 512 tokens": ["parallel.tensor={n}", "data.sequence_length=512", "window.windows=[128,512]"],
    "TP SP, two rows": ["parallel.tensor={n}", "train.micro_batch_size=2"],
    "TP SP overlapped, two rows": ["parallel.tensor={n}", "parallel.overlap=true", "train.micro_batch_size=2"],
    "DP Megatron": ["optimizer.backend=megatron"],
    "DP ZeRO-2": ["optimizer.zero_stage=2"],
    "DP ZeRO-3": ["optimizer.zero_stage=3"],
    "DP ZeRO-1 overlapped": ["optimizer.overlap_gradients=true"],
    "DP Megatron overlapped": ["optimizer.backend=megatron", "optimizer.overlap_gradients=true", "optimizer.overlap_parameters=true"],
    "DP ZeRO-2 overlapped": ["optimizer.zero_stage=2", "optimizer.overlap_gradients=true"],
    "DP ZeRO-3 overlapped": ["optimizer.zero_stage=3", "optimizer.overlap_gradients=true"],
}
EPILOG = """example (the 1.4B model on all GPUs of this machine, four rows of 16,384 tokens a GPU):
  python -m benchmarks.multi_gpu configs/swax_1p4b.yaml --preflight --checkpoint /dev/shm --out benchmarks/results/multi_gpu.jsonl
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", help="YAML file")
    parser.add_argument("overrides", nargs="*", help="section.field=value; the layout's own are set here")
    parser.add_argument("--layouts", nargs="*", default=list(LAYOUTS), help=f"some of: {', '.join(LAYOUTS)} (default: all)")
    parser.add_argument("--processes", type=int, default=torch.cuda.device_count(), help="default: one a GPU")
    parser.add_argument("--rows", type=int, default=4, help="rows an update and GPU (default: %(default)s)")
    parser.add_argument("--warm-up", type=int, default=2, help="steps before the timed ones (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=5, help="timed steps of each case (default: %(default)s)")
    parser.add_argument("--windows", type=int, nargs="+", help="default: those of the configuration")
    parser.add_argument("--two-rows", action="store_true", help="also one GPU with micro-batches of two rows")
    parser.add_argument("--again", action="store_true", help="one GPU once more after the layouts")
    parser.add_argument("--preflight", action="store_true", help="also the bandwidth that launcher.preflight finds between two GPUs")
    parser.add_argument("--checkpoint", type=Path, metavar="FOLDER", help="also save at TP and load at DP, in a folder made here")
    parser.add_argument("--out", type=Path, help="append the lines to this file as well")
    options = parser.parse_intermixed_args()
    if unknown := sorted(set(options.layouts) - set(LAYOUTS)):
        print(f"error: --layouts {unknown[0]}: choose from {', '.join(LAYOUTS)}", file=sys.stderr)
        return 2
    if options.processes < 2:
        print(f"error: --processes {options.processes}: give 2 or more, and as many GPUs", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as work:
        return _measure(options, Path(work))


def _measure(options: argparse.Namespace, work: Path) -> int:
    command = " ".join(["python -m benchmarks.multi_gpu", *sys.argv[1:]])
    origin = {"gpus": options.processes, "link": link(), **versions(), "command": command}
    failed = 0

    def tell(line: dict[str, Any]) -> None:
        text = json.dumps({"case": f"several GPUs, {Path(options.config).stem}", **line, **origin})
        print(text, flush=True)
        if options.out is not None:
            with options.out.open("a", encoding="utf-8") as file:
                file.write(text + "\n")

    pools = {1: Workers(1), options.processes: Workers(options.processes)}  # they import while the data is written
    if options.preflight:
        tell({"what": "preflight", **preflight(work / "preflight")})
    vocabulary = load_config(options.config, options.overrides).model.vocab_size
    random_documents(work / "data", vocabulary, 4_000_000 if torch.cuda.is_available() else 100_000)
    baseline: dict[int, float] = {}

    def run(size: int, name: str, overrides: Iterable[str], function: Any, *arguments: Any) -> list[Any] | None:
        nonlocal failed
        if not pools[size].alive:
            pools[size] = Workers(size)
        try:
            raw = settings(options, work, size, [text.format(n=size, many=4 * options.rows * size) for text in overrides])
            return pools[size].run(function, raw, *arguments)
        except (AssertionError, ValueError) as error:
            failed += 1
            tell({"layout": name, "failed": str(error)[-1500:]})
            return None

    def timed(size: int, name: str, overrides: Iterable[str]) -> None:
        for each in (run(size, name, overrides, time_layout, options.windows, options.warm_up, options.steps) or [[]])[0]:
            rate = each["tokens_per_second"] / size
            baseline.setdefault(each["window"], rate)
            tell({"layout": name, "processes": size, **each, "efficiency": round(rate / baseline[each["window"]], 4)})

    if found := run(options.processes, "links", [], time_links):
        tell({"what": "collectives, GB/s a GPU", **found[0]})
    timed(1, "one GPU", [])
    if options.two_rows:
        timed(1, "one GPU, two rows", ["train.micro_batch_size=2"])
    for name in options.layouts:
        timed(options.processes, name, LAYOUTS[name])
    if options.checkpoint is not None:
        folder = Path(tempfile.mkdtemp(dir=options.checkpoint))
        for name, function in (("TP SP", save_checkpoint), ("TP SP", load_checkpoint), ("DP ZeRO-1", load_checkpoint)):
            if found := run(options.processes, name, LAYOUTS[name], function, str(folder)):
                tell({"what": function.__name__.replace("_", " "), "layout": name, "folder": str(options.checkpoint), **found[0]})
        shutil.rmtree(folder)
    if options.again:
        timed(1, "one GPU, again", [])
    for pool in pools.values():
        pool.close()
    return 1 if failed else 0


def settings(options: argparse.Namespace, work: Path, processes: int, overrides: list[str]) -> dict[str, Any]:
    """The configuration of one layout."""
    data = [f"data.train=[{{path: {work / 'data'}}}]", f"run_dir={work / 'run'}", "validation.interval=0", "checkpoint.interval=0"]
    first = ["parallel.tensor=1", "train.micro_batch_size=1", f"train.global_batch_size={options.rows * processes}"]
    return to_dict(load_config(options.config, [*first, *options.overrides, *data, *overrides]))


def versions() -> dict[str, str]:
    """Device, libraries, date."""
    found = {"device": "CPU"}
    if torch.cuda.is_available():
        found = {"device": torch.cuda.get_device_name(), "nccl": ".".join(map(str, torch.cuda.nccl.version()))}
    found |= {name: importlib.metadata.version(name) for name in ("torch", "megatron-core", "deepspeed")}
    return {**found, "date": time.strftime("%F")}


def link() -> str:
    """How the driver names the link between the first two GPUs."""
    try:
        lines = subprocess.run(["nvidia-smi", "topo", "-m"], capture_output=True, text=True, timeout=20, check=True).stdout.splitlines()
        return next(line.split()[2] for line in lines if line.startswith("GPU0"))
    except (OSError, subprocess.SubprocessError, StopIteration, IndexError):
        return "unknown"


def preflight(folder: Path) -> dict[str, Any]:
    """The reports of launcher.preflight, run as two nodes of one GPU each."""
    arguments = ["measure", "--reports", str(folder), "--nodes", "2", "--store", f"localhost:{free_port()}", "--timeout", "40"]
    started = time.perf_counter()
    nodes = [
        subprocess.Popen(
            [sys.executable, "-m", "launcher.preflight", *arguments],
            env={**os.environ, "SLURM_NODEID": str(n), "SLURMD_NODENAME": f"gpu{n}", "CUDA_VISIBLE_DEVICES": str(n)},
            stdout=sys.stderr,
        )
        for n in range(2)
    ]
    codes = [node.wait() for node in nodes]
    reports = [json.loads(path.read_text()) for path in sorted(folder.glob("gpu*.json"))]
    kept = {key: [report.get(key) for report in reports] for key in ("bandwidth", "matmul_tflops", "skew", "faults")}
    return {"exit codes": codes, "seconds": round(time.perf_counter() - started, 1), **kept}


def time_links(raw: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Bytes a GPU sends a second (busiest direction) in collectives of bf16, by kind and MB."""
    found: dict[str, dict[str, float]] = defaultdict(dict)
    with runs.layout(raw) as (_, groups):
        size, device = groups.world_size, groups.device
        share = (size - 1) / size
        for megabytes in (4, 64, 512) if device.type == "cuda" else (1,):
            whole = torch.zeros(megabytes * 500_000 // size * size, dtype=torch.bfloat16, device=device)
            part = torch.zeros(len(whole) // size, dtype=torch.bfloat16, device=device)
            right, left = (groups.rank + 1) % size, (groups.rank - 1) % size

            def exchange(whole: torch.Tensor = whole, right: int = right, left: int = left) -> None:
                pair = [dist.P2POp(dist.isend, whole, right), dist.P2POp(dist.irecv, whole.clone(), left)]
                for work in dist.batch_isend_irecv(pair):
                    work.wait()

            kinds = {
                "all_reduce": (2 * share, lambda whole=whole: dist.all_reduce(whole)),
                "all_gather": (share, lambda whole=whole, part=part: dist.all_gather_into_tensor(whole, part)),
                "reduce_scatter": (share, lambda whole=whole, part=part: dist.reduce_scatter_tensor(part, whole)),
                "send_receive": (1.0, exchange),
            }
            for kind, (sent, call) in kinds.items():
                if device.type == "cpu" and kind == "reduce_scatter":
                    continue  # gloo has none
                seconds = min(_seconds(call, device) for _ in range(8))
                found[kind][str(megabytes)] = round(sent * whole.nbytes / seconds / 1e9, 1)
    return dict(found)


def _seconds(call: Any, device: torch.device) -> float:
    """Of one call, all ranks at once."""
    dist.all_reduce(torch.zeros(1, device=device))
    _synchronize(device)
    started = time.perf_counter()
    call()
    _synchronize(device)
    return time.perf_counter() - started


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def time_layout(raw: dict[str, Any], windows: list[int] | None, warm_up: int, steps: int) -> list[dict[str, Any]]:
    """A case a window; on every rank of a pool."""
    from swax_megatron.model.cost import training_flops
    from swax_megatron.model.window import WindowSchedule
    from swax_megatron.plan.duration import duration
    from swax_megatron.plan.layout import Layout
    from swax_megatron.plan.traffic import Cluster
    from swax_megatron.sources import build_mixture
    from swax_megatron.trainer import Trainer, spare_collector

    found = []
    with runs.layout(raw) as (config, groups):
        cuda, size = groups.device.type == "cuda", groups.world_size
        peak = known_peak(torch.cuda.get_device_name()) if cuda else None
        began = time.perf_counter()
        backend = build(config, groups)
        built = time.perf_counter() - began
        trainer = Trainer(config, groups, backend, build_mixture(config, config.data.train, "train", config.train.data_seed))
        spare_collector()
        for window in windows or sorted(set(config.window.windows)):
            window = min(window, config.data.sequence_length)
            fixed = {"schedule": "fixed", "windows": [window], "probabilities": [1.0], "anneal_fraction": 0.0, "anneal_window": window}
            there = from_dict({**raw, "window": {**raw["window"], **fixed}})
            trainer.windows = WindowSchedule.from_config(dataclasses.replace(config, window=there.window))
            first = [trainer.train_step().seconds for _ in range(warm_up)]
            if cuda:
                torch.cuda.reset_peak_memory_stats()
            timed = [trainer.train_step() for _ in range(steps)]
            seconds = median(step.seconds for step in timed)
            rate = timed[0].tokens / seconds
            flops = training_flops(config.model, config.data.sequence_length, timed[0].windows)
            planned = duration(Layout.of(there, size, "triton"), Cluster(gpus_per_node=size))
            case = {
                "window": window,
                "rows": config.train.global_batch_size,
                "micro-batches": config.train.global_batch_size // config.train.micro_batch_size // groups.replicas,
                "seconds": round(seconds, 4),
                "all": [round(step.seconds, 4) for step in timed],
                "warm-up": [round(each, 2) for each in first],
                "tokens_per_second": round(rate),
                "mfu": round(flops * rate / 1e12 / peak / size, 4) if peak else None,
                "planned": round(planned.total, 4),
                "planned/measured": round(planned.total / seconds, 3),
                "loss": round(timed[-1].metrics["loss/train"], 4),
                "build_seconds": round(built, 1),
            }
            if cuda:
                case |= {"peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2)}
            if cuda and not found:
                case |= {"profile": profile_step(trainer)}
            found.append(case)
        trainer.feed.close()
        backend.close()
        del trainer, backend
        gc.unfreeze()  # before the layout's own collection
    release()
    return found


def build(config: Any, groups: Any) -> Any:
    """The model, its weights drawn on the device, and its optimizer."""
    from swax_megatron.model import parameters
    from swax_megatron.model.swax import build_model
    from swax_megatron.optim.build import build_optimizer

    parameters.initialize = _drawn_here
    return build_optimizer(config, build_model(config, groups), groups)


@torch.no_grad()
def _drawn_here(chunk: torch.nn.Module, seed: int, tensor_rank: int, tensor_size: int) -> None:
    from swax_megatron.model.parameters import fill, global_offsets, global_shape, named_global_parameters

    for name, parameter in named_global_parameters(chunk):
        if parameter.initial.kind == "normal":
            parameter.normal_(0.0, parameter.initial.a)
        else:
            fill(parameter, parameter.initial, name, seed, global_shape(parameter, tensor_size), global_offsets(parameter, tensor_rank))


def release() -> None:
    """Give memory back: the next layout, or another process, needs it."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def profile_step(trainer: Any) -> dict[str, Any]:
    """One step under the profiler, this rank's kernels: seconds of NCCL's by kind, of them beside others, of nothing at all."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        trainer.train_step()
        torch.cuda.synchronize()
    spans: dict[bool, list[tuple[int, int]]] = {True: [], False: []}
    kinds: dict[str, float] = defaultdict(float)
    for event in profiler.profiler.kineto_results.events():
        if event.device_type() != torch.autograd.DeviceType.CUDA or event.is_user_annotation():
            continue
        name, ours = event.name(), event.name().startswith("nccl")
        spans[ours].append((event.start_ns(), event.end_ns()))
        if ours:
            kinds[name.split("(")[0].removeprefix("ncclDevKernel_").split("_")[0]] += event.duration_ns() / 1e9
    (nccl, other), both = (union(spans[ours]) for ours in (True, False)), union(spans[True] + spans[False])
    edges = [edge for span in spans[True] + spans[False] for edge in span]
    return {
        "nccl_s": round(nccl / 1e9, 5),
        "by_kind_s": {kind: round(seconds, 5) for kind, seconds in sorted(kinds.items())},
        "overlapped": round((nccl + other - both) / nccl, 4) if nccl else None,
        "others_s": round(other / 1e9, 5),
        "nothing_s": round((max(edges) - min(edges) - both) / 1e9, 5),
    }


def save_checkpoint(raw: dict[str, Any], folder: str) -> dict[str, Any]:
    """Seconds of a save that waits (fsync included)."""
    from swax_megatron.checkpoint.store import save

    with runs.layout(raw) as (config, groups):
        backend = build(config, groups)
        _synchronize(groups.device)
        began = time.perf_counter()
        save(Path(folder), 1, backend.fragments(saving=True), config=to_dict(config), state={}, group=groups.cpu)
        seconds = time.perf_counter() - began
        size = sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())
        backend.close()
        del backend
    release()
    return {"seconds": round(seconds, 2), "bytes": size}


def load_checkpoint(raw: dict[str, Any], folder: str) -> dict[str, Any]:
    """Seconds to verify every byte and to read this layout's weights and moments."""
    from swax_megatron.checkpoint.store import open_checkpoint

    with runs.layout(raw) as (config, groups):
        backend = build(config, groups)
        _synchronize(groups.device)
        began = time.perf_counter()
        checkpoint = open_checkpoint(Path(folder) / "step_1")
        checkpoint.verify(group=groups.cpu)
        verified = time.perf_counter()
        checkpoint.read_into(backend.fragments(saving=False))
        backend.loaded(1)
        _synchronize(groups.device)
        dist.barrier(group=groups.cpu)
        read = time.perf_counter()
        backend.close()
        del backend
    release()
    return {"verify_s": round(verified - began, 2), "read_s": round(read - verified, 2)}


if __name__ == "__main__":
    sys.exit(main())
