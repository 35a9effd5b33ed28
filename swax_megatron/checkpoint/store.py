"""Checkpoints: a folder of safetensors files and one JSON manifest, written at one layout and read at any other.

>>> path = save(root, step, fragments, config=to_dict(config), state={"tokens_seen": 123})     # every rank
>>> checkpoint = open_checkpoint(latest(root))
>>> checkpoint.read_into(my_fragments)                                                          # this rank's blocks, in place

See docs/checkpoints.md for the format and its guarantees.
"""

from swax_megatron.checkpoint.boxes import Box, flat_range_boxes
from swax_megatron.checkpoint.deferred import Deferred
from swax_megatron.checkpoint.folder import discard_after, latest, list_checkpoints, prune
from swax_megatron.checkpoint.reader import Checkpoint, open_checkpoint
from swax_megatron.checkpoint.writer import FORMAT_VERSION, Fragment, save

__all__ = [
    "FORMAT_VERSION",
    "Box",
    "Checkpoint",
    "Deferred",
    "Fragment",
    "discard_after",
    "flat_range_boxes",
    "latest",
    "list_checkpoints",
    "open_checkpoint",
    "prune",
    "save",
]
