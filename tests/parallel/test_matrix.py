"""The rules behind the matrix: every combination is run or refused with a reason, and the documentation says the same."""

from __future__ import annotations

from pathlib import Path

from tests.parallel import matrix

PAGE = Path(__file__).parents[2] / "docs" / "parallelism.md"


def test_a_combination_is_supported_or_refused_with_a_way_out() -> None:
    """All layouts of at most eight processes; a refusal names a field with its value and what to do instead."""
    layouts = {each[:5]: matrix._layout_refusal(each[:5]) for each in matrix.combinations() if each.processes <= matrix.PROCESSES}
    refused = [message for message in layouts.values() if message is not None]
    assert len(refused) > 100 and len(layouts) - len(refused) > 500
    for message in refused:
        field, _, rest = message.partition(": ")
        assert "=" in field and field.partition(".")[0] in ("optimizer", "parallel", "train"), message
        assert any(word in rest for word in ("use ", "set ", "e.g.")), message


def test_recomputation_precision_and_tied_embeddings_go_with_every_layout() -> None:
    for each in matrix.combinations()[::97]:
        assert (matrix.refusal(each) is None) == (matrix._layout_refusal(each[:5]) is None), each


def test_the_sample_and_the_matrix_hold_what_they_promise() -> None:
    sample = matrix.sample()
    for axis, values in enumerate(matrix.AXES):
        assert {each[axis] for each in sample} == set(values)
    assert all(2 <= each.processes <= 4 for each in sample)
    supported = matrix.supported()
    chosen = matrix.matrix()
    for axes in [*matrix.PAIRS, *matrix.LAYOUTS]:
        assert {tuple(each[axis] for axis in axes) for each in chosen} == {tuple(each[axis] for axis in axes) for each in supported}
    assert set(chosen) <= set(supported)


def test_the_page_has_the_table_of_the_rules() -> None:
    assert "\n".join(matrix.table()) in PAGE.read_text(encoding="utf-8")
