"""Scores of a model on RULER, one stored unit a task and length."""

from __future__ import annotations

import time
from collections.abc import Sequence
from itertools import islice

from swax_megatron.eval.model import Progress, Subject
from swax_megatron.eval.ruler.generate import Materials, generate
from swax_megatron.eval.ruler.score import score
from swax_megatron.eval.ruler.tasks import TASKS, Task
from swax_megatron.eval.units import Units


def choose_tasks(names: Sequence[str], materials: Materials) -> list[Task]:
    """Tasks by name; "all" for the thirteen, "self-contained" for those that need no text of the user's.

    Raises ValueError for an unknown name and for a task whose text is missing.
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
) -> None:
    """Score every (task, length) that ``units`` does not hold yet. batch: prompts answered at once."""
    for length in lengths:
        for task in tasks:
            name = f"ruler-{task.name}-{length}"
            stored = units.get(name)
            if stored is not None and (stored["samples"], stored["seed"]) == (samples, seed):
                continue
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
            units.put(
                name,
                {"kind": "ruler", "task": task.name, "length": length, "samples": samples, "seed": seed, "score": found,
                 "empty": sum(not line["answer"].strip() for line in lines), "seconds": time.perf_counter() - started, "lines": lines},
            )  # fmt: skip
