"""Windowed attention of other libraries, forward and backward under autograd, on (B, T, H, D) bfloat16: peers of `kernels.swa`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


def flash_windowed(window: int) -> Attention:
    """torch's own FlashAttention-2 with a window."""

    class Flash(torch.autograd.Function):
        @staticmethod
        def forward(ctx, q, k, v):
            size = q.shape[1], k.shape[1], 0.0, True
            o, lse, state, unused, _ = torch.ops.aten._flash_attention_forward(
                q, k, v, None, None, *size, False, window_size_left=window - 1, window_size_right=0
            )
            ctx.save_for_backward(q, k, v, o, lse, state, unused)
            return o

        @staticmethod
        def backward(ctx, do):
            q, k, v, o, lse, state, unused = ctx.saved_tensors
            size = q.shape[1], k.shape[1], 0.0, True
            return torch.ops.aten._flash_attention_backward(
                do, q, k, v, o, lse, None, None, *size, state, unused, window_size_left=window - 1, window_size_right=0
            )

    return Flash.apply


def flex_windowed(window: int, length: int) -> Attention:
    """FlexAttention compiled for this window and length, on (B, H, T, D) contiguous inputs as it prefers them."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    mask = create_block_mask(lambda b, h, t, s: (t >= s) & (t - s < window), None, None, length, length, device="cuda")
    compiled = torch.compile(flex_attention, dynamic=False)
    return lambda q, k, v: compiled(q, k, v, block_mask=mask, enable_gqa=True)


def cudnn_windowed(q: Tensor, k: Tensor, v: Tensor, window: int) -> Attention:
    """cuDNN's attention with a sliding window, through its Python frontend, planned for the shapes of q, k and v.

    Raises ImportError without `nvidia-cudnn-frontend`, cuDNN's own error where it has no engine for the shapes.
    """
    import cudnn

    handle = cudnn.create_handle()
    scale = q.shape[-1] ** -0.5
    mask = {"attn_scale": scale, "use_causal_mask": True, "sliding_window_length": window}

    def dims(x: Tensor) -> dict[str, Any]:
        view = x.detach().transpose(1, 2)  # cuDNN names dimensions (B, H, T, D) and takes any stride
        return {"dim": list(view.shape), "stride": list(view.stride()), "data_type": cudnn.data_type.BFLOAT16}

    def new_graph() -> Any:
        single = cudnn.data_type.FLOAT
        return cudnn.pygraph(
            io_data_type=cudnn.data_type.BFLOAT16, intermediate_data_type=single, compute_data_type=single, handle=handle
        )

    def build(graph: Any) -> Tensor:
        graph.validate()
        graph.build_operation_graph()
        graph.create_execution_plans([cudnn.heur_mode.A, cudnn.heur_mode.FALLBACK])
        graph.check_support()
        graph.build_plans()
        return torch.empty(max(graph.get_workspace_size(), 1), device="cuda", dtype=torch.uint8)

    batch, length, heads, _ = q.shape
    lse_dims = {"dim": [batch, heads, length, 1], "stride": [heads * length, length, 1, 1], "data_type": cudnn.data_type.FLOAT}

    fwd = new_graph()
    fq, fk, fv = (fwd.tensor(name=name, **dims(x)) for name, x in (("q", q), ("k", k), ("v", v)))
    fo, flse = fwd.sdpa(name="sdpa", q=fq, k=fk, v=fv, generate_stats=True, **mask)
    fo.set_output(True).set_dim(dims(q)["dim"]).set_stride(dims(q)["stride"])
    flse.set_output(True).set_data_type(cudnn.data_type.FLOAT)
    fwd_space = build(fwd)

    bwd = new_graph()
    bq, bk, bv, bo, bdo = (bwd.tensor(name=name, **dims(x)) for name, x in (("q", q), ("k", k), ("v", v), ("o", q), ("do", q)))
    blse = bwd.tensor(name="stats", **lse_dims)
    grads = bwd.sdpa_backward(name="sdpa_backward", q=bq, k=bk, v=bv, o=bo, dO=bdo, stats=blse, **mask)
    for y, x in zip(grads, (q, k, v), strict=True):
        y.set_output(True).set_dim(dims(x)["dim"]).set_stride(dims(x)["stride"])
    bwd_space = build(bwd)

    class Cudnn(torch.autograd.Function):
        @staticmethod
        def forward(ctx, q, k, v):
            o = torch.empty_like(q)
            lse = torch.empty(batch, heads, length, 1, device=q.device)
            cudnn.set_stream(handle=handle, stream=torch.cuda.current_stream().cuda_stream)
            fwd.execute({fq: q, fk: k, fv: v, fo: o, flse: lse}, fwd_space, handle=handle)
            ctx.save_for_backward(q, k, v, o, lse)
            return o

        @staticmethod
        def backward(ctx, do):
            q, k, v, o, lse = ctx.saved_tensors
            dq, dk, dv = (torch.empty_like(x) for x in (q, k, v))
            cudnn.set_stream(handle=handle, stream=torch.cuda.current_stream().cuda_stream)
            buffers = {bq: q, bk: k, bv: v, bo: o, bdo: do, blse: lse}
            bwd.execute(buffers | dict(zip(grads, (dq, dk, dv), strict=True)), bwd_space, handle=handle)
            return dq, dk, dv

    return Cudnn.apply
