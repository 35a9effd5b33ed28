"""Samples of any task at any length, for one tokenizer and seed."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from swax_megatron.eval.ruler.fit import fitting_sample, largest_fit
from swax_megatron.eval.ruler.frequencies import CommonWords, FrequentWords
from swax_megatron.eval.ruler.needles import Needles
from swax_megatron.eval.ruler.questions import Question, Questions, read_hotpotqa, read_squad
from swax_megatron.eval.ruler.tasks import COMMON_WORDS, FREQUENT_WORDS, NEEDLE, QUESTIONS, TRACKING, Family, Task
from swax_megatron.eval.ruler.tracking import EXAMPLE_TOKENS, Tracking
from swax_megatron.eval.ruler.wordlists import CompoundWords, word_list

_SENTENCE_END = re.compile(r"(?<=[.!?])[\"')\]]*\s+")


@dataclass(frozen=True)
class Sample:
    """prompt: what the model continues, answer prefix included; tokens: of the prompt and the longest answer together."""

    prompt: str
    references: list[str]
    tokens: int


@dataclass
class Materials:
    """Texts the tasks draw on. essay, squad, hotpotqa, words: files of the user; sentences: text -> sentences of an essay."""

    essay: Path | None = None
    squad: Path | None = None
    hotpotqa: Path | None = None
    words: Path | None = None
    sentences: Callable[[str], list[str]] = field(default=lambda text: split_sentences(text))

    def lacks(self, task: Task) -> str:
        """The option a task cannot do without and that is not given; '' when it can be built."""
        return f"--{task.needs}" if task.needs and getattr(self, task.needs) is None else ""

    def read(self, task: Task) -> None:
        """Read the texts of a task now, so that a file that is missing or no such file is told of before a model is loaded."""
        if task.needs == "essay":
            _ = self.essay_words
        elif task.needs:
            _ = self.squad_questions if task.needs == "squad" else self.hotpotqa_questions
        elif task.family is COMMON_WORDS:
            _ = self.more_words

    @cached_property
    def compounds(self) -> CompoundWords:
        return CompoundWords(word_list("adjective"), word_list("noun"))

    @cached_property
    def single_words(self) -> list[str]:
        return sorted({*word_list("noun"), *word_list("adjective"), *word_list("verb")})

    @cached_property
    def more_words(self) -> list[str]:
        if self.words is None:
            return []
        return list(dict.fromkeys(line.strip() for line in _text(self.words, "words").splitlines() if line.strip()))

    @cached_property
    def essay_words(self) -> list[str]:
        """Words of a text file, or of NVIDIA's PaulGrahamEssays.json (its field "text")."""
        text = _text(self.essay, "essay")
        if self.essay.suffix == ".json":
            try:
                text = json.loads(text)["text"]
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f'--essay {self.essay} is no JSON object with "text"; give NVIDIA\'s PaulGrahamEssays.json') from error
        words = re.sub(r"\s+", " ", text).split(" ")
        if len(words) < 100:
            raise ValueError(f"--essay {self.essay} holds {len(words)} words; give essays of some thousand words")
        return words

    @cached_property
    def squad_questions(self) -> tuple[list[Question], list[str]]:
        return read_squad(self.squad)

    @cached_property
    def hotpotqa_questions(self) -> tuple[list[Question], list[str]]:
        return read_hotpotqa(self.hotpotqa)


def split_sentences(text: str) -> list[str]:
    """Sentences by their closing marks. (NVIDIA uses NLTK's punkt model, which also knows abbreviations; pass that for equal samples.)"""
    parts, start = [], 0
    for match in _SENTENCE_END.finditer(text):
        parts.append(text[start : match.end()].rstrip())
        start = match.end()
    return [*parts, text[start:]] if text[start:] else parts


def generate(
    task: Task, length: int, samples: int, count: Callable[[str], int], materials: Materials, seed: int = 42
) -> Iterator[Sample]:
    """``samples`` samples of at most ``length`` tokens, answer included.

    count: text -> number of tokens
    Raises ValueError for a missing file and for a length at which the task cannot be built.
    """
    missing = materials.lacks(task)
    if missing:
        raise ValueError(f"{task.name} needs a text of yours: give it with {missing} FILE, or leave the task out of --tasks")
    make = {NEEDLE: _needles, TRACKING: _tracking, COMMON_WORDS: _common, FREQUENT_WORDS: _frequent, QUESTIONS: _questions}
    budget = length - task.family.answer_tokens
    if budget < 1:
        raise ValueError(f"{task.name}: a context of {length} tokens has no room beside an answer of {task.family.answer_tokens}")
    for prompt, references, tokens in make[task.family](task, length, budget, samples, count, materials, seed):
        yield Sample(prompt, references, tokens + task.family.answer_tokens)


def answer_prefix(family: Family, prompt: str) -> str:
    """The end of a prompt at which the answer begins."""
    return prompt[prompt.rfind(family.prefix[:10]) :]


Made = Iterator[tuple[str, list[str], int]]


def _needles(task: Task, length: int, budget: int, samples: int, count: Callable, materials: Materials, seed: int) -> Made:
    essay = materials.essay_words if task.needs else []
    builder = Needles(task, seed, length, materials.compounds, essay, materials.sentences)
    per_unit = count(builder.build(builder.step)[0]) / builder.step
    amount = largest_fit(builder.build, count, budget, builder.step, int(length / per_unit * 3))
    for _ in range(samples):
        yield fitting_sample(builder.build, count, budget, amount, builder.step, task.name)


def _tracking(task: Task, length: int, budget: int, samples: int, count: Callable, materials: Materials, seed: int) -> Made:
    builder = Tracking(task, seed, length)

    def example(lines: int) -> tuple[str, list[str]]:
        return builder.build(lines, example=True)

    per_line = count(example(5)[0]) / 5
    lines = largest_fit(example, count, EXAMPLE_TOKENS, 5, int(EXAMPLE_TOKENS / per_line * 3))
    prompt, names, _ = fitting_sample(example, count, EXAMPLE_TOKENS, lines, 5, task.name)
    before = count(builder.keep_example(prompt, names))
    per_line = count(builder.build(builder.step)[0]) / builder.step
    amount = largest_fit(builder.build, count, budget - before, builder.step, int(length / per_line * 3))
    for _ in range(samples):
        yield fitting_sample(builder.build_after_example, count, budget, amount, builder.step, task.name)


def _common(task: Task, length: int, budget: int, samples: int, count: Callable, materials: Materials, seed: int) -> Made:
    builder = CommonWords(task, seed, length, materials.single_words, materials.more_words)
    per_word = count(builder.build(4096)[0]) / 4096
    amount = largest_fit(builder.build, count, budget, builder.step, int(length // per_word) * 2)
    for _ in range(samples):
        yield fitting_sample(builder.build, count, budget, amount, builder.step, task.name)


def _frequent(task: Task, length: int, budget: int, samples: int, count: Callable, materials: Materials, seed: int) -> Made:
    builder = FrequentWords(task, seed, budget, count)
    if builder.kinds < 4:
        raise ValueError(f"{task.name}: a context of {length} tokens is too short for it; use 300 or more")
    words = builder.largest()
    for _ in range(samples):
        prompt, references = builder.build(words)
        yield prompt, references, count(prompt)


def _questions(task: Task, length: int, budget: int, samples: int, count: Callable, materials: Materials, seed: int) -> Made:
    questions, documents = materials.squad_questions if task.needs == "squad" else materials.hotpotqa_questions
    builder = Questions(task, seed, questions, documents)
    per_document = count(builder.build(0, builder.step)[0]) / builder.step

    def first(amount: int) -> tuple[str, list[str]]:
        return builder.build(0, amount)

    amount = largest_fit(first, count, budget, builder.step, int(length / per_document * 3))
    for index in range(samples):

        def build(documents_shown: int, index: int = index) -> tuple[str, list[str]]:
            return builder.build(index, documents_shown)

        yield fitting_sample(build, count, budget, amount, builder.step, task.name)


def _text(path: Path, option: str) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--{option} {path} cannot be read ({error}); give a text file in UTF-8") from error
