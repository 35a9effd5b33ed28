"""Linear maps at the borders of a tensor-parallel region whose transfers run beside the products that do not need them.

Under sequence parallelism a rank holds S / P tokens outside a region and needs, or contributes to, all S inside:

* entering, its own tokens are projected while the others' arrive; backward starts the sum of the input's gradient over the ranks first
  and computes the weights' gradients meanwhile;
* leaving, the others' tokens are projected first and travel while its own are projected; backward computes the gradient of its own
  tokens while the others' arrive.

Without sequence parallelism entering transfers nothing forward, and backward is the same. A GPU runs two things at once only where the
transfer begins first: start the program with CUDA_DEVICE_MAX_CONNECTIONS=1 (the launcher does).

Shapes: s tokens here, S = s * P of all ranks, b batch, h hidden, n columns of a weight here; m = S * b.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


class EnterAndProject(torch.autograd.Function):
    """(x (s, b, h), group, sequence parallel?, weights (n, h)...) -> x of all tokens (S, b, h) and its products (S, b, n)..."""

    @staticmethod
    def forward(ctx: Any, x_sbh: Tensor, group: dist.ProcessGroup, sequence: bool, *weights: Tensor) -> tuple[Tensor, ...]:
        ctx.group, ctx.sequence = group, sequence
        ctx.set_materialize_grads(False)
        if sequence:
            whole_sbh, products = _gather_and_multiply(x_sbh, [weight.t() for weight in weights], group)
        else:
            whole_sbh = x_sbh.view_as(x_sbh)
            products = [F.linear(whole_sbh, weight) for weight in weights]
        ctx.save_for_backward(whole_sbh, *weights)
        return whole_sbh, *products

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_whole_sbh: Tensor | None, *d_products: Tensor | None) -> tuple[Tensor | None, ...]:
        whole_sbh, *weights = ctx.saved_tensors
        whole_mh, size = whole_sbh.flatten(0, 1), ctx.group.size()
        pairs = [(None if d is None else d.reshape(len(whole_mh), -1), weight) for d, weight in zip(d_products, weights, strict=True)]
        sum_mh = None if d_whole_sbh is None else d_whole_sbh.reshape(whole_mh.shape).clone()
        for d_mn, weight in pairs:
            if d_mn is not None:
                sum_mh = d_mn @ weight if sum_mh is None else sum_mh.addmm_(d_mn, weight)
        own_h = sum_mh
        if ctx.sequence:
            own_h = sum_mh.new_empty(len(sum_mh) // size, sum_mh.shape[1])
            under_way = dist.reduce_scatter_tensor(own_h, sum_mh, group=ctx.group, async_op=True)
        else:
            under_way = dist.all_reduce(sum_mh, group=ctx.group, async_op=True)
        gradients = [None if d_mn is None else d_mn.t() @ whole_mh for d_mn, _ in pairs]
        under_way.wait()
        return own_h.view(-1, *whole_sbh.shape[1:]), None, None, *gradients


class ProjectAndLeave(torch.autograd.Function):
    """(x (S, b, n), weight (h, n), group) -> the sum over ranks of x Wᵀ, of this rank's tokens (s, b, h)."""

    @staticmethod
    def forward(ctx: Any, x_sbn: Tensor, weight_hn: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        x_mn = x_sbn.flatten(0, 1)
        ctx.save_for_backward(x_mn, weight_hn)
        rank, size = group.rank(), group.size()
        pieces = x_mn.chunk(size)
        others = [other for other in range(size) if other != rank]
        away = {other: pieces[other] @ weight_hn.t() for other in others}
        back = {other: torch.empty_like(away[other]) for other in others}
        peers = dist.get_process_group_ranks(group)
        operations = [dist.P2POp(dist.isend, away[other], peers[other], group) for other in others]
        operations += [dist.P2POp(dist.irecv, back[other], peers[other], group) for other in others]
        under_way = dist.batch_isend_irecv(operations)
        own = pieces[rank] @ weight_hn.t()
        for work in under_way:
            work.wait()
        own = own.add_(back[others[0]]) if size == 2 else torch.stack([own, *back.values()]).sum(0)  # rounded once
        return own.view(-1, x_sbn.shape[1], len(weight_hn))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_sbh: Tensor) -> tuple[Tensor, Tensor, None]:
        x_mn, weight_hn = ctx.saved_tensors
        whole_sbh, (dx_sbn,) = _gather_and_multiply(d_sbh, [weight_hn], ctx.group)
        return dx_sbn, whole_sbh.flatten(0, 1).t() @ x_mn, None


def _gather_and_multiply(x_sbh: Tensor, factors: list[Tensor], group: dist.ProcessGroup) -> tuple[Tensor, list[Tensor]]:
    """All ranks' x (S, b, h), and its products with the factors (h, n): (S, b, n). This rank's tokens first, then what arrived."""
    x_sbh, size = x_sbh.contiguous(), group.size()
    whole_sbh = x_sbh.new_empty(len(x_sbh) * size, *x_sbh.shape[1:])
    under_way = dist.all_gather_into_tensor(whole_sbh, x_sbh, group=group, async_op=True)
    whole_mh, own = whole_sbh.flatten(0, 1), x_sbh.flatten(0, 1)
    begin, end = group.rank() * len(own), (group.rank() + 1) * len(own)
    products = [x_sbh.new_empty(len(whole_mh), factor.shape[1]) for factor in factors]
    for product, factor in zip(products, factors, strict=True):
        torch.mm(own, factor, out=product[begin:end])
    under_way.wait()
    for there in (slice(0, begin), slice(end, None)):
        if len(whole_mh[there]):
            for product, factor in zip(products, factors, strict=True):
                torch.mm(whole_mh[there], factor, out=product[there])
    return whole_sbh, [product.view(*whole_sbh.shape[:2], -1) for product in products]
