"""Whether a Hugging Face folder and a data set speak the same token ids."""

from __future__ import annotations

from pathlib import Path

import sentencepiece
from tokenizers import Tokenizer

from swax_megatron.data.shards import fingerprint
from swax_megatron.hf.tokenizer import HARD_STRINGS, check_same_ids, read_proto
from swax_megatron.schema import Config

_SHOWN = 5


def refuse_other_tokenizer(folder: Path, config: Config) -> None:
    """ValueError that names the differing pieces where the model's tokenizer is not the training data's."""
    ours = Path(config.data.tokenizer or Path(config.data.train[0].path) / "tokenizer.model")
    if not ours.is_file():
        raise ValueError(f"{ours}, the tokenizer of the training data, is no file: name it with data.tokenizer")
    if (folder / "tokenizer.model").is_file() and fingerprint(folder / "tokenizer.model") == fingerprint(ours):
        return
    proto = read_proto(ours)
    wanted = {piece.piece: index for index, piece in enumerate(proto.pieces)}
    if (folder / "tokenizer.json").is_file():
        try:
            theirs = Tokenizer.from_file(str(folder / "tokenizer.json"))
        except Exception as error:  # the library raises bare Exceptions
            raise ValueError(f"{folder / 'tokenizer.json'} cannot be read: {error}") from error
        found = theirs.get_vocab()
    elif (folder / "tokenizer.model").is_file():
        theirs = None
        found = {piece.piece: index for index, piece in enumerate(read_proto(folder / "tokenizer.model").pieces)}
    else:
        raise ValueError(f"{folder} holds no tokenizer.json or tokenizer.model to compare with {ours}: add it, or --no-tokenizer-check")
    different = [
        f"{piece!r} is {found.get(piece, 'absent')} in the model, {wanted.get(piece, 'absent')} in the data"
        for piece in dict.fromkeys([*wanted, *found])
        if found.get(piece) != wanted.get(piece)
    ]
    if different:
        more = f" and {len(different) - _SHOWN} more" if len(different) > _SHOWN else ""
        raise ValueError(f"the model's tokenizer is not that of the training data, {ours}: {'; '.join(different[:_SHOWN])}{more}")
    if theirs is not None:
        theirs.encode_special_tokens = True
        processor = sentencepiece.SentencePieceProcessor(model_proto=proto.SerializeToString())
        try:
            check_same_ids(processor, theirs, HARD_STRINGS)
        except ValueError as error:
            raise ValueError(f"the model's tokenizer has the pieces of {ours} but splits text in another way: {error}") from error
