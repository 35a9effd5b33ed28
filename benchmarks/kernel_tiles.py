"""Choose attention's tiles (the mLSTM's: `mlstm_tiles`): check and time every candidate of `CONFIGS` and `SIZES` on one GPU.

Compiles first, in many processes (Triton's disk cache is shared). Each candidate runs in the public functions: outputs and every
gradient against float64 (short rows, documents), against the shipped tiles at full size, and twice over itself.
Then milliseconds, medians of `triton.testing.do_bench`, forward and forward + backward. JSON lines to --out, a short table last.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from functools import cache
from typing import Any, TextIO

import torch

from .kernels import SWA, timed

TOLERANCE = {"swa": 5e-3}


def swa_candidates(name: str) -> dict[str, Any]:
    """Of the Gluon kernels. Where the backward pass is one pass, the two passes' candidates switch it off."""
    from swax_megatron.kernels.swa.gluon_launch import NARROW, SIZES, Keys, Queries

    d, window = SWA[name][3:]
    shipped = SIZES[d, window <= NARROW]
    found = {"shipped": shipped}
    if shipped.onepass:
        found["two passes"] = shipped._replace(onepass=None)
        for stages in (2, 3):
            found[f"onepass 64x128 s{stages}"] = shipped._replace(onepass=Keys(64, 128, stages))
    for keys, stages in ((32, 6), (32, 8), (64, 2), (64, 3), (64, 4), (128, 1), (128, 2)):
        for pack in (1, 4):
            label = f"{keys} keys pack{pack} s{stages}"
            found[f"forward {label}"] = shipped._replace(forward=Queries(keys, stages, pack))
            if keys * stages < 256:
                found[f"dq {label}"] = shipped._replace(dq=Queries(keys, stages, pack), onepass=None)
    for queries, stages in ((32, 4), (64, 2), (64, 3), (64, 4)):
        found[f"dkv {queries}x128 s{stages}"] = shipped._replace(dkv=Keys(queries, 128, stages), onepass=None)
    return found


def candidates(case: str) -> dict[str, Any]:
    return swa_candidates(case.split(" ", 1)[1])


def install(case: str, config: Any) -> None:
    """Make the public functions use `config` for the case's shape class."""

    from swax_megatron.kernels.swa import gluon_launch

    d, window = SWA[case.split(" ", 1)[1]][3:]
    gluon_launch.SIZES[d, window <= gluon_launch.NARROW] = config


def draw(shape: tuple[int, ...], seed: int, mean: float = 0.0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator("cuda").manual_seed(seed), device="cuda") + mean


def make(case: str, size: tuple[int, int, int, int], means: tuple[float, float]) -> list[torch.Tensor]:
    """Leaves of the case's public function. size: batch, time, heads, key/value heads."""
    batch, length, heads, kv_heads = size
    d = SWA[case.split(" ", 1)[1]][3]
    return [draw((batch, length, n, d), i).bfloat16().requires_grad_() for i, n in enumerate((heads, kv_heads, kv_heads))]


def full_size(case: str) -> tuple[int, int, int, int]:
    return 1, *SWA[case.split(" ", 1)[1]][:3]


def apply(case: str, leaves: list[torch.Tensor], window: int, cu_seqlens: torch.Tensor | None, backend: str) -> torch.Tensor:
    from swax_megatron.kernels.swa import swa

    return swa(*leaves, window, cu_seqlens=cu_seqlens, backend=backend)


def results(case: str, leaves: list[torch.Tensor], window: int, cu_seqlens: torch.Tensor | None = None, backend: str = "triton"):
    out = apply(case, leaves, window, cu_seqlens, backend)
    cotangent = draw(tuple(out.shape), 9).bfloat16().to(out.dtype)
    return [out.detach(), *torch.autograd.grad(out, leaves, cotangent)]


def trials(case: str) -> list[tuple[str, tuple[int, int, int, int], tuple[float, float], int, bool]]:
    """Name, size, gate means, window, packed documents."""
    from swax_megatron.kernels.swa.gluon_launch import NARROW

    name = case.split(" ", 1)[1]
    heads, kv_heads, window = SWA[name][1], SWA[name][2], SWA[name][4]
    size = (2, 2700 if window > NARROW else 1100, 2 * heads // kv_heads, 2)
    windows = (window, window - 55, NARROW + 1) if window > NARROW else (window, 77, 1)
    return [(f"window {w}", size, (0.0, 0.0), w, documents) for w, documents in zip(windows, (False, True, False), strict=True)]


def documents(batch: int, length: int) -> torch.Tensor:
    edges = [0, 5, 256, 300, length, length + 1, length + 500, batch * length]
    return torch.tensor(edges, dtype=torch.int32, device="cuda")


@cache
def exact(case: str) -> list[list[torch.Tensor]]:
    """float64 results of every trial."""
    found = []
    for _, size, means, window, packed in trials(case):
        leaves = [x.detach().double().requires_grad_() for x in make(case, size, means)]
        found.append([x.cpu() for x in results(case, leaves, window, documents(*size[:2]) if packed else None, "reference")])
    return found


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    a, b = a.double(), b.double().to(a.device)
    value = float((a - b).norm() / b.norm().clamp_min(1e-30))
    return value if value == value else float("inf")


def worst_error(case: str) -> float:
    worst = 0.0
    for (_, size, means, window, packed), truth in zip(trials(case), exact(case), strict=True):
        ours = results(case, make(case, size, means), window, documents(*size[:2]) if packed else None)
        worst = max(worst, *(relative(a, b) for a, b in zip(ours, truth, strict=True)))
    return worst


def compile_all(cases: list[str], processes: int) -> None:
    """Run every candidate once on short rows, spread over processes that fill the disk cache; failures show up later."""
    command = [sys.executable, "-m", "benchmarks.kernel_tiles", "--cases", *cases]
    shares = [[*command, "--compile", f"{i}/{processes}"] for i in range(processes)]
    workers = [subprocess.Popen(share, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) for share in shares]
    for worker in workers:
        worker.wait()


def compile_share(cases: list[str], share: str) -> None:
    index, processes = (int(x) for x in share.split("/"))
    every = [(case, config) for case in cases for config in candidates(case).values()]
    for case, config in every[index::processes]:
        install(case, config)
        size = full_size(case)
        window = SWA[case.split(" ", 1)[1]][4]
        try:
            leaves = make(case, (size[0], 512, *size[2:]), (0.0, 3.0))
            results(case, leaves, window)
            results(case, leaves, window, torch.tensor([0, 5, 512 * size[0]], dtype=torch.int32, device="cuda"))
            torch.cuda.synchronize()
        except Exception as error:  # one candidate that cannot be built must not stop the others: the timing run reports it
            print(f"{case}: {error}", file=sys.stderr)


def measure(case: str, out: TextIO, deadline: float) -> list[tuple[str, float, float, float, str]]:
    """Rows of name, forward, forward + backward (ms), worst error, verdict."""
    every, rows = candidates(case), []
    window = SWA[case.split(" ", 1)[1]][4]
    leaves = make(case, full_size(case), (-4.0, 4.5))
    limit = TOLERANCE[case.split(" ", 1)[0]]
    shipped = None
    for name, config in every.items():
        if time.monotonic() > deadline:
            break
        install(case, config)
        row: dict[str, Any] = {"case": case, "candidate": name}
        try:
            first, second = results(case, leaves, window), results(case, leaves, window)
            same = all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
            shipped = first if shipped is None else shipped
            apart = max(relative(a, b) for a, b in zip(first, shipped, strict=True))
            moved = max(relative(a, b) for a, b in zip(first, second, strict=True))
            del first, second
            error = worst_error(case)
            times = timed(lambda *x: apply(case, list(x), window, None, "triton"), leaves)
            verdict = "ok" if max(error, apart) < limit and moved < limit else "WRONG"
            row |= {**times, "error": error, "from_shipped": apart, "deterministic": same, "between_runs": moved, "verdict": verdict}
        except Exception as problem:  # a candidate beyond the GPU's shared memory, or that does not compile, is one line of the table
            row |= {"verdict": "FAILED", "problem": repr(problem)[:300]}
        print(json.dumps(row), file=out, flush=True)
        verdict = row["verdict"] + ("" if row.get("deterministic", True) else ", bits vary")
        rows.append((name, row.get("forward_ms", 0.0), row.get("forward_backward_ms", 0.0), row.get("error", 0.0), verdict))
    install(case, every["shipped"])
    return rows


def best_of(case: str, rows: list[tuple[str, float, float, float, str]], out: TextIO) -> list[tuple[str, float, float, float, str]]:
    """For attention: the best of each kernel together."""
    if not rows:
        return []
    every = candidates(case)
    right = [row for row in rows if row[4].startswith("ok")]
    config = every["shipped"]
    both = "two passes" if config.onepass else "shipped"  # which row a candidate of two passes is to be compared with
    for part, column, plain in (("forward", 1, "shipped"), ("dq", 2, both), ("dkv", 2, both), ("onepass", 2, "shipped")):
        found = [row for row in right if row[0].startswith(part + " ") or row[0] == plain]
        if found:
            config = config._replace(**{part: getattr(every[min(found, key=lambda row: row[column])[0]], part)})
    window, leaves = SWA[case.split(" ", 1)[1]][4], make(case, full_size(case), (0.0, 0.0))
    install(case, config)
    error = worst_error(case)
    times = timed(lambda *x: apply(case, list(x), window, None, "triton"), leaves)
    verdict = "ok" if error < TOLERANCE["swa"] else "WRONG"
    row = {"case": case, "candidate": "best tiles", "config": repr(config), **times, "error": error, "verdict": verdict}
    print(json.dumps(row), file=out, flush=True)
    install(case, every["shipped"])
    return [(f"best tiles: {config!r}", times["forward_ms"], times["forward_backward_ms"], error, verdict)]


def main(argv: list[str] | None = None) -> int:
    cases = [f"swa {name}" for name in SWA]
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.kernel_tiles",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="example:\n  python -m benchmarks.kernel_tiles --cases 'swa 7B w128' --out tiles.jsonl",
    )
    parser.add_argument("--cases", nargs="+", choices=cases, default=cases, metavar="CASE", help=f"of: {', '.join(cases)}")
    parser.add_argument("--out", default="kernel_tiles.jsonl", metavar="FILE", help="JSON lines are added here (kernel_tiles.jsonl)")
    parser.add_argument("--processes", type=int, default=15, help="processes that compile (default 15)")
    parser.add_argument("--seconds", type=float, default=400, help="start no further candidate after this long (default 400)")
    parser.add_argument("--compile", metavar="I/N", help=argparse.SUPPRESS)
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("error: the tiles are chosen on a CUDA GPU, and torch sees none", file=sys.stderr)
        return 2
    if options.compile:
        compile_share(options.cases, options.compile)
        return 0
    if options.measure:
        show(options.cases[0], options.out, time.monotonic() + options.seconds)
        return 0
    began = time.monotonic()
    compile_all(options.cases, options.processes)
    print(f"compiled in {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
    tables = []
    for case in options.cases:  # a process each: a kernel that faults takes its process with it
        left = began + options.seconds - time.monotonic()
        command = [sys.executable, "-m", "benchmarks.kernel_tiles", "--cases", case, "--measure", "--out", options.out]
        try:
            done = subprocess.run([*command, "--seconds", str(left)], capture_output=True, text=True, timeout=max(left, 5) + 40)
            tables.append(f"{case}\n{done.stdout}" + (f"  {done.stderr[-300:]}\n" if done.returncode else ""))
        except subprocess.TimeoutExpired:
            tables.append(f"{case}\n  stopped: out of time\n")
        print(f"{case}: done after {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
    print("  forward  both: milliseconds\n" + "".join(tables), end="")
    return 0


def show(case: str, path: str, deadline: float) -> None:
    """Measure a case and print its table: the shipped tiles, the fastest, the best of each kernel, the wrong ones."""
    with open(path, "a", encoding="utf-8") as out:
        rows = measure(case, out, deadline)
        rows = sorted(rows, key=lambda row: (row[0] != "shipped", not row[4].startswith("ok"), row[2]))
        shown = rows[:8] + [row for row in rows[8:] if not row[4].startswith("ok")][:3]
        if case.startswith("swa"):
            shown = [row for row in shown if row[0] == "shipped" or not row[4].startswith("ok")]
            for kernel, column in (("forward", 1), ("dq", 2), ("dkv", 2), ("onepass", 2)):
                right = [row for row in rows if row[0].startswith(kernel + " ") and row[4].startswith("ok")]
                shown += sorted(right, key=lambda row: row[column])[:3]
            shown += best_of(case, rows, out)
    for name, forward, both, error, verdict in shown:
        print(f"  {forward:7.3f} {both:7.3f}  error {error:.1e}  {verdict:6s} {name}")


if __name__ == "__main__":
    sys.exit(main())
