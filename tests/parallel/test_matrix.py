"""The rules behind the matrix: every combination is run or refused with a reason, and the documentation says the same."""

from __future__ import annotations

from pathlib import Path

from tests.parallel import matrix

PAGE = Path(__file__).parents[2] / "docs" / "parallelism.md"


def test_a_combination_is_supported_or_refused_with_a_way_out() -> None:
    """All layouts, of any number of processes; a refusal names a field with its value and what to do instead."""
    layouts = {each.layout: matrix.layout_refusal(each.layout) for each in matrix.combinations()}
    refused = [message for message in layouts.values() if message is not None]
    assert len(layouts) == 5760 and len(refused) == 2520
    for message in refused:
        assert "train.global_batch_size" not in message and "multiple" not in message and "divisible" not in message, (
            f"refused by the arithmetic of rows or batches, which matrix.py has to fit: {message}"
        )
        field, _, rest = message.partition(": ")
        assert "=" in field and field.partition(".")[0] in ("optimizer", "parallel", "train"), message
        assert any(word in rest for word in ("use ", "set ", "e.g.")), message


def test_recomputation_precision_and_tied_embeddings_go_with_every_layout() -> None:
    for each in matrix.combinations()[::97]:
        assert (matrix.refusal(each) is None) == (matrix.layout_refusal(each.layout) is None), each


def test_the_sample_and_the_matrix_hold_what_they_promise() -> None:
    sample = matrix.sample()
    for axis, values in enumerate(matrix.AXES):
        assert {each[axis] for each in sample} == set(values)
    assert all(2 <= each.processes <= 4 for each in sample)
    supported = matrix.supported()
    chosen = matrix.matrix()
    for axes in [*matrix.PAIRS, *matrix.LAYOUTS]:
        assert {tuple(each[axis] for axis in axes) for each in chosen} == {tuple(each[axis] for axis in axes) for each in supported}
    assert set(chosen) <= set(supported) and max(each.processes for each in chosen) == matrix.PROCESSES
    assert len(chosen) < 230, "make test-matrix takes too long"


def test_the_page_has_the_table_of_the_rules() -> None:
    assert "\n".join(matrix.table()) in PAGE.read_text(encoding="utf-8")
