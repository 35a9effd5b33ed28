"""Packing: targets, masks, positions and document boundaries of a batch."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from swax_megatron.data.packing import pack

E = 2


def batch(rows, mask=None, boundary="reset"):
    return pack(np.array(rows), None if mask is None else np.array(mask), E, boundary)


def test_two_documents_in_a_row():
    packed = batch([[5, 6, E, 7, 8, 9]])
    assert packed.inputs_bt.tolist() == [[5, 6, E, 7, 8]] and packed.targets_bt.tolist() == [[6, E, 7, 8, 9]]
    assert packed.loss_mask_bt.tolist() == [[1, 1, 0, 1, 1]]  # nothing predicts the first id of the next document
    assert packed.positions_bt.tolist() == [[0, 1, 2, 0, 1]]
    assert packed.cu_seqlens.tolist() == [0, 3, 5]
    kinds = [getattr(packed, name).dtype for name in ("inputs_bt", "targets_bt", "loss_mask_bt", "positions_bt", "cu_seqlens")]
    assert kinds == [torch.int64, torch.int64, torch.float32, torch.int64, torch.int32]


def test_carry_bounds_rows_only():
    packed = batch([[5, 6, E, 7, 8, 9], [E, 3, 4, E, E, 5]], boundary="carry")
    assert packed.cu_seqlens.tolist() == [0, 5, 10]
    assert packed.positions_bt.tolist() == [[0, 1, 2, 3, 4]] * 2
    assert packed.loss_mask_bt.tolist() == [[1, 1, 0, 1, 1], [0, 1, 1, 0, 0]]


@pytest.mark.parametrize(
    "row, boundaries, positions, loss",
    [
        ([5, 6, 7, 8, 9], [0, 4], [0, 1, 2, 3], [1, 1, 1, 1]),  # the middle of a document
        ([5, 6, 7, 8, E], [0, 4], [0, 1, 2, 3], [1, 1, 1, 1]),  # EOS as the last target counts
        ([5, 6, 7, E, 9], [0, 4], [0, 1, 2, 3], [1, 1, 1, 0]),  # EOS as the last input: the boundary is the row's end
        ([E, 5, 6, 7, 8], [0, 1, 4], [0, 0, 1, 2], [0, 1, 1, 1]),  # the row begins with the end of a document
        ([5, E, E, E, 6], [0, 2, 3, 4], [0, 1, 0, 0], [1, 0, 0, 0]),  # empty documents
        ([E, E, E, E, E], [0, 1, 2, 3, 4], [0, 0, 0, 0], [0, 0, 0, 0]),
    ],
)
def test_edges(row, boundaries, positions, loss):
    packed = batch([row])
    assert packed.cu_seqlens.tolist() == boundaries
    assert packed.positions_bt.tolist() == [positions]
    assert packed.loss_mask_bt.tolist() == [loss]


def test_rows_are_boundaries():
    packed = batch([[5, 6, 7], [8, E, 9], [E, 4, 4]])
    assert packed.cu_seqlens.tolist() == [0, 2, 4, 5, 6]
    assert packed.positions_bt.tolist() == [[0, 1], [0, 1], [0, 0]]


def test_masks_belong_to_targets():
    packed = batch([[5, 6, 7, E, 8]], [[0, 1, 0, 1, 1]])
    assert packed.loss_mask_bt.tolist() == [[1, 0, 1, 0]]
    padded = batch([[5, 6, E, E, E]], [[1, 1, 1, 0, 0]])  # padding
    assert padded.loss_mask_bt.tolist() == [[1, 1, 0, 0]]


def test_numpy_and_torch_agree_with_a_plain_loop():
    random = np.random.default_rng(0)
    ids, mask = random.integers(2, 6, (4, 33)), random.integers(0, 2, (4, 33)).astype(bool)
    packed, again = pack(ids, mask, E), pack(torch.tensor(ids, dtype=torch.int32), torch.tensor(mask), E)
    assert all(torch.equal(getattr(packed, name), getattr(again, name)) for name in vars(packed))
    boundaries, positions = [], np.zeros((4, 32), int)
    for b in range(4):
        for t in range(32):
            starts = t == 0 or ids[b, t - 1] == E
            boundaries += [b * 32 + t] if starts else []
            positions[b, t] = 0 if starts else positions[b, t - 1] + 1
            assert packed.loss_mask_bt[b, t] == (mask[b, t + 1] and ids[b, t] != E)
    assert packed.cu_seqlens.tolist() == [*boundaries, 128]
    assert packed.positions_bt.tolist() == positions.tolist()


def test_refusals():
    with pytest.raises(ValueError, match="document_boundary='drop'"):
        batch([[1, 3]], boundary="drop")
    with pytest.raises(ValueError, match=r"\(B, T \+ 1\)"):
        batch([1, 3])
    with pytest.raises(ValueError, match=r"\(B, T \+ 1\)"):
        batch([[1]])
    with pytest.raises(ValueError, match="must be equal"):
        batch([[1, 3, 4]], [[1, 1]])
