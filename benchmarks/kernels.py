"""Time the kernels of the mLSTM, of sliding-window attention and of what lies between matrix products against others, on one GPU.

Prints one JSON line a case: shape, milliseconds (median of `triton.testing.do_bench`) forward and forward + backward for ours and
for each peer found, in the same process, with the device and the versions; TFLOP/s and TB/s of the least work, the ratio to the floor
it sets, peak memory, and how many times faster ours is. Peers: `mlstm_kernels` (`xl_chunk`, several chunk lengths, the fastest counts;
the cell alone on contiguous (B, H, T, D) inputs, and with soft caps, transposes, norm and output gate) and fla's `simple_gla` (a
simpler recurrence: no input gate, stabiliser or normaliser; cases of its own) if they are installed, FlexAttention compiled, torch's
FlashAttention-2 with its window, cuDNN's window through `nvidia-cudnn-frontend` if that is installed; for SwiGLU, rotary positions and
gate projections plain torch, eager and compiled. `offsets` cases check tensors of more than 2^31 elements.
Random data; our results are first compared with the reference.
"""

from __future__ import annotations

import argparse
import functools
import gc
import importlib.util
import json
import sys
from collections.abc import Callable
from typing import Any

import torch

MLSTM = {  # name: batch, time, heads, d_qk, d_v
    "7B": (1, 16384, 8, 256, 512),
    "1.4B": (4, 4096, 4, 256, 512),
    "1.4B long": (1, 16384, 4, 256, 512),
    "mid": (4, 4096, 8, 128, 256),
    "small": (8, 2048, 8, 64, 128),
    "131k": (1, 131072, 8, 256, 512),
}
SWA = {  # name: time, heads, key/value heads, head size, window
    "7B w128": (16384, 32, 8, 128, 128),
    "7B w512": (16384, 32, 8, 128, 512),
    "7B w2048": (16384, 32, 8, 128, 2048),
    "7B 131k w2048": (131072, 32, 8, 128, 2048),
    "1.4B w128": (16384, 16, 16, 128, 128),
    "1.4B w512": (16384, 16, 16, 128, 512),
    "1.4B w2048": (16384, 16, 16, 128, 2048),
}
ELEMENTWISE = {  # name: which, rows, width, heads
    "swiglu 1.4B": ("swiglu", 16384, 5504, 1),
    "rotary 1.4B": ("rotary", 16384, 2048, 16),
    "gates 1.4B": ("gates", 16384, 2048, 4),
    "gates 7B": ("gates", 16384, 4096, 8),
}


CEILINGS = {"H100": (3.03, 730.0), "H200": (4.3, 780.0)}  # measured: TB/s read and written, TFLOP/s of dense bfloat16


def timed(function: Callable[..., torch.Tensor | tuple[torch.Tensor, ...]], inputs: list[torch.Tensor]) -> dict[str, float]:
    """Median milliseconds of the forward pass without a graph, and of forward + backward; peak MiB above the inputs of the latter."""
    from triton.testing import do_bench

    with torch.no_grad():
        forward = do_bench(lambda: function(*inputs), warmup=15, rep=60, return_mode="median")
    outputs = function(*inputs)
    cotangents = [torch.randn_like(y) for y in ((outputs,) if isinstance(outputs, torch.Tensor) else outputs)]
    del outputs

    def both() -> None:
        torch.autograd.grad(function(*inputs), inputs, cotangents)

    milliseconds = do_bench(both, warmup=15, rep=60, return_mode="median")
    gc.collect()  # what a peer left in reference cycles would be counted as there before, and vanish
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    both()
    peak = (torch.cuda.max_memory_allocated() - before) / 2**20
    return {"forward_ms": round(forward, 4), "forward_backward_ms": round(milliseconds, 4), "peak_mib": round(peak)}


def rated(times: dict[str, Any], flops: tuple[float, float], read_written: tuple[float, float]) -> dict[str, Any]:
    """Add achieved TFLOP/s, TB/s and the ratio to the floor. flops, read_written (bytes): the least, forward and forward + backward."""
    ceilings = [found for name, found in CEILINGS.items() if name in torch.cuda.get_device_name()]
    for name, count, size in zip(("forward", "forward_backward"), flops, read_written, strict=True):
        if f"{name}_ms" in times:
            seconds = times[f"{name}_ms"] / 1e3
            times[f"{name}_tflops"] = round(count / seconds / 1e12, 1)
            times[f"{name}_tbps"] = round(size / seconds / 1e12, 3)
            for copy, matrix in ceilings:
                times[f"{name}_over_floor"] = round(seconds * 1e12 / max(count / matrix, size / copy), 2)
    return times


def compared(result: dict[str, Any], ours: str, peer: str) -> None:
    """Add how many times faster ours is."""
    if "forward_ms" in result.get(peer, {}):
        key = f"{ours} / {peer}"
        result[key] = {x: round(result[peer][f"{x}_ms"] / result[ours][f"{x}_ms"], 3) for x in ("forward", "forward_backward")}


def mlstm_case(name: str, peers: bool) -> dict[str, Any]:
    from swax_megatron.kernels.mlstm import mlstm, mlstm_fused

    batch, length, heads, d_qk, d_v = MLSTM[name]
    shape = (batch, length, heads)
    torch.manual_seed(0)
    inputs = [torch.randn(*shape, d, device="cuda", dtype=torch.bfloat16) for d in (d_qk, d_qk, d_v)]
    inputs += [torch.randn(*shape, device="cuda") + mean for mean in (-4.0, 4.5)]
    ogate, weight = torch.randn_like(inputs[2]), torch.rand(heads * d_v, device="cuda")
    for x in (*inputs, ogate, weight):
        x.requires_grad_()
    with torch.no_grad():
        expected = mlstm(*inputs, backend="reference").float()
        error = float((mlstm(*inputs, backend="triton").float() - expected).norm() / expected.norm())
        del expected
    result: dict[str, Any] = {"shape": dict(zip(("B", "T", "H", "d_qk", "d_v"), MLSTM[name], strict=True)), "error": round(error, 5)}
    pairs, tokens = d_qk * d_v, batch * length * heads  # the recurrence: 4 d_qk d_v operations a token and head, twice that backward
    flops = (4 * pairs * tokens, 12 * pairs * tokens)
    cell = tuple(2 * tokens * n for n in (2 * d_qk + 2 * d_v, 6 * d_qk + 5 * d_v))
    core = tuple(2 * tokens * n for n in (2 * d_qk + 3 * d_v, 6 * d_qk + 8 * d_v))
    result["ours, cell"] = rated(timed(lambda *x: mlstm(*x, backend="triton"), inputs), flops, cell)
    whole = [*inputs, ogate, weight]
    result["ours, mixer core"] = rated(timed(lambda *x: mlstm_fused(*x, backend="triton"), whole), flops, core)
    if peers and importlib.util.find_spec("mlstm_kernels"):
        from mlstm_kernels.torch.chunkwise.triton_xl_chunk import mlstm_chunkwise__xl_chunk

        dense = [x.detach().transpose(1, 2).contiguous().requires_grad_() for x in inputs]
        runs = {}
        for chunk in (64, 128, 256):

            def run(*x: torch.Tensor, chunk: int = chunk) -> torch.Tensor:
                return mlstm_chunkwise__xl_chunk(*x, chunk_size=chunk, autocast_kernel_dtype=torch.bfloat16)

            try:
                runs[chunk] = timed(run, dense)
            except Exception as problem:  # a chunk length that the peer has no room for is no peer
                result[f"mlstm_kernels, chunk {chunk}"] = {"problem": repr(problem)[:200]}
        best = min(runs, key=lambda chunk: runs[chunk]["forward_backward_ms"])
        result["mlstm_kernels, cell"] = rated({**runs[best], "chunk": best}, flops, cell)
        del dense

        def peer_core(q, k, v, i, f, o, scale):
            """The peer's layer between projections: soft caps, transposes, cell, per-head norm in float32, output gate; eager."""
            i, f = (15 * torch.tanh(x / 15) for x in (i, f))
            h = mlstm_chunkwise__xl_chunk(
                *(x.transpose(1, 2).contiguous() for x in (q, k, v, i, f)), chunk_size=best, autocast_kernel_dtype=torch.bfloat16
            )
            h = torch.nn.functional.layer_norm(h.transpose(1, 2).float(), (d_v,), eps=1e-6) * scale.view(heads, d_v)
            return torch.sigmoid(o) * h.to(o.dtype)

        result["mlstm_kernels, mixer core"] = rated(timed(peer_core, whole), flops, core)
        compared(result, "ours, cell", "mlstm_kernels, cell")
        compared(result, "ours, mixer core", "mlstm_kernels, mixer core")
    return result


def fla_case(name: str, peers: bool) -> dict[str, Any]:
    """Our cell beside fla's `simple_gla`: (B, T, H, D) in place as ours, but no input gate, stabiliser or normaliser."""
    from swax_megatron.kernels.mlstm import mlstm

    batch, length, heads, d_qk, d_v = MLSTM[name]
    torch.manual_seed(0)
    inputs = [torch.randn(batch, length, heads, d, device="cuda", dtype=torch.bfloat16) for d in (d_qk, d_qk, d_v)]
    inputs += [torch.randn(batch, length, heads, device="cuda") + mean for mean in (-4.0, 4.5)]
    gated = [x.clone().requires_grad_() for x in (*inputs[:3], torch.nn.functional.logsigmoid(inputs[4]))]
    result: dict[str, Any] = {"shape": dict(zip(("B", "T", "H", "d_qk", "d_v"), MLSTM[name], strict=True))}
    result["ours, cell"] = timed(lambda *x: mlstm(*x, backend="triton"), [x.requires_grad_() for x in inputs])
    if peers and importlib.util.find_spec("fla"):
        from fla.ops.simple_gla import chunk_simple_gla

        try:
            result["fla simple_gla"] = timed(lambda q, k, v, g: chunk_simple_gla(q, k, v, g=g)[0], gated)
        except Exception as problem:  # it does not run with every Triton
            result["fla simple_gla"] = {"problem": repr(problem)[:300]}
        compared(result, "ours, cell", "fla simple_gla")
    return result


def swa_case(name: str, peers: bool) -> dict[str, Any]:
    from swax_megatron.kernels.swa import swa, swa_blocked

    length, heads, kv_heads, d, window = SWA[name]
    torch.manual_seed(0)
    inputs = [torch.randn(1, length, n, d, device="cuda", dtype=torch.bfloat16).requires_grad_() for n in (heads, kv_heads, kv_heads)]
    with torch.no_grad():
        part = [x[:, :4096] for x in inputs]
        expected = swa_blocked(*part, window).float()
        error = float((swa(*part, window, backend="triton").float() - expected).norm() / expected.norm())
        del expected
    result: dict[str, Any] = {"shape": dict(zip(("T", "H", "H_kv", "d", "window"), SWA[name], strict=True)), "error": round(error, 5)}
    pairs = heads * (length * min(window, length) - min(window, length) * (min(window, length) - 1) // 2)
    size = 2 * length * d
    least = (4 * d * pairs, 14 * d * pairs), (size * (2 * heads + 2 * kv_heads), size * (6 * heads + 6 * kv_heads))
    result["ours"] = rated(timed(lambda *x: swa(*x, window, backend="triton"), inputs), *least)
    torch.utils.deterministic.fill_uninitialized_memory = False  # a debugging aid that would be timed as well
    torch.use_deterministic_algorithms(True)
    result["ours, deterministic"] = rated(timed(lambda *x: swa(*x, window, backend="triton"), inputs), *least)
    torch.use_deterministic_algorithms(False)
    if peers:
        from .attention_peers import cudnn_windowed, flash_windowed, flex_windowed

        dense = [x.detach().transpose(1, 2).contiguous().requires_grad_() for x in inputs]
        makers = {
            "FlashAttention-2 in torch": (lambda: flash_windowed(window), inputs),
            "cuDNN": (lambda: cudnn_windowed(*inputs, window), inputs),
            "FlexAttention, compiled": (lambda: flex_windowed(window, length), dense),
        }
        for peer, (make, leaves) in makers.items():
            try:
                result[peer] = rated(timed(make(), leaves), *least)
            except Exception as problem:  # a peer that is not there or has no kernel for the shape is no peer
                result[peer] = {"problem": repr(problem)[:200]}
            compared(result, "ours", peer)
            compared(result, "ours, deterministic", peer)
    return result


def elementwise_case(name: str, peers: bool) -> dict[str, Any]:
    from swax_megatron.kernels import elementwise

    kind, rows, width, heads = ELEMENTWISE[name]
    torch.manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device="cuda", dtype=torch.bfloat16).requires_grad_()

    if kind == "swiglu":
        function, inputs = elementwise.swiglu, [draw(rows, 1, width) for _ in range(2)]
        bytes_moved = 2 * rows * width * 3, 2 * rows * width * 8
    elif kind == "rotary":
        inputs = [draw(rows, 1, heads, width // heads).detach().transpose(0, 1).requires_grad_() for _ in range(2)]
        positions = torch.arange(rows, device="cuda")[None]
        bytes_moved = 2 * rows * width * 4, 2 * rows * width * 8

        def function(q: torch.Tensor, k: torch.Tensor, backend: str) -> tuple[torch.Tensor, torch.Tensor]:
            return elementwise.rotary(q, k, positions, 10_000.0, backend=backend)

    else:
        function, inputs = elementwise.gate_projections, [draw(rows, 1, width)]
        inputs += [draw(*shape) for _ in range(2) for shape in ((heads, width), (heads,))]
        bytes_moved = 2 * rows * width, 2 * rows * width * 3
    result: dict[str, Any] = {"shape": dict(zip(("of", "rows", "width", "heads"), ELEMENTWISE[name], strict=True))}
    result["ours"] = rated(timed(lambda *x: function(*x, backend="triton"), inputs), (0, 0), bytes_moved)
    if peers:
        plain = functools.partial(function, backend="reference")
        for peer, call in (("plain torch", plain), ("plain torch, compiled", torch.compile(plain))):
            result[peer] = rated(timed(call, inputs), (0, 0), bytes_moved)
            compared(result, "ours", peer)
    return result


def offsets_case(name: str, peers: bool) -> dict[str, Any]:
    """More than 2^31 elements a tensor: the last row of the batch, outputs and gradients, must have the bits it has alone."""
    from swax_megatron.kernels.mlstm import mlstm
    from swax_megatron.kernels.swa import swa

    torch.manual_seed(0)
    if name == "mlstm":
        shapes = [(2, 262_400, 8, d) for d in (256, 256, 512)]
        inputs = [torch.randn(s, device="cuda", dtype=torch.bfloat16) for s in shapes]
        inputs += [torch.randn(shapes[0][:3], device="cuda") + mean for mean in (-4.0, 4.5)]
    else:
        inputs = [torch.randn(5, 131_072, n, 128, device="cuda", dtype=torch.bfloat16) for n in (32, 8, 8)]
    cotangent = torch.randn_like(inputs[2] if name == "mlstm" else inputs[0])

    def run(tensors: list[torch.Tensor], do: torch.Tensor) -> list[torch.Tensor]:
        leaves = [x.detach().requires_grad_() for x in tensors]
        out = mlstm(*leaves, backend="triton") if name == "mlstm" else swa(*leaves, 128, backend="triton")
        return [x[-1:].clone() for x in (out.detach(), *torch.autograd.grad(out, leaves, do))]

    together = run(inputs, cotangent)
    alone = run([x[-1:].clone() for x in inputs], cotangent[-1:].clone())
    same = [bool(torch.equal(a, b)) for a, b in zip(together, alone, strict=True)]
    return {"largest_tensor_elements": cotangent.numel(), "last_row_has_the_same_bits": same}


def main(argv: list[str] | None = None) -> int:
    cases = {f"mlstm {n}": (mlstm_case, n) for n in MLSTM} | {f"fla {n}": (fla_case, n) for n in MLSTM}
    cases |= {f"swa {n}": (swa_case, n) for n in SWA}
    cases |= {f"elementwise {n}": (elementwise_case, n) for n in ELEMENTWISE}
    cases |= {f"offsets {n}": (offsets_case, n) for n in ("mlstm", "swa")}
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.kernels",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="example:\n  python -m benchmarks.kernels --cases 'mlstm 7B' 'swa 7B w128' > kernels.jsonl",
    )
    parser.add_argument("--cases", nargs="+", choices=list(cases), default=list(cases), metavar="CASE", help=f"of: {', '.join(cases)}")
    parser.add_argument("--no-peers", action="store_true", help="time our kernels alone")
    options = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("error: the kernel benchmark needs a CUDA GPU, and torch sees none", file=sys.stderr)
        return 2
    import triton

    about = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "triton": triton.__version__}
    for case in options.cases:
        function, name = cases[case]
        print(json.dumps({"case": case, **about, **function(name, not options.no_peers)}), flush=True)
        torch.cuda.empty_cache()
    return 0


if __name__ == "__main__":
    sys.exit(main())
