"""What a resume may change."""

import copy
import re
from pathlib import Path

import pytest

from swax_megatron.checkpoint.compatibility import _flatten, _kind, check_resume
from swax_megatron.config import from_dict, to_dict

SAVED = to_dict(
    from_dict({"train": {"steps": 1000}, "data": {"train": [{"path": "/d/web", "weight": 2.0}, {"path": "/d/code"}]}})
)  # annealed and decayed from step 900 on


def resume(changes, allow=(), done=500, saved=SAVED):
    new = copy.deepcopy(saved)
    for path, value in changes.items():
        *sections, name = path.split(".")
        node = new
        for section in sections:
            node = node[section]
        node[name] = value
    return check_resume(saved, new, list(allow), done)


def test_nothing_changed():
    assert resume({}) == []


def test_layout_and_paths_are_free():
    changes = {
        "parallel.tensor": 2,
        "optimizer.backend": "megatron",
        "optimizer.zero_stage": 2,
        "train.micro_batch_size": 4,
        "kernels.backend": "reference",
        "monitor.log_interval": 1,
        "validation.interval": 7,
        "checkpoint.interval": 9,
        "run_dir": "/elsewhere",
        "data.tokenizer": "/t.model",
        "window.check_interval": 0,
    }
    assert sorted(resume(changes)) == sorted(f"{k}: {_old(k)!r} -> {v!r}" for k, v in changes.items())
    moved = [{"path": "/new/web", "weight": 2.0, "name": "web"}, {"path": "/new/code", "weight": 1.0, "name": "code"}]
    assert len(resume({"data.train": moved})) == 1


def _old(path):
    node = SAVED
    for part in path.split("."):
        node = node[part]
    return node


def test_the_model_is_never_another():
    with pytest.raises(ValueError) as caught:
        resume({"model.hidden_size": 1024, "model.rope_base": 5.0}, allow=["model.hidden_size", "model.rope_base"])
    assert "model.hidden_size: 2048 -> 1024" in str(caught.value) and "model.rope_base: 10000.0 -> 5.0" in str(caught.value)


@pytest.mark.parametrize("field, value", [("train.model_seed", 9), ("train.data_seed", 9), ("data.sequence_length", 128)])
def test_the_past_is_never_another(field, value):
    with pytest.raises(ValueError, match=f"{field}: .* another run_dir|another run.*{field}"):
        resume({field: value}, allow=[field])


def test_sources():
    web, code = SAVED["data"]["train"]
    new = {"path": "/d/books", "weight": 1.0, "name": "books"}
    for sources in ([code, web], [web], [new, web, code]):
        with pytest.raises(ValueError, match="another run.*data.train"):
            resume({"data.train": sources}, allow=["data.train"])
    for sources in ([web, code, new], [dict(web, weight=5.0), code]):
        with pytest.raises(ValueError, match=r"allow_change=\[data.train\]"):
            resume({"data.train": sources})
        assert len(resume({"data.train": sources}, allow=["data.train"])) == 1


@pytest.mark.parametrize(
    "field, value",
    [("train.steps", 2000), ("train.global_batch_size", 128), ("optimizer.learning_rate", 1e-4), ("train.precision", "fp32")],
)
def test_the_future_needs_its_name(field, value):
    with pytest.raises(ValueError, match=rf"{field}: .*checkpoint.allow_change=\[{field}\]"):
        resume({field: value})
    assert resume({field: value}, allow=[field])[0].startswith(f"{field}: ")


def test_annealing_is_not_drawn_anew():
    allow = ["train.steps", "window.anneal_fraction", "optimizer.schedule"]
    assert resume({"train.steps": 2000}, allow, done=900)  # steps 0..899 are done, 900 is the first annealed one
    with pytest.raises(ValueError, match="one of the 950 already done, another attention window.*window.anneal_fraction=0.55 "):
        resume({"train.steps": 2000}, allow, done=950)
    assert len(resume({"train.steps": 2000, "window.anneal_fraction": 0.55}, allow, done=1000)) == 2  # the proposed way out
    with pytest.raises(ValueError, match="first annealed step 900 -> 450"):
        resume({"train.steps": 500}, allow, done=480)


def test_windows_of_the_past():
    for field, value in (("window.windows", [64, 2048]), ("train.window_seed", 2), ("window.probabilities", [0.1, 0.9])):
        with pytest.raises(ValueError, match="another attention window"):
            resume({field: value}, [field], done=500)
        assert resume({field: value}, [field], done=0)
    fixed = copy.deepcopy(SAVED)
    fixed["window"].update(schedule="fixed", windows=[2048], probabilities=[1.0])
    assert resume({"train.steps": 2000}, ["train.steps", "optimizer.schedule"], done=1000, saved=fixed)  # 2048 before and after
    ramp = copy.deepcopy(SAVED)
    ramp["window"]["schedule"] = "ramp"
    with pytest.raises(ValueError, match="give step 450"):
        resume({"train.steps": 2000}, ["train.steps"], done=500, saved=ramp)
    assert resume({"train.steps": 2000}, ["train.steps"], done=450, saved=ramp)


def test_learning_rate_of_the_past():
    flat = copy.deepcopy(SAVED)
    flat["window"]["anneal_fraction"] = 0.0
    assert resume({"train.steps": 2000}, ["train.steps"], done=900, saved=flat)
    with pytest.raises(ValueError, match="decay began at step 900 and would now begin at 1800.*decay_fraction=0.55, "):
        resume({"train.steps": 2000}, ["train.steps"], done=950, saved=flat)
    allow = ["train.steps", "optimizer.decay_fraction"]
    assert resume({"train.steps": 2000, "optimizer.decay_fraction": 0.55}, allow, done=950, saved=flat)
    cosine = copy.deepcopy(flat)
    cosine["optimizer"].update(schedule="cosine", warmup=10)
    with pytest.raises(ValueError, match="a cosine spans the whole run.*optimizer.schedule to checkpoint.allow_change"):
        resume({"train.steps": 2000}, ["train.steps"], done=11, saved=cosine)
    assert resume({"train.steps": 2000}, ["train.steps"], done=10, saved=cosine)
    assert resume({"train.steps": 2000}, ["train.steps", "optimizer.schedule"], done=11, saved=cosine)


def test_a_checkpoint_of_an_older_version_lacks_a_field():
    older = copy.deepcopy(SAVED)
    del older["train"]["recompute"], older["model"]["init_std"]
    assert check_resume(older, SAVED, [], 500) == []
    older["train"]["gone"] = 1
    with pytest.raises(ValueError, match="cannot be read by this version.*train.gone"):
        check_resume(older, SAVED, [], 500)


def test_a_total_below_what_is_done_is_refused() -> None:
    saved = to_dict(from_dict({"train": {"steps": 10}, "optimizer": {"warmup": 0}, "window": {"anneal_fraction": 0.0}}))
    wanted = to_dict(from_dict({"train": {"steps": 3}, "optimizer": {"warmup": 0}, "window": {"anneal_fraction": 0.0}}))
    with pytest.raises(ValueError, match="already holds 4 updates"):
        check_resume(saved, wanted, ["train.steps", "optimizer.schedule"], 4)


def test_another_batch_under_a_schedule_in_tokens_is_refused() -> None:
    def config(batch: int) -> dict:
        return to_dict(from_dict({"train": {"global_batch_size": batch}, "optimizer": {"schedule_unit": "tokens"}}))

    with pytest.raises(ValueError, match="moves a schedule in tokens"):
        check_resume(config(8), config(16), ["train.global_batch_size"], 50)
    check_resume(config(8), config(16), ["train.global_batch_size", "optimizer.schedule"], 50)
    check_resume(config(8), config(16), ["train.global_batch_size"], 0)


def documented(row):
    """The fields in a line of the table of docs/checkpoints.md, ``a.{b,c}`` written out."""
    text = (Path(__file__).parents[2] / "docs" / "checkpoints.md").read_text()
    (line,) = re.findall(rf"^\| {row} \| (.*) \|$", text, re.MULTILINE)
    names = [re.fullmatch(r"([\w.]*)(?:\{(.*)\})?(\*?)", name).groups() for name in re.findall(r"`(.*?)`", line)]
    return {prefix + name + star for prefix, several, star in names for name in (several or "").split(",")}


def test_the_page_says_what_the_code_does():
    """Every field of the configuration, by the table of docs/checkpoints.md and by the code."""
    rows = {"never": documented("never"), "flag": documented("when named in `checkpoint.allow_change`"), "free": documented("freely")}
    fields = set(_flatten(SAVED)) - {"data.train"}  # whose parts differ: tested above
    named = set.union(*rows.values()) - {"data.train"}
    assert not {name for name in named if not name.endswith(".*")} - fields, "the page names a field that is none"
    assert {name[:-2] for name in named if name.endswith(".*")} <= set(SAVED), "the page names a section that is none"
    for field in sorted(fields):
        kinds = [kind for kind, names in rows.items() if field in names or field.partition(".")[0] + ".*" in names]
        assert (kinds or ["flag"]) == [_kind(field, 1, 2)], field
