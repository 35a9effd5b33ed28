"""Choose the mLSTM kernels' tiles: every kernel's candidates are checked and timed on one GPU, and the fastest printed.

Candidate j of all kernels runs together in the public function, so that as many runs as the longest list has entries time them all: the
profiler tells the kernels apart. Each run's outputs and gradients are compared with float64 in hard regimes (short rows), and its bits
with those of a second run. Compiles first, in many processes (Triton's disk cache is shared). JSON lines to --out, a table last.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections import defaultdict
from dataclasses import replace
from functools import cache
from typing import Any

import torch

from .kernels import MLSTM

REGIMES = {"clamped": (-10.0, 4.0), "mixed": (-4.0, 4.5), "free": (5.0, 3.0), "forget": (0.0, -15.0), "keep": (15.0, 15.0)}
TOLERANCE = 1.2e-2
ROWS = ("BM", "BN", "BS", "BD")
SCANS = ((1024, 8, 1), (512, 4, 1), (1024, 2, 1), (512, 1, 1))
LISTS = {  # kernel: names of the sizes, then sizes, warps, stages
    "scores": (("BT", "BD"), (
        (64, 64, 4, 4), (64, 64, 4, 3), (64, 128, 4, 3), (64, 64, 4, 2), (64, 128, 4, 2), (64, 64, 8, 3), (128, 64, 8, 3), (128, 64, 16, 4),
    )),
    "outputs": (ROWS, (
        (128, 128, 64, 64, 8, 3), (128, 256, 64, 64, 8, 3), (128, 256, 64, 64, 8, 4), (128, 128, 64, 64, 4, 3), (64, 256, 64, 64, 4, 2),
        (128, 128, 64, 64, 8, 2), (64, 256, 64, 64, 4, 3), (128, 128, 64, 64, 8, 4), (128, 256, 64, 32, 8, 4), (64, 256, 32, 64, 4, 2),
        (128, 128, 32, 64, 8, 3), (128, 256, 32, 64, 8, 3), (64, 256, 32, 32, 4, 3), (64, 128, 32, 64, 4, 3), (64, 128, 64, 64, 4, 3),
    )),
    "updates": (("BK", "BV", "BT", "GROUP"), (
        (64, 256, 64, 2, 4, 2), (64, 256, 64, 4, 4, 2), (128, 256, 64, 4, 8, 3), (128, 256, 64, 2, 8, 3), (128, 128, 64, 2, 4, 3),
        (128, 128, 64, 4, 4, 2), (64, 256, 32, 4, 4, 3), (64, 128, 64, 4, 4, 3), (64, 128, 64, 2, 4, 4), (128, 128, 64, 4, 8, 3),
        (64, 256, 64, 1, 4, 2), (128, 256, 32, 4, 8, 4), (256, 128, 64, 4, 8, 3), (64, 256, 64, 2, 4, 3), (64, 256, 64, 2, 8, 2),
        (64, 128, 64, 2, 4, 3), (64, 128, 64, 4, 4, 2),
    )),
    "pairs": (("BT", "BD"), (
        (128, 64, 8, 4), (64, 64, 4, 4), (64, 64, 4, 3), (128, 64, 8, 3), (128, 128, 8, 3), (64, 128, 4, 3), (128, 64, 16, 4),
        (64, 64, 8, 3), (64, 128, 4, 2), (64, 64, 4, 2), (128, 64, 8, 2), (128, 128, 8, 2), (64, 32, 4, 4),
    )),
    "gradients": (ROWS, (
        (128, 256, 64, 64, 8, 3), (64, 128, 32, 32, 4, 3), (64, 128, 32, 32, 4, 4), (64, 64, 32, 32, 4, 4), (64, 128, 32, 32, 4, 2),
        (64, 128, 64, 32, 4, 3), (64, 128, 32, 64, 4, 2), (64, 256, 64, 32, 4, 3), (128, 128, 64, 64, 8, 4), (64, 128, 64, 64, 4, 3),
        (128, 256, 64, 64, 8, 4), (64, 64, 64, 64, 4, 2),
    )),
    "scan": (("BLOCK",), SCANS),
    "scan_back": (("BLOCK",), SCANS),
}  # fmt: skip


def lists(d_qk: int, d_v: int, chunk: int) -> dict[str, list]:
    """Tiles that fit the shape class, the shipped one first."""
    from swax_megatron.kernels.mlstm.triton_launch import CONFIGS, Tile

    limit = {"BM": chunk, "BN": d_v, "BS": chunk, "BD": d_qk, "BK": d_qk, "BV": d_v, "BT": chunk, "BLOCK": d_qk * d_v}
    found = {}
    for kernel, (names, entries) in LISTS.items():
        tiles = [getattr(CONFIGS[d_qk, d_v], kernel)]
        if tiles[0] is None:
            found[kernel] = tiles
            continue
        for *sizes, warps, stages in entries:
            tile = Tile(dict(zip(names, sizes, strict=True)), warps, stages)
            if all(size <= limit.get(name, size) for name, size in tile.sizes.items()) and tile not in tiles:
                tiles.append(tile)
        found[kernel] = tiles
    return found


def candidates(d_qk: int, d_v: int) -> list[Any]:
    """Configurations: all kernels' tiles j together, then the shipped ones with P kept or not, P first, or the other chunk length."""
    from swax_megatron.kernels.mlstm.triton_launch import CONFIGS, Tile

    shipped = CONFIGS[d_qk, d_v]
    each = lists(d_qk, d_v, shipped.chunk)
    found = [replace(shipped, **{k: tiles[j % len(tiles)] for k, tiles in each.items()}) for j in range(max(map(len, each.values())))]
    found.append(replace(shipped, keep=not shipped.keep))
    if shipped.scores is None:
        first = CONFIGS[256, 512]
        found.append(replace(shipped, scores=first.scores, outputs=Tile({**first.outputs.sizes, "BN": min(128, d_v)}, *first.outputs[1:])))
    if d_qk <= 128:
        found.append(replace(shipped, chunk=384 - shipped.chunk))  # 128 and 256 exchanged
    return found


def apart(config: Any, shipped: Any) -> list[Any]:
    """`config` one kernel at a time, for when one of its tiles does not fit."""
    return [replace(shipped, **{k: getattr(config, k)}) for k in LISTS if getattr(config, k) != getattr(shipped, k)]


def install(shape: tuple[int, int], config: Any) -> None:
    from swax_megatron.kernels.mlstm import triton_launch

    triton_launch.CONFIGS[shape] = config


def draw(shape: tuple[int, ...], seed: int, mean: float = 0.0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator("cuda").manual_seed(seed), device="cuda") + mean


def make(size: tuple[int, int, int], shape: tuple[int, int], means: tuple[float, float]) -> list[torch.Tensor]:
    leaves = [draw((*size, d), i, 0.5 * (i < 2)).bfloat16() for i, d in enumerate((shape[0], *shape))]
    return [x.requires_grad_() for x in (*leaves, *(draw(size, 3 + i, mean) for i, mean in enumerate(means)))]


def results(leaves: list[torch.Tensor], backend: str = "triton") -> list[torch.Tensor]:
    from swax_megatron.kernels.mlstm import mlstm

    h = mlstm(*leaves, backend=backend)
    return [h.detach(), *torch.autograd.grad(h, leaves, draw(tuple(h.shape), 9).bfloat16().to(h.dtype))]


@cache
def exact(shape: tuple[int, int]) -> list[list[torch.Tensor]]:
    every = [make((1, 1100, 2), shape, means) for means in REGIMES.values()]
    return [results([x.detach().double().requires_grad_() for x in leaves], "reference") for leaves in every]


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    value = float((a.double() - b).norm() / b.norm().clamp_min(1e-30))
    return value if value == value else float("inf")


def worst_error(shape: tuple[int, int]) -> float:
    worst = 0.0
    for means, truth in zip(REGIMES.values(), exact(shape), strict=True):
        worst = max(worst, *(relative(a, b) for a, b in zip(results(make((1, 1100, 2), shape, means)), truth, strict=True)))
    return worst


def kernel_times(leaves: list[torch.Tensor], calls: int = 6) -> dict[str, float]:
    """Mean microseconds of each kernel of a forward and backward pass, after the first call."""
    from torch.profiler import ProfilerActivity, profile

    results(leaves)
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(calls):
            results(leaves)
        torch.cuda.synchronize()
    durations = defaultdict(list)
    for event in sorted((e for e in profiler.events() if e.device_type.name == "CUDA"), key=lambda e: e.time_range.start):
        durations[event.name].append(event.time_range.elapsed_us())
    found = {}
    for name, times in durations.items():
        runs = len(times) // calls
        if name.split("(")[0] in OURS and runs:
            for i in range(runs):
                found[f"{name}{' back' if i else ''}"] = sum(sorted(times[i::runs])[: calls - 1]) / (calls - 1)
    return found


OURS = ("chunk_gates", "token_weights", "chunk_updates", "scan_states", "pair_scores", "outputs", "pair_gradients", "combine_gradients")
OURS += ("gate_gradients",)


def compile_share(cases: list[str], share: str) -> None:
    index, processes = (int(x) for x in share.split("/"))
    shapes = sorted({MLSTM[case][3:] for case in cases}, reverse=True)
    work = [(shape, j) for shape in shapes for j in range(len(candidates(*shape)))]
    for shape, j in work[index::processes]:
        shipped, config = candidates(*shape)[0], candidates(*shape)[j]
        for one in (config, *apart(config, shipped)):
            install(shape, one)
            try:
                results(make((1, 512, 2), shape, (0.0, 3.0)))
                torch.cuda.synchronize()
            except Exception as error:  # a candidate that cannot be built must not stop the others: the timing run reports it
                print(f"{shape} {j}: {error!r}"[:300], file=sys.stderr)
            else:
                if one is config:
                    break
        install(shape, shipped)


def measure(case: str, out: str, deadline: float) -> None:
    shape = MLSTM[case][3:]
    leaves = make(MLSTM[case][:3], shape, (-4.0, 4.5))
    from swax_megatron.kernels.mlstm.triton_launch import CONFIGS

    shipped = CONFIGS[shape]
    best: dict[str, list] = defaultdict(list)
    waiting = list(enumerate(candidates(*shape)))
    while waiting and time.monotonic() < deadline:
        j, config = waiting.pop(0)
        install(shape, config)
        row: dict[str, Any] = {"case": case, "candidate": j, "config": repr(config)}
        try:
            first, second = results(leaves), results(leaves)
            row["same"] = all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
            del first, second
            row["error"] = worst_error(shape)
            row["us"] = {k: round(t, 1) for k, t in kernel_times(leaves).items()}
        except Exception as problem:  # beyond shared memory, or not to be compiled: one line of the table, and each kernel alone
            row["problem"] = repr(problem)[:200]
            if isinstance(j, int):
                waiting += [(f"{j} alone", one) for one in apart(config, shipped)]
        with open(out, "a", encoding="utf-8") as file:
            print(json.dumps(row), file=file, flush=True)
        right = row.get("error", 1.0) < TOLERANCE and row.get("same")
        good = "ok" if right else f"WRONG {row.get('error', 1.0):.1e} same={row.get('same')}"
        if "us" not in row:
            print(f"  {j}: {row['problem']}")
            continue
        print(f"  {j}: total {sum(row['us'].values()):.0f} us, {good} {row['us']}", flush=True)
        for name, us in row["us"].items():
            kernel = name.split(" ")[0]
            tile = {"outputs": config.outputs, "pair_gradients": config.pairs, "combine_gradients": config.gradients}.get(kernel)
            tile = {"chunk_updates": config.updates, "pair_scores": config.scores}.get(kernel, tile)
            if kernel == "scan_states":
                tile = config.scan_back if name.endswith("back") else config.scan
            best[name].append((us, j, good, tile))
    for name, rows in best.items():
        if rows[0][3] is not None:
            print(f"  {name}: shipped {rows[0][0]:.1f}")
            for us, j, good, tile in sorted(rows, key=lambda row: row[0])[:4]:
                print(f"    {us:7.1f} us {j} {good} {tuple(tile.sizes.values())} w{tile.warps} s{tile.stages}")
    install(shape, shipped)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.mlstm_tiles",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="example:\n  python -m benchmarks.mlstm_tiles --cases 7B mid small --out tiles.jsonl",
    )
    parser.add_argument("--cases", nargs="+", choices=list(MLSTM), default=["7B", "1.4B long", "mid", "small"], metavar="CASE")
    parser.add_argument("--out", default="mlstm_tiles.jsonl", metavar="FILE", help="JSON lines are added here (mlstm_tiles.jsonl)")
    parser.add_argument("--processes", type=int, default=15, help="processes that compile (default 15)")
    parser.add_argument("--seconds", type=float, default=400, help="start no further candidate after this long (default 400)")
    parser.add_argument("--compile", metavar="I/N", help=argparse.SUPPRESS)
    parser.add_argument("--only-compile", action="store_true", help="fill Triton's cache and stop")
    options = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("error: the tiles are chosen on a CUDA GPU, and torch sees none", file=sys.stderr)
        return 2
    if options.compile:
        compile_share(options.cases, options.compile)
        return 0
    began = time.monotonic()
    if options.processes:
        command = [sys.executable, "-m", "benchmarks.mlstm_tiles", "--cases", *options.cases]
        shares = [[*command, "--compile", f"{i}/{options.processes}"] for i in range(options.processes)]
        for worker in [subprocess.Popen(share) for share in shares]:
            worker.wait()
        print(f"compiled in {time.monotonic() - began:.0f} s", flush=True)
    for case in () if options.only_compile else options.cases:
        print(f"{case} {MLSTM[case]}", flush=True)
        measure(case, options.out, began + options.seconds)
    return 0


if __name__ == "__main__":
    sys.exit(main())
