"""Scores of a model on RULER, one stored unit a task and length."""

from __future__ import annotations

import time
from collections.abc import Sequence
from itertools import islice
from typing import Any

from swax_megatron.eval.model import Progress, Subject
from swax_megatron.eval.ruler.generate import Materials, generate
from swax_megatron.eval.ruler.score import score
from swax_megatron.eval.ruler.tasks import TASKS, Task
from swax_megatron.eval.units import Units


def choose_tasks(names: Sequence[str], materials: Materials) -> list[Task]:
    """Tasks by name; "all" for the thirteen, "self-contained" for those that need no text of the user's.

    Reads the texts that they need. Raises ValueError for an unknown name and for a task whose text is missing or no such file.
    """
    chosen: list[Task] = []
    for name in names:
        if name == "self-contained":
            chosen += [task for task in TASKS.values() if not task.needs]
        elif name == "all":
            chosen += TASKS.values()
        elif name in TASKS:
            chosen.append(TASKS[name])
        else:
            raise ValueError(f"--tasks {name}: no task of RULER; use all, self-contained or names among {', '.join(TASKS)}")
    for task in chosen:
        if missing := materials.lacks(task):
            raise ValueError(f"{task.name} needs a text of yours: give it with {missing} FILE, or use --tasks self-contained")
        materials.read(task)
    return list({task.name: task for task in chosen}.values())


def run(
    subject: Subject,
    units: Units,
    tasks: Sequence[Task],
    lengths: Sequence[int],
    samples: int,
    batch: int,
    materials: Materials,
    seed: int,
    progress: Progress,
) -> list[str]:
    """Score every (task, length) that ``units`` does not hold yet. batch: prompts answered at once.

    Returns a sentence for each that cannot be built: it keeps no other from being scored.
    Raises ValueError where the model has no tokenizer.
    """
    if tasks:
        subject.need_tokenizer()
    problems = []
    for length in lengths:
        for task in tasks:
            text = {task.needs: str(getattr(materials, task.needs))} if task.needs else {}
            try:
                units.add(
                    f"ruler-{task.name}-{length}",
                    "ruler",
                    {"samples": samples, "seed": seed, **text},
                    lambda task=task, length=length: _score(subject, task, length, samples, batch, materials, seed, progress),
                )
            except ValueError as error:
                problems.append(f"{error} (--lengths {length})")
    return problems


def _score(
    subject: Subject, task: Task, length: int, samples: int, batch: int, materials: Materials, seed: int, progress: Progress
) -> dict[str, Any]:
    """Score and answers of one task at one length. Raises ValueError where its samples cannot be built."""
    started = time.perf_counter()
    made = generate(task, length, samples, subject.count, materials, seed)
    lines: list[dict] = []
    while group := list(islice(made, batch)):
        answers = subject.answer([sample.prompt for sample in group], task.family.answer_tokens)
        lines += [
            {"answer": answer, "references": sample.references, "tokens": sample.tokens}
            for answer, sample in zip(answers, group, strict=True)
        ]
        progress(f"{task.name} at {length}", len(lines), samples)
    found = score(task.family, [line["answer"] for line in lines], [line["references"] for line in lines])
    empty = sum(not line["answer"].strip() for line in lines)
    seconds = time.perf_counter() - started
    return {
        "task": task.name, "length": length, "samples": samples, "seed": seed, "score": found, "empty": empty, "seconds": seconds,
        "lines": lines,
    }  # fmt: skip
