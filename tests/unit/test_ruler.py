"""RULER's generators and scoring against NVIDIA's own (tests/golden/ruler.json; how it was made: tests/golden/make_ruler_golden.py)."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from swax_megatron.eval.ruler import TASKS, Materials, generate, score
from swax_megatron.eval.ruler.generate import split_sentences
from swax_megatron.eval.ruler.run import choose_tasks
from swax_megatron.eval.ruler.wordlists import CompoundWords
from tests.golden.ruler_materials import tokens, write_materials

pytest.importorskip("wonderwords", reason="RULER's words come from the package wonderwords: pip install '.[eval]'")
GOLDEN = json.loads((Path(__file__).parents[1] / "golden/ruler.json").read_text())


def count(text: str) -> int:
    return len(tokens(text))


def sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


@pytest.fixture(scope="module")
def materials(tmp_path_factory):
    return Materials(**write_materials(tmp_path_factory.mktemp("texts")))


@pytest.mark.parametrize("task", TASKS)
def test_samples_equal_nvidias(task, materials):
    cases = {name: samples for name, samples in GOLDEN["golden"].items() if name.split("/")[0] == task}
    assert len(cases) >= 4
    for name, wanted in cases.items():
        _, length, seed = name.split("/")
        made = generate(TASKS[task], int(length), GOLDEN["samples"], count, materials, int(seed))
        got = [{"prompt_sha256": sha256(s.prompt), "references": s.references, "tokens": s.tokens} for s in made]
        assert got == wanted, name


@pytest.mark.parametrize("task", ["niah_single_1", "niah_multikey_3", "vt", "fwe"])
def test_long_contexts_are_filled(task, materials):
    (sample,) = generate(TASKS[task], 131072, 1, count, materials)
    assert 0.95 * 131072 < sample.tokens <= 131072
    assert all(reference in sample.prompt for reference in sample.references)


def test_score_is_nvidias():
    """string_match_all and string_match_part of RULER's scripts/eval/synthetic/constants.py, worked by hand."""
    needle, question = TASKS["niah_multivalue"].family, TASKS["qa_1"].family
    assert score(needle, ["It is 12 and 34.\x00", "none"], [["12", "34", "56"], ["7"]]) == 33.33
    assert score(needle, ["AbC"], [["abc"]]) == 100.0
    assert score(question, ["the red one", "blue"], [["red", "green"], ["yellow"]]) == 50.0


def test_compounds_are_the_sorted_list():
    adjectives, nouns = ["wide", "blue", "wide-eyed", "blue", "widest"], ["eyed-cat", "apple", "zebra", "arm-rest", "apple"]
    whole = sorted({f"{adjective}-{noun}" for adjective in adjectives for noun in nouns})
    lazy = CompoundWords(adjectives, nouns)
    assert [lazy[index] for index in range(len(lazy))] == whole


def test_sentences():
    assert split_sentences('One. "Two?" Three! four') == ["One.", '"Two?"', "Three!", "four"]


def test_clear_refusals(materials, tmp_path):
    with pytest.raises(ValueError, match="--essay FILE"):
        choose_tasks(["niah_single_2"], Materials())
    with pytest.raises(ValueError, match="no task of RULER"):
        choose_tasks(["nia"], Materials())
    with pytest.raises(ValueError, match="--words FILE"):
        list(generate(TASKS["cwe"], 131072, 1, count, materials))
    with pytest.raises(ValueError, match="fit beside the answer"):
        list(generate(TASKS["vt"], 200, 1, count, materials))
    with pytest.raises(ValueError, match="no room beside an answer"):
        list(generate(TASKS["niah_single_1"], 100, 1, count, materials))
    broken = tmp_path / "squad.json"
    broken.write_text("{")
    with pytest.raises(ValueError, match="--squad .* cannot be read as JSON"):
        list(generate(TASKS["qa_1"], 1024, 1, count, Materials(squad=broken)))


def test_a_longer_word_list_serves_long_lists(tmp_path):
    words = tmp_path / "words"
    words.write_text("\n".join(f"word{number}" for number in range(60000)))
    (sample,) = generate(TASKS["cwe"], 131072, 1, count, Materials(words=words))
    assert 0.9 * 131072 < sample.tokens <= 131072 and all(answer.startswith("word") for answer in sample.references)
