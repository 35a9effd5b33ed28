"""The thirteen tasks: prompts, options and how many tokens an answer may have (RULER, scripts/synthetic.yaml and constants.py)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType


@dataclass(frozen=True)
class Family:
    """What tasks of one kind share. prompt: with {context} and {query}; prefix: the start of the answer, which a base model continues."""

    prompt: str
    prefix: str
    answer_tokens: int
    any_answer: bool = False  # one of the references is enough (questions); else the share of references found

    @property
    def template(self) -> str:
        return self.prompt + self.prefix


NEEDLE = Family(
    "Some special magic {type_needle_v} are hidden within the following text. Make sure to memorize it. I will quiz you about the "
    "{type_needle_v} afterwards.\n{context}\nWhat are all the special magic {type_needle_v} for {query} mentioned in the provided text?",
    " The special magic {type_needle_v} for {query} mentioned in the provided text are",
    128,
)
TRACKING = Family(
    "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n{context}\n"
    "Question: Find all variables that are assigned the value {query} in the text above.",
    " Answer: According to the chain(s) of variable assignment in the text above, {num_v} variables are assigned the value {query}, "
    "they are: ",
    30,
)
COMMON_WORDS = Family(
    "Below is a numbered list of words. In these words, some appear more often than others. Memorize the ones that appear most often.\n"
    "{context}\nQuestion: What are the 10 most common words in the above list?",
    " Answer: The top 10 words that appear most often in the list are:",
    120,
)
FREQUENT_WORDS = Family(
    "Read the following coded text and track the frequency of each coded word. Find the three most frequently appeared coded words. "
    "{context}\nQuestion: Do not provide any explanation. Please ignore the dots '....'. What are the three most frequently appeared "
    "words in the above coded text?",
    " Answer: According to the coded text above, the three most frequently appeared words are:",
    50,
)
QUESTIONS = Family(
    "Answer the question based on the given documents. Only give me the answer and do not output any other words.\n\n"
    "The following are given documents.\n\n{context}\n\nAnswer the question based on the given documents. Only give me the answer and "
    "do not output any other words.\n\nQuestion: {query}",
    " Answer:",
    32,
    any_answer=True,
)


@dataclass(frozen=True)
class Task:
    """One task. needs: the text a user must supply, '' for none."""

    name: str
    family: Family
    options: Mapping[str, int | str]
    needs: str = ""


def _needle(name: str, haystack: str, keys: str = "words", values: str = "numbers", **counts: int) -> Task:
    options = {"haystack": haystack, "keys": keys, "values": values, "num_keys": 1, "num_values": 1, "num_queries": 1, **counts}
    return Task(name, NEEDLE, MappingProxyType(options), "essay" if haystack == "essay" else "")


_ALL = (
    _needle("niah_single_1", "noise"),
    _needle("niah_single_2", "essay"),
    _needle("niah_single_3", "essay", values="uuids"),
    _needle("niah_multikey_1", "essay", num_keys=4),
    _needle("niah_multikey_2", "needle"),
    _needle("niah_multikey_3", "needle", keys="uuids", values="uuids"),
    _needle("niah_multivalue", "essay", num_values=4),
    _needle("niah_multiquery", "essay", num_queries=4),
    Task("vt", TRACKING, MappingProxyType({"chains": 1, "hops": 4})),
    Task("cwe", COMMON_WORDS, MappingProxyType({"common": 10, "common_repeats": 30, "uncommon_repeats": 3})),
    Task("fwe", FREQUENT_WORDS, MappingProxyType({"word_length": 6})),
    Task("qa_1", QUESTIONS, MappingProxyType({}), "squad"),
    Task("qa_2", QUESTIONS, MappingProxyType({}), "hotpotqa"),
)
TASKS: Mapping[str, Task] = MappingProxyType({task.name: task for task in _ALL})
