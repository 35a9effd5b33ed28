"""Ranges of positions in a document, each twice as long as what lies before it."""

from __future__ import annotations

FIRST_RANGE = 64  # tokens; every further range of positions ends at twice its beginning


def position_edges(length: int) -> list[int]:
    """0, 64, 128, 256, ..., length: ranges [edge, next edge) of the position of the token that predicts, as it stands in its document."""
    edges = [0]
    while (edges[-1] * 2 or FIRST_RANGE) < length:
        edges.append(edges[-1] * 2 or FIRST_RANGE)
    return [*edges, length]
