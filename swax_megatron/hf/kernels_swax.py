"""The project's own Triton kernels, where its package is installed beside transformers and the model is on a GPU.

Shipped inside every export. The package (``swax_megatron.kernels``) is optional: without it, on other devices and for what the
kernels do not take, the model's plain torch computes the same.

Shapes: b batch, t time, h heads, k query-key size and v value size of an mLSTM head, d attention head size.
"""

import functools
import importlib

import torch

DEVICES = ("cuda",)


@functools.cache
def packages():
    """(mLSTM, sliding-window attention) of the project; None where it is not installed."""
    try:
        return tuple(importlib.import_module(f"swax_megatron.kernels.{name}") for name in ("mlstm", "swa"))
    except ImportError:
        return None


class KernelPlan:
    """That this forward pass runs on the kernels. cu_seqlens: document boundaries over the flattened (b, t), or None."""

    def __init__(self, cu_seqlens=None):
        self.mlstm, self.swa = packages()
        self._cu_seqlens = cu_seqlens

    def cu_seqlens(self, device):
        return None if self._cu_seqlens is None else self._cu_seqlens.to(device)


def kernel_plan(config, x_btm, attention_mask, cache):
    """A KernelPlan, or None where plain torch runs: no package, no GPU, compiled code, padding other than on the left of a prompt."""
    if config.kernels == "off" or x_btm.device.type not in DEVICES or torch.compiler.is_compiling() or packages() is None:
        return None
    if attention_mask is None:
        return KernelPlan()
    if not isinstance(attention_mask, torch.Tensor) or attention_mask.ndim != 2:
        return None
    batch, length = x_btm.shape[:2]
    mask_bt = attention_mask[:, -length:].bool()
    if mask_bt.all():  # what generate() gives for every token after the prompt
        return KernelPlan()
    begins = cache is None or cache.get_seq_length() == 0
    if not begins or (mask_bt[:, :-1] & ~mask_bt[:, 1:]).any() or not mask_bt[:, -1].all():
        return None
    # left padding: a document of its own before the row's, whose memory starts from nothing and whose keys nobody else sees
    start_b = torch.arange(batch, device=x_btm.device) * length
    bounds = torch.stack((start_b, start_b + (~mask_bt).sum(-1)), dim=1).flatten()
    return KernelPlan(torch.cat((bounds, bounds.new_tensor([batch * length]))).int())


def fast_mlstm(q_bthk, k_bthk, v_bthv, igate_bth, fgate_bth, state, plan, config, keep_state):
    """The mLSTM cell on the kernels, from raw gates: h_bthv and the last (C, n, m), which is None unless ``keep_state``."""
    options = {"gate_cap": config.gate_cap, "eps": config.mlstm_eps}
    inputs = (q_bthk, k_bthk, v_bthv.to(q_bthk.dtype), igate_bth, fgate_bth)
    state = None if state is None else plan.mlstm.MlstmState(*state)
    if q_bthk.shape[1] == 1 and state is not None and not torch.is_grad_enabled():  # the step overwrites the state and has no gradient
        state = plan.mlstm.MlstmState(*(x.contiguous() for x in state))
        h_bhv, state = plan.mlstm.mlstm_step(*(x[:, 0] for x in inputs), state, **options)
        return h_bhv[:, None], tuple(state)
    options |= {"cu_seqlens": plan.cu_seqlens(q_bthk.device), "initial_state": state, "chunk_size": config.mlstm_chunk_size}
    if not keep_state:
        return plan.mlstm.mlstm(*inputs, **options), None
    h_bthv, state = plan.mlstm.mlstm(*inputs, return_final_state=True, **options)
    return h_bthv, tuple(state)


def fast_attention(q_bhtd, k_bhtd, v_bhtd, window, plan):
    """Sliding-window attention over a whole row on the kernels: o_bthd."""
    q_bthd, k_bthd, v_bthd = (x.transpose(1, 2) for x in (q_bhtd, k_bhtd, v_bhtd))
    return plan.swa.swa(q_bthd, k_bthd, v_bthd, window, cu_seqlens=plan.cu_seqlens(q_bthd.device))
