"""Cutting a document so that only the words around literal special-token text need the slower encoder, and no id changes."""

from __future__ import annotations

import re

from sentencepiece import sentencepiece_model_pb2

SPACE = "\u2581"  # what a space is in a SentencePiece model
# a place before a space that has another character before it and any character after it
_PLACE = re.compile(rb"(?<=[^ ])(?<!\xe2\x96\x81) (?!\Z)")


class Cutter:
    """Cuts documents for a BPE model that ``inexact`` finds nothing against.

    BPE only ever merges neighbours to a piece of the vocabulary. Where no piece holds a space after another character, none
    reaches over a place before a space, so both sides are encoded as if alone. A model that puts a space before every text
    (``add_dummy_prefix``) gives the right side the one back that it loses.

    special: finds the text that must not be left in a plain part
    possible: whether the model allows cuts
    """

    def __init__(self, proto: sentencepiece_model_pb2.ModelProto) -> None:
        kind = proto.SentencePiece
        names = [piece.piece.encode() for piece in proto.pieces if piece.type in (kind.CONTROL, kind.UNKNOWN)]
        self.special = re.compile(b"|".join([*map(re.escape, names), rb"<0x[0-9A-F]{2}>"]))
        self._lost = 1 if proto.normalizer_spec.add_dummy_prefix else 0
        normal = (piece.piece for piece in proto.pieces if piece.type == kind.NORMAL)
        over_space = re.compile(f"[^{SPACE}]{SPACE}").search
        self.possible = not any(b" " in name for name in names) and not any(map(over_space, normal))

    def cut(self, text: bytes) -> list[tuple[bytes, bool]]:
        """The parts of a document, in order, and whether each holds special text. Their ids, one after another, are the document's."""
        if not self.possible:
            return [(text, self.special.search(text) is not None)]
        parts, end = [], 0
        for match in self.special.finditer(text):
            if match.start() < end:
                continue  # as a match holds no space, it ends before that part's end too
            begin = self._before(text, match.start(), end)
            if begin > end:
                parts.append((self._part(text, end, begin), False))
            after = _PLACE.search(text, match.end())
            end = after.start() if after else len(text)
            parts.append((self._part(text, begin, end), True))
        if end < len(text):
            parts.append((self._part(text, end, len(text)), False))
        return parts

    def _before(self, text: bytes, stop: int, start: int) -> int:
        """The last place in (start, stop), or ``start``."""
        place = text.rfind(b" ", start + 1, stop)
        while place > start and not _PLACE.match(text, place):
            place = text.rfind(b" ", start + 1, place)
        return max(place, start)

    def _part(self, text: bytes, start: int, stop: int) -> bytes:
        return text[start + self._lost if start else 0 : stop]
