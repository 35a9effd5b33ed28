"""Time the mLSTM and sliding-window attention kernels against others, on one GPU.

Prints one JSON line a case: shape, milliseconds (median of `triton.testing.do_bench`) forward and forward + backward for ours and
for each peer found, in the same process, with the device and the versions. Peers: `mlstm_kernels` (`xl_chunk`, several chunk
lengths, the fastest counts; contiguous (B, H, T, D) inputs as it wants them) if it is installed, and FlexAttention compiled.
Random data; our results are first compared with the reference.
"""

from __future__ import annotations

import argparse
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
}
SWA = {  # name: time, heads, key/value heads, head size, window
    "7B w128": (16384, 32, 8, 128, 128),
    "7B w512": (16384, 32, 8, 128, 512),
    "7B w2048": (16384, 32, 8, 128, 2048),
    "1.4B w128": (16384, 16, 16, 128, 128),
    "1.4B w2048": (16384, 16, 16, 128, 2048),
}


def timed(function: Callable[..., torch.Tensor], inputs: list[torch.Tensor]) -> dict[str, float]:
    """Median milliseconds of the forward pass without a graph, and of forward + backward."""
    from triton.testing import do_bench

    with torch.no_grad():
        forward = do_bench(lambda: function(*inputs), warmup=15, rep=60, return_mode="median")
    cotangent = torch.randn_like(function(*inputs))

    def both() -> None:
        torch.autograd.grad(function(*inputs), inputs, cotangent)

    return {"forward_ms": round(forward, 4), "forward_backward_ms": round(do_bench(both, warmup=15, rep=60, return_mode="median"), 4)}


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
    result["ours, cell"] = timed(lambda *x: mlstm(*x, backend="triton"), inputs)
    result["ours, cell + norm + output gate"] = timed(lambda *x: mlstm_fused(*x, backend="triton"), [*inputs, ogate, weight])
    if peers and importlib.util.find_spec("mlstm_kernels"):
        from mlstm_kernels.torch.chunkwise.triton_xl_chunk import mlstm_chunkwise__xl_chunk

        dense = [x.detach().transpose(1, 2).contiguous().requires_grad_() for x in inputs]
        runs = {}
        for chunk in (128, 256):

            def run(*x: torch.Tensor, chunk: int = chunk) -> torch.Tensor:
                return mlstm_chunkwise__xl_chunk(*x, chunk_size=chunk, autocast_kernel_dtype=torch.bfloat16)

            runs[chunk] = timed(run, dense)
        best = min(runs, key=lambda chunk: runs[chunk]["forward_backward_ms"])
        result["mlstm_kernels xl_chunk, cell"] = {**runs[best], "chunk": best}
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
    result["ours"] = timed(lambda *x: swa(*x, window, backend="triton"), inputs)
    if peers:
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        mask = create_block_mask(lambda b, h, t, s: (t >= s) & (t - s < window), None, None, length, length, device="cuda")
        compiled = torch.compile(flex_attention, dynamic=False)
        dense = [x.detach().transpose(1, 2).contiguous().requires_grad_() for x in inputs]
        result["FlexAttention, compiled"] = timed(lambda q, k, v: compiled(q, k, v, block_mask=mask, enable_gqa=True), dense)
    return result


def main(argv: list[str] | None = None) -> int:
    cases = {f"mlstm {n}": (mlstm_case, n) for n in MLSTM} | {f"swa {n}": (swa_case, n) for n in SWA}
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
