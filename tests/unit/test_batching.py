"""Batch sizes that grow: sums over steps, the learning rate in tokens, what is refused."""

from __future__ import annotations

import copy
import math

import pytest

from swax_megatron.batching import batch_rows, rows_before
from swax_megatron.checkpoint.compatibility import check_resume
from swax_megatron.config import from_dict, to_dict
from swax_megatron.optim.schedules import learning_rate
from swax_megatron.validate import validate

RAMP = [{"until_step": 3, "rows": 4}, {"until_step": 5, "rows": 8}]
BASE = {
    "model": {"hidden_size": 64, "ffn_hidden_size": 64, "vocab_size": 512, "attention_heads": 4},
    "data": {"train": [{"path": "a"}, {"path": "b"}], "validation": [{"path": "v"}], "sequence_length": 2048},
    "train": {"steps": 10, "global_batch_size": 16, "batch_ramp": RAMP},
    "optimizer": {"warmup": 0},
}


def config(**sections):
    raw = copy.deepcopy(BASE)
    for name, fields in sections.items():
        raw[name] = {**raw.get(name, {}), **fields}
    return from_dict(raw)


def test_rows():
    assert [batch_rows(config(), step) for step in range(7)] == [4, 4, 4, 8, 8, 16, 16]
    assert [rows_before(config(), step) for step in range(8)] == [0, 4, 8, 12, 20, 28, 44, 60]
    assert rows_before(config(train={"batch_ramp": []}), 10) == 160
    for total in (0, 2, 3, 4, 5, 9):
        assert rows_before(config(), total) == sum(batch_rows(config(), step) for step in range(total))


def test_the_learning_rate_in_tokens_reaches_its_end():
    ramp = config(optimizer={"schedule": "cosine", "schedule_unit": "tokens", "warmup": 0, "learning_rate": 1.0})
    rates = [learning_rate(ramp, step, rows_before(ramp, step) * 2048) for step in range(11)]
    assert rates == pytest.approx([0.5 * (1 + math.cos(math.pi * rows_before(ramp, step) / 108)) for step in range(11)])


@pytest.mark.parametrize(
    "train, world, sentence",
    [
        ({"batch_ramp": [{"until_step": 0, "rows": 4}]}, None, "train.batch_ramp.0.until_step=0: must be more than 0"),
        ({"batch_ramp": [RAMP[1], RAMP[0]]}, None, "train.batch_ramp.1.until_step=3: must be more than 5"),
        ({"batch_ramp": [{"until_step": 3, "rows": 0}]}, None, "train.batch_ramp.0.rows=0: must be at least 1"),
        ({"micro_batch_size": 8}, None, "train.batch_ramp.0.rows=4: must be a multiple of train.micro_batch_size=8"),
        ({}, 8, r"train.batch_ramp.0.rows=4: must be divisible by .* 8 data-parallel replicas, e.g. train.batch_ramp.0.rows=8"),
    ],
)
def test_refusals(train, world, sentence):
    validate(config(), 4)
    with pytest.raises(ValueError, match=sentence):
        validate(config(train=train), world)


def curriculum(*steps):
    return [{"step": step, "weights": {"a": 1.0, "b": float(step)}} for step in steps]


@pytest.mark.parametrize(
    "changes, sentence",
    [
        (curriculum(0), "data.curriculum.0.step=0: must be at least 1"),
        (curriculum(5, 5), "data.curriculum.1.step=5: must be more than 5"),
        ([{"step": 5, "weights": {"a": 1.0}}], "'b' has no weight; give a weight to each of a, b"),
        ([{"step": 5, "weights": {"a": 1.0, "b": 1.0, "c": 1.0}}], "no training source is named 'c'"),
        ([{"step": 5, "weights": {"a": -1.0, "b": 1.0}}], "data.curriculum.0.weights.a=-1.0: must be 0 or more"),
        ([{"step": 5, "weights": {"a": 0.0, "b": 0.0}}], "data.curriculum.0.weights: every weight is 0"),
        ([{"step": 5, "weight": {}}], "unknown config field 'data.curriculum.0.weight'; did you mean"),
    ],
)
def test_bad_curricula(changes, sentence):
    validate(config(data={"curriculum": curriculum(5, 7)}))
    with pytest.raises(ValueError, match=sentence):
        validate(config(data={"curriculum": changes}))


def test_remote_sources():
    validate(config(data={"train": [{"path": "s3://x/y"}]}))
    for data, sentence in (
        ({"train": [{"path": "pipe:cat x"}]}, r"data.train.0.path='pipe:cat x': the command must hold \{file\}"),
        ({"train": [{"path": "s3://x/y"}], "cache": ""}, "data.cache=''.*needs a folder on a local disk"),
        ({"train": [{"path": "s3://x/y"}], "damaged": "skip"}, "data.damaged='skip': .*is remote.*data.train.0.skip_shards.*damaged=stop"),
    ):
        with pytest.raises(ValueError, match=sentence):
            validate(config(data=data))
    assert config(data={"train": [{"path": "pipe:aws s3 cp s3://x/web/{file} -"}]}).data.train[0].name


def resume(allow=(), done=4, before=None, **sections):
    return check_resume(to_dict(before or config()), to_dict(config(**sections)), list(allow), done)


def test_what_a_resume_may_change():
    later = {"batch_ramp": [RAMP[0], {"until_step": 8, "rows": 8}]}
    with pytest.raises(ValueError, match=r"allow_change=\[train.batch_ramp\]"):
        resume(train=later)
    assert len(resume(["train.batch_ramp"], train=later)) == 1
    with pytest.raises(ValueError, match="train.batch_ramp: step 0, one of the 4 already done, had 4 rows and would now have 2"):
        resume(["train.batch_ramp"], train={"batch_ramp": [{"until_step": 3, "rows": 2}, RAMP[1]]})
    old = config(data={"curriculum": curriculum(2, 6)})
    assert len(resume(["data.curriculum"], before=old, data={"curriculum": curriculum(2, 7)})) == 1
    with pytest.raises(ValueError, match="data.curriculum: changes before step 4, which is done"):
        resume(["data.curriculum"], before=old, data={"curriculum": curriculum(3, 6)})
    for field, value in (("packing", "best_fit"), ("shuffle_tokens", 1 << 20)):
        with pytest.raises(ValueError, match=f"another run.*data.{field}"):
            resume([f"data.{field}"], data={field: value})
    free = {"workers": 0, "prefetch": 9, "cache": "/x", "cache_gib": 1.0, "retries": 1, "damaged": "skip"}
    assert len(resume(data=free)) == len(free)
