"""The exchanges of context parallelism, layer by layer in float64: outputs and all gradients of pieces against whole rows.

Legend: b batch, t time, h heads, g key/value heads, k = d_qk, v = d_v, d head size.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from tests.workers import Workers

PIECE, EOS = 11, 2
# where documents begin in the two rows of a batch, beside the row's start; pieces begin at 11, 22 and 33
DOCUMENTS: dict[str, tuple[list[int], list[int]]] = {
    "one document a row": ([], []),
    "exactly at the seams": ([11, 22, 33], [22]),
    "one off the seams": ([10, 12, 21, 23, 32, 34], [12, 21, 43]),
    "across three pieces": ([9, 31], [3, 30]),
    "many tiny ones": (list(range(1, 44)), list(range(2, 44, 2))),
    "one row whole, one tiny": ([], list(range(3, 44, 3))),
}
GATES = {  # (input, forget): mean of the raw gates
    "initial": (-10.0, 4.5),
    "mixed": (0.0, 2.0),
    "huge memory": (40.0, 40.0),
    "everything kept, little stored": (-40.0, 40.0),
    "everything forgotten": (5.0, -40.0),
}


@contextlib.contextmanager
def ranks_of(size: int) -> Iterator[Any]:
    """The first processes of the pool as the ranks that share rows; None on the others."""
    from swax_megatron.parallel.context_exchange.ranks import ContextRanks

    if not dist.is_initialized():
        dist.init_process_group("gloo")
    group = dist.new_group(list(range(size)))
    yield ContextRanks(group) if dist.get_rank() < size else None
    dist.barrier()
    dist.destroy_process_group(group)


def packed(size: int, documents: tuple[list[int], list[int]]) -> Any:
    """A batch of two whole rows with documents at the given places."""
    from swax_megatron.data.packing import pack

    ids = torch.full((2, PIECE * size + 1), 5)
    for row, starts in enumerate(documents):
        ids[row, [start - 1 for start in starts if start <= PIECE * size]] = EOS
    return pack(ids, None, EOS)


def compare(ranks: Any, inputs: list[Tensor], whole: Callable[..., Tensor], piece: Callable[..., Tensor]) -> float:
    """The largest error of this rank's outputs and gradients, relative to the largest value of each."""
    inputs = [x.requires_grad_() for x in inputs]
    expected = whole(*inputs)
    cotangent = torch.randn(expected.shape, dtype=expected.dtype, generator=torch.Generator().manual_seed(3))
    here = slice(ranks.rank * PIECE, (ranks.rank + 1) * PIECE)
    own = [x.detach()[:, here].requires_grad_() for x in inputs]
    found = piece(*own)
    pairs = [(found, expected[:, here])]
    expected_gradients = torch.autograd.grad(expected, inputs, cotangent)
    found_gradients = torch.autograd.grad(found, own, cotangent[:, here])
    pairs += [(a, b[:, here]) for a, b in zip(found_gradients, expected_gradients, strict=True)]
    scales = [expected, *expected_gradients]
    assert all(torch.isfinite(a).all() for a, _ in pairs)
    return max(((a - b).abs().max() / scale.abs().max().clamp(min=1e-30)).item() for (a, b), scale in zip(pairs, scales, strict=True))


def memory_errors(ranks: Any, batch: Any, context: Any) -> dict[str, float]:
    from swax_megatron.kernels.mlstm import mlstm
    from swax_megatron.kernels.mlstm.summary import mlstm_summary
    from swax_megatron.parallel.context_exchange.memory import incoming_memory

    def whole(*inputs: Tensor) -> Tensor:
        return mlstm(*inputs, cu_seqlens=batch.cu_seqlens, chunk_size=8)

    def piece(*inputs: Tensor) -> Tensor:
        memory = incoming_memory(mlstm_summary(*inputs[1:], context.last_start_b), context.continues_b, ranks)
        return mlstm(*inputs, cu_seqlens=context.cu_seqlens, initial_state=memory, chunk_size=8)

    errors = {}
    for gates, (mean_i, mean_f) in GATES.items():
        random = torch.Generator().manual_seed(1)
        shape = (2, PIECE * ranks.size, 3)
        inputs = [torch.randn(*shape, d, dtype=torch.float64, generator=random) for d in (4, 4, 6)]
        inputs += [torch.randn(*shape, dtype=torch.float64, generator=random) + mean for mean in (mean_i, mean_f)]
        errors[f"gates: {gates}"] = compare(ranks, inputs, whole, piece)
    return errors


def halo_errors(ranks: Any, batch: Any, context: Any) -> dict[str, float]:
    from swax_megatron.kernels.swa import swa
    from swax_megatron.parallel.context_exchange.halo import with_past

    errors = {}
    for window in (1, 2, PIECE, PIECE + 1, PIECE + 2, 2 * PIECE + 5, PIECE * ranks.size):

        def whole(*inputs: Tensor, window: int = window) -> Tensor:
            return swa(*inputs, window, cu_seqlens=batch.cu_seqlens)

        def piece(q: Tensor, k: Tensor, v: Tensor, window: int = window) -> Tensor:
            k, v = with_past(k, v, window - 1, ranks)
            return swa(q, k, v, window, cu_seqlens=context.piece.boundaries(k.shape[1] - PIECE))

        random = torch.Generator().manual_seed(1)
        inputs = [torch.randn(2, PIECE * ranks.size, heads, 4, dtype=torch.float64, generator=random) for heads in (4, 2, 2)]
        errors[f"window {window}"] = compare(ranks, inputs, whole, piece)
    return errors


def all_errors(size: int) -> dict[str, float]:
    from swax_megatron.parallel.context import cut_rows, sequence_context

    errors = {}
    with ranks_of(size) as ranks:
        for documents, starts in DOCUMENTS.items() if ranks else ():
            batch = packed(size, starts)
            context = sequence_context(cut_rows(batch, ranks), (), ranks)
            for layer in (memory_errors, halo_errors):
                errors |= {f"{documents}, {case}": error for case, error in layer(ranks, batch, context).items()}
    return errors


@pytest.mark.parametrize("size", [2, 3, 4])
def test_pieces_equal_whole_rows(size: int, workers: Callable[[int], Workers]) -> None:
    """Two to four pieces: a power of two or not, documents at every kind of place, windows from one key to the whole row."""
    for rank, errors in enumerate(workers(4).run(all_errors, size)):
        assert len(errors) == (len(DOCUMENTS) * (len(GATES) + 7) if rank < size else 0)
        for case, error in errors.items():
            assert error < 1e-11, f"rank {rank} of {size}, {case}: {error:.1e}"


def bytes_sent(size: int, piece: int) -> dict[str, int]:
    """What this rank sends in a forward and backward pass of each layer kind, batch of one row, fp32."""
    from swax_megatron.kernels.mlstm.summary import mlstm_summary
    from swax_megatron.parallel.context_exchange.halo import with_past
    from swax_megatron.parallel.context_exchange.memory import incoming_memory

    sent = {}
    with ranks_of(size) as ranks:
        for name, window in (("S", 9), ("F", piece * size)):
            ranks.bytes_sent.clear()
            k, v = (torch.ones(1, piece, 2, 4, requires_grad=True) for _ in range(2))
            sum(x.sum() for x in with_past(k, v, window - 1, ranks)).backward()
            sent[name] = ranks.bytes_sent.total()
        ranks.bytes_sent.clear()
        k, v, i, f = (torch.ones(1, piece, 3, *d, requires_grad=True) for d in ((4,), (6,), (), ()))
        start = torch.tensor([-ranks.rank * piece])
        memory = incoming_memory(mlstm_summary(k, v, i, f, start), start < 0, ranks)
        (memory.c_bhkv.sum() + memory.n_bhk.sum()).backward()
        sent["M"] = ranks.bytes_sent.total()
    return sent


def test_bytes_do_not_depend_on_the_length_of_the_row(workers: Callable[[int], Workers]) -> None:
    """M and S layers send the same for rows of 44 and of 176 tokens, and no more than the page says; an F layer sends its piece."""
    short, long = (workers(4).run(bytes_sent, 4, piece) for piece in (PIECE, 4 * PIECE))
    halo, memory, stabilisers = 8 * 2 * 2 * 4 * 4, 3 * 4 * (6 + 1) * 4, 2 * 3 * 4
    rounds = [2, 3, 3, 2]  # log2(4) forward for rank 0 and backward for rank 3; the inner ranks send in some rounds of both
    for rank, (few, many) in enumerate(zip(short, long, strict=True)):
        assert few["M"] == many["M"] and few["S"] == many["S"]
        assert few["S"] == (halo if rank in (0, 3) else 2 * halo)
        assert few["M"] == rounds[rank] * memory + 3 * stabilisers
        assert many["F"] > 3.9 * few["F"] > 0


def test_groups_are_neighbouring_data_parallel_ranks() -> None:
    """Every rank is in one group; groups run along Megatron's data-parallel order (tensor fastest, then data, then pipeline)."""
    from swax_megatron.parallel.groups import context_layout

    assert context_layout(16, 2, 2, 2) == [[0, 2], [1, 3], [4, 6], [5, 7], [8, 10], [9, 11], [12, 14], [13, 15]]
    for world, tensor, pipeline, context in ((1024, 8, 4, 8), (96, 2, 3, 4), (6, 1, 1, 3)):
        groups = context_layout(world, tensor, pipeline, context)
        assert sorted(rank for group in groups for rank in group) == list(range(world))
        assert all(len(group) == context and len({b - a for a, b in zip(group, group[1:], strict=False)}) == 1 for group in groups)
