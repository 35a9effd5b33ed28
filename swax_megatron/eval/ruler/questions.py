"""Questions over documents: one paragraph answers, the others distract. The user supplies SQuAD v2.0 and HotpotQA (development files)."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from swax_megatron.eval.ruler.tasks import Task


@dataclass(frozen=True)
class Question:
    """documents, related: indices into the documents; related ones are taken first as distractors."""

    text: str
    answers: list[str]
    documents: list[int]
    related: list[int]


Read = tuple[list[Question], list[str]]  # questions, all paragraphs


def read_squad(path: Path) -> Read:
    """Answerable questions and all paragraphs of a SQuAD v2.0 file. Raises ValueError where it is none."""
    return _read(path, "squad", _squad)


def read_hotpotqa(path: Path) -> Read:
    """Questions and all paragraphs of a HotpotQA file. Raises ValueError where it is none."""
    return _read(path, "hotpotqa", _hotpotqa)


def _read(path: Path, name: str, parse: Callable[[Any], Read]) -> Read:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"--{name} {path} cannot be read as JSON ({error}); give the data set's own development file") from error
    try:
        return parse(content)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"--{name} {path} is no {name} file; give the data set's own development file") from error


def _squad(content: Any) -> Read:
    articles = content["data"]
    documents = sorted({paragraph["context"] for article in articles for paragraph in article["paragraphs"]})
    number = {text: index for index, text in enumerate(documents)}
    questions = []
    for article in articles:
        around = [number[paragraph["context"]] for paragraph in article["paragraphs"]]
        for paragraph in article["paragraphs"]:
            own = number[paragraph["context"]]
            questions += [
                Question(entry["question"], [answer["text"] for answer in entry["answers"]], [own], [n for n in around if n != own])
                for entry in paragraph["qas"]
                if not entry["is_impossible"]
            ]
    return questions, documents


def _hotpotqa(entries: Any) -> Read:
    texts = [[f"{title}\n{''.join(sentences)}" for title, sentences in entry["context"]] for entry in entries]
    documents = sorted({text for context in texts for text in context})
    number = {text: index for index, text in enumerate(documents)}
    questions = [
        Question(entry["question"], [entry["answer"]], [number[text] for text in context], [])
        for entry, context in zip(entries, texts, strict=True)
    ]
    return questions, documents


class Questions:
    """Builds prompts of a question task: sample i asks question i."""

    step = 10

    def __init__(self, task: Task, seed: int, questions: list[Question], documents: list[str]) -> None:
        self.name, self.family, self.seed, self.random = task.name, task.family, seed, Random(seed)
        self.questions, self.documents = questions, documents

    def build(self, index: int, count: int) -> tuple[str, list[str]]:
        """Question ``index`` over ``count`` documents in random order, and its accepted answers."""
        if index >= len(self.questions):
            raise ValueError(f"{self.name}: the file holds {len(self.questions)} questions; use --samples {len(self.questions)} or fewer")
        question = self.questions[index]
        chosen = self._choose(question, count)
        Random(self.seed).shuffle(chosen)
        context = "\n\n".join(f"Document {number}:\n{text}" for number, text in enumerate(chosen, 1))
        return self.family.template.format(context=context, query=question.text), question.answers

    def _choose(self, question: Question, count: int) -> list[str]:
        if count >= len(self.documents):
            return (self.documents * -(-count // len(self.documents)))[:count]
        free = count - len(question.documents)
        near = question.documents + question.related
        if free > len(question.related):
            taken = set(near)
            others = [index for index in range(len(self.documents)) if index not in taken]
            picked = near + self.random.sample(others, max(0, free - len(question.related)))
        else:
            picked = question.documents + self.random.sample(question.related, max(0, free))
        return [self.documents[index] for index in picked]
