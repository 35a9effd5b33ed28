"""The example tasks of configs/lm_eval on an export with the real lm-eval-harness, offline."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from swax_megatron.checkpoint.store import open_checkpoint
from swax_megatron.hf.export import export_model
from swax_megatron.hf.modeling_swax import SwaxForCausalLM
from tests.texts import small_tokenizer
from tests.unit.hf_checkpoints import checkpoint_of, random_weights, raw_config

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="lm_eval is not installed (pip install '.[eval]')")


@pytest.fixture(scope="module")
def answers(tmp_path_factory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("lm_eval")
    raw = raw_config("MSM")
    checkpoint = open_checkpoint(checkpoint_of(folder / "run", raw, random_weights(raw)))
    out = export_model(checkpoint, folder / "export", dtype="fp32", tokenizer=small_tokenizer(folder))
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(folder / "hf"), "TOKENIZERS_PARALLELISM": "false"}
    command = [sys.executable, str(Path(__file__).with_name("hf_lm_eval.py")), str(out), "configs/lm_eval"]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, **offline}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return out, json.loads(done.stdout.splitlines()[-1])


def numbers(value: Any) -> list[float]:
    """The numbers in nested lists of loglikelihood answers, ["-1.5", "False"] pairs included."""
    if isinstance(value, list):
        return [number for each in value for number in numbers(each)]
    return [float(value)] if str(value) not in ("True", "False") else [float(str(value) == "True")]


@pytest.mark.parametrize("task", ["swax_cloze", "swax_perplexity"])
def test_padded_batches_give_the_same_likelihoods(task, answers):
    one, four = (answers[1][batch]["responses"][task] for batch in ("1", "4"))
    assert len(one) == {"swax_cloze": 5, "swax_perplexity": 3}[task]
    assert numbers(one) == pytest.approx(numbers(four), abs=1e-3) and len(set(numbers(one))) >= len(one)


def test_left_padded_prompts_give_the_same_text(answers):
    one, four = (answers[1][batch]["responses"]["swax_completion"] for batch in ("1", "4"))
    assert one == four and len({str(text) for text in one}) == 3


def test_the_metrics_are_there_and_finite(answers):
    for batch in ("1", "4"):
        metrics = answers[1][batch]["metrics"]
        assert 0 <= metrics["swax_cloze"]["acc,none"] <= 1
        assert math.isfinite(metrics["swax_perplexity"]["bits_per_byte,none"])
        assert 0 <= metrics["swax_completion"]["exact_match,none"] <= 1


def test_the_likelihood_is_the_model_s(answers):
    """The first choice of the first question, computed without the harness."""
    out, found = answers
    line = json.loads((ROOT / "configs" / "lm_eval" / "data" / "cloze.jsonl").read_text().splitlines()[0])
    tokenizer = AutoTokenizer.from_pretrained(out, trust_remote_code=True)
    model = SwaxForCausalLM.from_pretrained(out).eval()
    context = tokenizer(line["question"])["input_ids"]
    whole = tokenizer(line["question"] + " " + line["choices"][0])["input_ids"]
    assert whole[: len(context)] == context
    with torch.no_grad():
        scores = model(torch.tensor([whole])).logits[0].log_softmax(-1)
    want = sum(scores[i - 1, whole[i]].item() for i in range(len(context), len(whole)))
    assert numbers(found["1"]["responses"]["swax_cloze"][0])[0] == pytest.approx(want, abs=1e-3)
