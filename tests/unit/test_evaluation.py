"""The evaluation command on a real (random) model: every part, continuing, the report, refusals."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from data_prep import tokenizer as tokenizer_command
from swax_megatron.data.recall import RecallTask, gap_ranges, make_row
from swax_megatron.data.shards import ShardedDataset
from swax_megatron.eval import model as eval_model
from swax_megatron.eval.__main__ import main
from swax_megatron.eval.model import open_subject
from swax_megatron.eval.perplexity import position_edges, token_losses
from swax_megatron.eval.ruler import TASKS
from swax_megatron.eval.ruler.wordlists import word_list
from swax_megatron.hf.configuration_swax import SwaxConfig
from swax_megatron.hf.modeling_swax import SwaxForCausalLM
from swax_megatron.hf.tokenizer import export_tokenizer
from tests.golden.ruler_materials import write_materials
from tests.texts import random_documents, run_shard, small_tokenizer, texts, write_ids, write_jsonl
from tests.unit.hf_reference import randomise

pytest.importorskip("matplotlib", reason="reports draw plots: pip install '.[eval]'")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Path:
    return small_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def write_export(folder: Path, vocabulary: int, tokenizer: Path | None) -> Path:
    torch.manual_seed(0)
    config = SwaxConfig(
        vocab_size=vocabulary, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=2, num_mlstm_heads=2,
        layer_types=["linear_attention", "sliding_attention", "full_attention"], sliding_window=8,
    )  # fmt: skip
    model = SwaxForCausalLM(config)
    randomise(model)
    model.save_pretrained(folder)
    if tokenizer is not None:
        export_tokenizer(tokenizer, folder)
    return folder


@pytest.fixture(scope="module")
def export(tmp_path_factory, tokenizer) -> Path:
    return write_export(tmp_path_factory.mktemp("export"), 400, tokenizer)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory, tokenizer) -> Path:
    folder = tmp_path_factory.mktemp("data")
    source = write_jsonl(folder / "text.jsonl", texts(30))
    assert run_shard(source, tokenizer, folder / "set") == 0
    return folder / "set"


def test_command_writes_scores_tables_and_plots_and_continues(export, dataset, tmp_path, capsys):
    pytest.importorskip("wonderwords", reason="RULER's words come from the package wonderwords: pip install '.[eval]'")
    out = tmp_path / "out"
    command = [str(export), "--out", str(out), "--tasks", "niah_single_1,fwe", "--lengths", "1024,2048", "--samples", "2", "--batch", "2"]
    command += ["--data", str(dataset), "--documents", "10", "--position-length", "256", "--tensorboard"]
    command += ["--memory", "--memory-length", "64", "--memory-documents", "2"]
    assert main(command) == 0
    found = json.loads((out / "results.json").read_text())
    assert {(e["task"], e["length"]) for e in found["ruler"]} == {(t, n) for t in ("niah_single_1", "fwe") for n in (1024, 2048)}
    assert all(0 <= entry["score"] <= 100 and entry["samples"] == 2 for entry in found["ruler"])
    heads = found["memory"][0]["heads"]
    assert len(heads["memory/layer_00/horizon"]) == 2 and all(value > 0 for value in heads["memory/layer_00/horizon"])
    assert {name.split("/")[1] for name in heads} == {"layer_00", "layer_01", "layer_02"}
    report = (out / "report.md").read_text()
    assert "| niah_single_1 |" in report and "more than a window of in-document past" in report
    assert {path.name for path in out.glob("*.png")} == {"ruler.png", "loss_by_position.png"}
    written = EventAccumulator(str(out / "tensorboard"))
    written.Reload()
    scalars = {"ruler/fwe", "loss/by_position", "loss/by_document_length", "memory/layer_00/horizon", "attention/layer_01/entropy"}
    assert scalars <= set(written.Tags()["scalars"]) and "memory/layer_00/horizon" in written.Tags()["histograms"]

    unit = out / "units/ruler-fwe-1024.json"
    kept = {path.name: path.stat().st_mtime_ns for path in (out / "units").iterdir()}
    unit.unlink()
    assert main(command) == 0
    again = {path.name: path.stat().st_mtime_ns for path in (out / "units").iterdir()}
    assert {name for name in kept if kept[name] != again[name]} == {unit.name}  # only what was missing is done again
    assert main([*command, "--documents", "12"]) == 0
    other = {path.name: path.stat().st_mtime_ns for path in (out / "units").iterdir()}
    assert {name for name in again if again[name] != other[name]} == {"perplexity.json"}  # and what is asked for otherwise
    assert json.loads((out / "results.json").read_text())["perplexity"][0]["documents"] == 12
    capsys.readouterr()
    assert main([*command, "--window", "5"]) == 2
    assert "holds another evaluation (window: 8 there, 5 asked for)" in capsys.readouterr().err


@pytest.fixture(scope="module")
def ruler(tmp_path_factory) -> tuple[Path, list[str]]:
    """An export whose tokenizer knows the tasks' words, as a real one does, and the options that name stand-ins for their texts."""
    pytest.importorskip("wonderwords", reason="RULER's words come from the package wonderwords: pip install '.[eval]'")
    folder = tmp_path_factory.mktemp("ruler")
    materials = write_materials(folder)
    words = [" ".join(word_list(kind)) for kind in ("noun", "adjective", "verb")]
    known = [path.read_text() for path in materials.values()] + [task.family.template for task in TASKS.values()] + words
    source = write_jsonl(folder / "known.jsonl", known)
    assert tokenizer_command.main(["--input", str(source), "--out", str(folder / "known.model"), "--vocab-size", "4000"]) == 0
    materials["words"] = folder / "words"
    materials["words"].write_text("\n".join(f"word{number}" for number in range(60000)))
    export = write_export(folder / "export", 4000, folder / "known.model")
    return export, [option for name, path in materials.items() for option in (f"--{name}", str(path))]


@pytest.mark.parametrize(
    ("length", "fill"),
    [(1024, 0.35), *(pytest.param(length, 0.75, marks=pytest.mark.soak) for length in (4096, 16384, 65536, 131072))],
)
def test_all_tasks_run_on_an_export(ruler, tmp_path, length, fill):
    """Every task fits its length, and fills it as far as its smallest step allows."""
    export, materials = ruler
    assert main([str(export), "--out", str(tmp_path), "--tasks", "all", "--lengths", str(length), "--samples", "1", *materials]) == 0
    found = json.loads((tmp_path / "results.json").read_text())["ruler"]
    assert {entry["task"] for entry in found} == set(TASKS) and len(TASKS) == 13
    assert all(0 <= entry["score"] <= 100 for entry in found)
    for task in TASKS:
        (line,) = json.loads((tmp_path / f"units/ruler-{task}-{length}.json").read_text())["lines"]
        assert fill * length < line["tokens"] <= length, f"{task}: {line['tokens']}"
        assert line["references"] and line["answer"].strip()
    report = (tmp_path / "report.md").read_text()
    assert f"| task | {length} |" in report and all(f"| {task} |" in report for task in TASKS)


def test_loss_by_position_is_the_models_own(export, dataset, monkeypatch):
    """Chunked through the cache = one uncached pass of the model, at another window too."""
    monkeypatch.setattr(eval_model, "CHUNK", 7)
    ids = torch.randint(3, 400, (2, 40), generator=torch.Generator().manual_seed(1))
    for window in (8, 3):
        subject = open_subject(export, window=window, dtype="fp32", device="cpu")
        with torch.no_grad():
            logits = subject.model(ids[:, :-1], use_cache=False).logits
        wanted = F.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
        np.testing.assert_allclose(token_losses(subject, ids), wanted, atol=1e-4)


def test_batched_answers_equal_single_ones(export, monkeypatch):
    """Left padding and chunks change nothing."""
    subject = open_subject(export, dtype="fp32", device="cpu")
    prompts = texts(3)
    single = [subject.answer([prompt], 12)[0] for prompt in prompts]
    monkeypatch.setattr(eval_model, "CHUNK", 16)
    assert subject.answer(prompts, 12) == single and any(single)
    ids = subject.tokenizer(prompts[0], add_special_tokens=False, return_tensors="pt").input_ids
    generated = subject.model.generate(ids, max_new_tokens=12, do_sample=False)[0, ids.shape[1] :]
    assert subject.tokenizer.decode(generated, skip_special_tokens=True) == single[0]


def test_recall_of_a_model_that_knows_nothing(tmp_path):
    task = RecallTask(keys=40, values=40, fillers=20, pairs=4, length=64, near=16)
    export = write_export(tmp_path / "export", task.vocabulary, None)
    counts = ["--recall-keys", "40", "--recall-values", "40", "--recall-fillers", "20", "--recall-pairs", "4"]
    assert main([str(export), "--out", str(tmp_path / "out"), "--recall", "--recall-lengths", "64", "--recall-rows", "8", *counts]) == 0
    (entry,) = json.loads((tmp_path / "out/results.json").read_text())["recall"]
    assert [(gap["from"], gap["to"]) for gap in entry["by_gap"]] == gap_ranges(64)
    assert all(gap["queries"] > 0 and gap["accuracy"] < 0.3 for gap in entry["by_gap"])


def test_recall_rows_hold_what_they_say():
    task = RecallTask(keys=50, values=50, fillers=30, pairs=8, length=256, near=64, far_fraction=0.3)
    gaps = []
    for number in range(50):
        row = make_row(task, 7, number)
        again = make_row(task, 7, number)
        assert (row.ids == again.ids).all() and row.ids[-1] == 2 and row.ids.max() < task.vocabulary
        for place in np.flatnonzero(row.mask):
            key, told = row.ids[place - 1], place - row.gaps[place]
            assert row.ids[told] == row.ids[place] and row.ids[told - 1] == key  # told as asked, that many tokens before
            assert (row.ids == key).sum() == 2
            gaps.append(int(row.gaps[place]))
    assert 0.15 < np.mean(np.array(gaps) >= 64) < 0.4
    ranged = make_row(task, 7, 0, (100, 120))
    assert ranged.mask.any() and set(ranged.gaps[ranged.mask == 1]) <= set(range(100, 120))


def test_recall_data_is_a_data_set_of_one_row_a_document(tmp_path):
    from data_prep import recall_rows

    options = ["--keys", "40", "--values", "40", "--fillers", "20", "--pairs", "4", "--length", "64", "--near", "16"]
    assert recall_rows.main(["--out", str(tmp_path / "recall"), "--rows", "20", "--validation-rows", "3", *options]) == 0
    train = ShardedDataset(tmp_path / "recall/train", verify="sha256")
    row = make_row(RecallTask(40, 40, 20, 4, 64, 16), 1, 7)
    assert train.documents == 20 and (train.document(0, 7) == row.ids).all() and (train.document_mask(0, 7) == row.mask).all()
    assert recall_rows.main(["--out", str(tmp_path / "recall"), "--rows", "20", *options]) == 2


def test_position_edges():
    assert position_edges(1000) == [0, 64, 128, 256, 512, 1000] and position_edges(64) == [0, 64] and position_edges(50) == [0, 50]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ([], "nothing to evaluate"),
        (["--tasks", "all"], "niah_single_2 needs a text of yours: give it with --essay FILE"),
        (["--tasks", "fwe", "--lengths", "x"], "--lengths x: give comma-separated lengths"),
        (["--tasks", "fwe", "--samples", "0"], "--samples 0: must be at least 1"),
        (["--tasks", "fwe", "--window", "0"], "--window 0: must be at least 1"),
        (["--recall"], "the recall task has"),
        (["--tasks", "fwe,niah_single_2", "--essay", "nowhere.txt"], "--essay nowhere.txt cannot be read"),
        (["--tasks", "qa_1", "--squad", "nowhere.json"], "--squad nowhere.json cannot be read as JSON"),
        (["--tasks", "qa_2", "--hotpotqa", "pyproject.toml"], "--hotpotqa pyproject.toml cannot be read as JSON"),
        (["--tasks", "qa_1", "--squad", "tests/golden/ruler.json"], "--squad tests/golden/ruler.json is no squad file"),
        (["--tasks", "qa_2", "--hotpotqa", "tests/golden/ruler.json"], "--hotpotqa tests/golden/ruler.json is no hotpotqa file"),
        (["--tasks", "niah_single_2", "--essay", "tests/golden/ruler.json"], 'ruler.json is no JSON object with "text"'),
    ],
)
def test_bad_input(export, tmp_path, capsys, options, sentence, monkeypatch):
    monkeypatch.chdir(Path(__file__).parents[2])
    assert main([str(export), "--out", str(tmp_path / "out"), *options]) == 2
    told = capsys.readouterr().err
    assert told.splitlines()[-1].startswith("error: ") and sentence in told and "Traceback" not in told


def test_a_length_that_cannot_be_built_keeps_no_other_from_being_scored(export, tmp_path, capsys):
    pytest.importorskip("wonderwords", reason="RULER's words come from the package wonderwords: pip install '.[eval]'")
    out = tmp_path / "out"
    assert main([str(export), "--out", str(out), "--tasks", "niah_single_1", "--lengths", "256,1024", "--samples", "1"]) == 2
    told = capsys.readouterr()
    assert "error: niah_single_1: its smallest prompt has " in told.err and told.err.rstrip().endswith("(--lengths 256)")
    assert [e["length"] for e in json.loads((out / "results.json").read_text())["ruler"]] == [1024] and (out / "report.md").exists()


def test_models_that_cannot_be_evaluated(tmp_path, capsys):
    bare = write_export(tmp_path / "bare", 300, None)
    assert main([str(bare), "--out", str(tmp_path / "a"), "--tasks", "fwe", "--lengths", "512"]) == 2
    assert "export it again with --tokenizer" in capsys.readouterr().err
    other = write_ids(tmp_path / "ids", random_documents(5), vocab_size=299 + 1)
    assert main([str(write_export(tmp_path / "more", 310, None)), "--out", str(tmp_path / "b"), "--data", str(other)]) == 2
    assert "was tokenised with 300 ids" in capsys.readouterr().err
    assert main([str(tmp_path / "absent"), "--out", str(tmp_path / "c"), "--recall"]) == 2
    assert "does not exist" in capsys.readouterr().err
