"""From a distributed run to transformers: the export's logits are the training model's, and its cache changes nothing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from data_prep import shard, tokenizer
from swax_megatron.hf import export
from tests import runs
from tests.workers import Workers

VOCABULARY, LENGTH, WINDOW = 700, 92, 9


@pytest.fixture(scope="module")
def text_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """This test suite's own source text, tokenised and sharded by the real programs."""
    folder = tmp_path_factory.mktemp("text")
    here = str(Path(__file__).parent.parent)
    source = ["--input", here, "--glob", "*.py"]
    model = str(folder / "tokenizer.model")
    assert tokenizer.main([*source, "--out", model, "--vocab-size", str(VOCABULARY)]) == 0
    options = ["--validation-fraction", "0.2", "--workers", "1"]
    assert shard.main([*source, "--tokenizer", model, "--out", str(folder / "data"), *options]) == 0
    return folder / "data"


def logits_and_checkpoint(raw: dict[str, Any], tokens: list[list[int]]) -> list[list[list[float]]]:
    """Train a little, save, and compute the training model's logits at the test window."""
    from swax_megatron.build import build_trainer
    from swax_megatron.data.packing import pack
    from swax_megatron.parallel.context import cut_rows, sequence_context

    with runs.layout(raw) as (config, groups):
        trainer, _ = build_trainer(config, groups)
        with torch.no_grad():  # open the gates: at their initial values the memory hardly speaks
            for chunk in trainer.backend.chunks:
                for name, parameter in chunk.named_parameters():
                    if name.endswith("igate_proj.bias"):
                        parameter.fill_(-1.0)
        for fragment in trainer.backend.fragments(saving=False):
            if fragment.key.endswith("igate_proj.bias") and fragment.key.startswith("param."):
                fragment.tensor.fill_(-1.0)
        trainer.fit()
        rows = torch.tensor(tokens)
        batch = cut_rows(pack(torch.cat([rows, rows[:, :1]], dim=1), None, -1), groups.context)
        context = sequence_context(batch, trainer.windows.expand(config.window.test_window), groups.context)
        with torch.no_grad():
            (chunk,) = trainer.backend.chunks
            logits_sbv = chunk.eval()(batch.inputs_bt, context)
        parts = [torch.empty_like(logits_sbv) for _ in range(groups.tensor_size)]
        dist.all_gather(parts, logits_sbv.contiguous(), group=groups.tensor)
        logits_btv = torch.cat(parts, dim=-1).transpose(0, 1)[..., : config.model.vocab_size].contiguous()
        pieces = list(groups.context.all_gather("logits", logits_btv)) if groups.context else [logits_btv]
        return torch.cat(pieces, dim=1).tolist()


@pytest.mark.parametrize(
    ("size", "parallel", "model"),
    [
        (2, {"tensor": 2}, {"pattern": "(MS)x2F"}),
        (2, {"context": 2}, {"pattern": "(MS)x2F"}),
        (1, {}, {"pattern": "(MS)x2F", "rope_kinds": "S", "tie_embeddings": True, "logit_cap": None}),
    ],
)
def test_export_equals_the_training_model(
    size: int, parallel: dict, model: dict, text_data: Path, tmp_path: Path, workers: Callable[[int], Workers]
) -> None:
    raw = runs.small_config(
        text_data,
        tmp_path / "run",
        parallel=parallel,
        model={**model, "vocab_size": VOCABULARY},
        window={"windows": [5, WINDOW]},
        data={"train": [{"path": str(text_data / "train")}], "validation": [{"path": str(text_data / "validation")}]},
        checkpoint={"interval": 4},
    )
    tokens = torch.randint(3, VOCABULARY, (3, LENGTH), generator=torch.Generator().manual_seed(3))
    expected = torch.tensor(workers(size).run(logits_and_checkpoint, raw, tokens.tolist())[0])
    assert export.main(["--checkpoint", str(tmp_path / "run"), "--out", str(tmp_path / "export"), "--dtype", "fp32"]) == 0

    from transformers import AutoModelForCausalLM, AutoTokenizer

    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "export", trust_remote_code=True).eval()
    assert exported.config.sliding_window == WINDOW
    with torch.no_grad():
        difference = (exported(tokens).logits - expected).abs().max().item()
    assert difference <= 1e-4, difference

    pieces = AutoTokenizer.from_pretrained(tmp_path / "export", trust_remote_code=True)
    encoded = pieces("def test_something(self):\n    assert", return_tensors="pt")
    settings = {"max_new_tokens": 40, "do_sample": False, "eos_token_id": None, "pad_token_id": 2}
    assert torch.equal(exported.generate(**encoded, **settings), exported.generate(**encoded, **settings, use_cache=False))
