"""Bounds of packed documents are computed once for all layers of a pass, and anew when the boundaries change."""

import gc

import torch

from swax_megatron.kernels import documents
from swax_megatron.kernels.documents import document_bounds


def test_kept_while_nothing_changes():
    cu_seqlens = torch.tensor([0, 3, 3, 8, 16], dtype=torch.int32)
    start, end = document_bounds(cu_seqlens, 2, 8)
    assert start.tolist() == [[0, 0, 0, 3, 3, 3, 3, 3], [0] * 8] and end.tolist() == [[3, 3, 3, 8, 8, 8, 8, 8], [8] * 8]
    assert document_bounds(cu_seqlens, 2, 8)[0] is start
    assert document_bounds(cu_seqlens.clone(), 2, 8)[0] is not start


def test_a_change_in_place_and_another_shape_are_seen():
    cu_seqlens = torch.tensor([0, 3, 8, 16], dtype=torch.int32)
    document_bounds(cu_seqlens, 2, 8)
    cu_seqlens[1] = 4
    assert document_bounds(cu_seqlens, 2, 8)[0].tolist() == [[0, 0, 0, 0, 4, 4, 4, 4], [0] * 8]
    assert document_bounds(cu_seqlens, 1, 16)[1].shape == (1, 16)


def test_inference_tensors_are_not_kept():
    with torch.inference_mode():
        made = torch.tensor([0, 4], dtype=torch.int32)
        assert document_bounds(made, 1, 4)[0] is not document_bounds(made, 1, 4)[0]
    assert not document_bounds(torch.tensor([0, 4], dtype=torch.int32), 1, 4)[0].is_inference()


def test_forgotten_with_the_boundaries():
    gc.collect()
    before = len(documents._bounds)
    cu_seqlens = torch.tensor([0, 4], dtype=torch.int32)
    document_bounds(cu_seqlens, 1, 4)
    assert len(documents._bounds) == before + 1
    del cu_seqlens
    gc.collect()
    assert len(documents._bounds) == before
