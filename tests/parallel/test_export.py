"""From a distributed run to transformers and back into a run: logits, greedy text and losses are the training model's."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from data_prep import shard, tokenizer
from swax_megatron.hf import export, import_
from tests import runs
from tests.parallel.export_tasks import resumed_logits, train_and_save, wrong_initial_values
from tests.workers import Workers

ROOT = Path(__file__).parents[2]
VOCABULARY, LENGTH, WINDOW, NEW = 700, 288, 9, 256


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


def configuration(text_data: Path, run_dir: Path, parallel: dict[str, Any], model: dict[str, Any]) -> dict[str, Any]:
    return runs.small_config(
        text_data,
        run_dir,
        parallel=parallel,
        model={**model, "vocab_size": VOCABULARY},
        window={"windows": [5, WINDOW]},
        data={
            "train": [{"path": str(text_data / "train")}],
            "validation": [{"path": str(text_data / "validation")}],
            "sequence_length": LENGTH,
        },
        train={"steps": 6},
        optimizer={"learning_rate": 2e-2},
        checkpoint={"interval": 6},
    )


def exported_text(folder: Path, text: str) -> tuple[Any, torch.Tensor]:
    """The exported model in transformers, and the ids of its greedy continuation of a text, NEW tokens long."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
    ids = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)(text, return_tensors="pt")["input_ids"]
    settings = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None, "pad_token_id": 2}
    return model, model.generate(ids[:, : LENGTH - NEW], **settings)


@pytest.mark.parametrize(
    ("size", "parallel", "model"),
    [
        (4, {"tensor": 2, "pipeline": 2}, {"pattern": "(MS)x2"}),
        (2, {"context": 2}, {"pattern": "(MS)x2F"}),
        (1, {}, {"pattern": "(MS)x2F", "rope_kinds": "S", "tie_embeddings": True, "logit_cap": None}),
    ],
    ids=["TP2-PP2-ZeRO1", "CP2", "one process"],
)
def test_export_equals_the_training_model(
    size: int, parallel: dict, model: dict, text_data: Path, tmp_path: Path, workers: Callable[[int], Workers]
) -> None:
    """Logits within 1e-4 of the training forward pass, and the same 256 greedy tokens.

    The training model cannot generate; but where it finds, after every prefix of the exported model's text, the same next
    token, it would have written the same text.
    """
    raw = configuration(text_data, tmp_path / "run", parallel, model)
    workers(size).run(train_and_save, raw)
    assert export.main(["--checkpoint", str(tmp_path / "run"), "--out", str(tmp_path / "export"), "--dtype", "fp32"]) == 0
    exported, text = exported_text(tmp_path / "export", "def test_something(self):\n    assert 1 == 1 and some.thing(else) or nothing")
    assert exported.config.sliding_window == WINDOW
    tokens = torch.cat((text, torch.randint(3, VOCABULARY, text.shape, generator=torch.Generator().manual_seed(3))))
    answers = workers(size).run(resumed_logits, raw, tokens.tolist())
    expected = torch.tensor(next(answer for answer in answers if answer is not None))
    with torch.no_grad():
        difference = (exported(tokens).logits - expected).abs().max().item()
    prompt = text.shape[1] - NEW
    chosen, second = expected[0, prompt - 1 : -1].topk(2, dim=-1).values.unbind(-1)
    print(f"largest difference of logits {difference:.1e}, least margin of a greedy choice {(chosen - second).min().item():.1e}")
    assert difference <= 1e-4
    assert torch.equal(expected[0, prompt - 1 : -1].argmax(-1), text[0, prompt:])


def test_an_import_is_resumed_by_the_launcher_at_any_layout(text_data: Path, tmp_path: Path, workers: Callable[[int], Workers]) -> None:
    """Train, export, import; the launcher continues with two tensor-parallel processes, the same losses come from one process."""
    model = {"pattern": "(MS)x2"}
    raw = configuration(text_data, tmp_path / "run", {}, model)
    trained = workers(1).run(runs.train, raw)[0]["loss/train"]
    assert export.main(["--checkpoint", str(tmp_path / "run"), "--out", str(tmp_path / "export")]) == 0
    for name in ("alone", "wide"):
        raw = configuration(text_data, tmp_path / name, {}, {})
        raw |= {"train": {**raw["train"], "steps": 3, "data_seed": 5}, "checkpoint": {"interval": 3}}
        del raw["model"]
        (tmp_path / f"{name}.json").write_text(json.dumps(raw))  # JSON is YAML
        assert import_.main(["--model", str(tmp_path / "export"), "--config", str(tmp_path / f"{name}.json")]) == 0
    raw = yaml.safe_load((tmp_path / "alone" / "config.yaml").read_text())
    alone = workers(1).run(runs.train, raw)[0]
    assert alone["first_step"] == [0.0]
    command = [sys.executable, "-m", "launcher.run", str(tmp_path / "wide" / "config.yaml"), "parallel.tensor=2", "parallel.sequence=true"]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "resumed from" in done.stderr + done.stdout
    assert (tmp_path / "wide" / "checkpoints" / "step_3" / "COMPLETE").exists()
    lines = [json.loads(line) for line in (tmp_path / "wide" / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss/train"] for line in lines if "loss/train" in line]
    assert losses == pytest.approx(alone["loss/train"], abs=2e-4) and len(losses) == 3
    assert losses[0] < trained[0] - 0.3  # where the first run ended, not where it began


def test_an_import_starts_parameters_as_a_fresh_run_does(text_data: Path, tmp_path: Path, workers: Callable[[int], Workers]) -> None:
    raw = configuration(text_data, tmp_path / "run", {}, {"pattern": "MSF"})
    assert workers(1).run(wrong_initial_values, raw) == [[]]
