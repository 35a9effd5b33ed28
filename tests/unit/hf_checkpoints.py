"""Training checkpoints with random weights, made without a training model, and data sets for them."""

from __future__ import annotations

from pathlib import Path

import torch

from swax_megatron.checkpoint.store import Fragment, save
from swax_megatron.config import from_dict, to_dict
from swax_megatron.hf.modeling_swax import SwaxForCausalLM
from swax_megatron.hf.names import hf_names
from swax_megatron.hf.targets import swax_config
from swax_megatron.model.pattern import parse_pattern
from tests.texts import run_shard, texts, write_jsonl
from tests.unit.hf_reference import randomise

VOCABULARY = 400  # of tests.texts.small_tokenizer; padded to 512
PADDED = 512


def raw_config(pattern: str = "MSF", **sections) -> dict:
    raw = {
        "model": {
            "pattern": pattern,
            "hidden_size": 32,
            "ffn_hidden_size": 48,
            "vocab_size": VOCABULARY,
            "attention_heads": 4,
            "attention_kv_heads": 2,
            "mlstm_heads": 2,
            "rope_kinds": "S",
        },
        "window": {"windows": [4, 9], "test_window": 6},
        "data": {"sequence_length": 64},
        "train": {"precision": "fp32", "steps": 10},
    }
    for name, fields in sections.items():
        raw[name] = {**raw.get(name, {}), **fields}
    return raw


def random_weights(raw: dict) -> dict[str, torch.Tensor]:
    """Random fp32 tensors under their training names, vocabulary padded with what must never be exported."""
    config = from_dict(raw)
    torch.manual_seed(3)
    model = SwaxForCausalLM(swax_config(config, bos=1, eos=2))
    randomise(model)
    state = model.state_dict()
    names = hf_names(parse_pattern(config.model.pattern), tied=config.model.tie_embeddings)
    weights = {training: state[name] for training, name in names.items()}
    for name in ("embedding.word_embeddings.weight", "output_layer.weight"):
        if name in weights:
            weights[name] = torch.cat((weights[name], torch.full((PADDED - VOCABULARY, config.model.hidden_size), 1e6)))
    return weights


def checkpoint_of(root: Path, raw: dict, weights: dict[str, torch.Tensor], step: int = 7) -> Path:
    fragments = []
    for name, tensor in weights.items():
        for prefix in ("param", "exp_avg"):
            fragments.append(Fragment(f"{prefix}.{name}", tuple(tensor.shape), (0,) * tensor.dim(), tensor))
    return save(root, step, fragments, config=to_dict(from_dict(raw)), state={"tokens_seen": 4242})


def write_data(folder: Path, tokenizer: Path) -> Path:
    out = folder / "data"
    assert run_shard(write_jsonl(folder / "text.jsonl", texts(40)), tokenizer, out) == 0
    return out


