"""Multi-query recall by gap: which share of values is recalled at which distance (rows: ``swax_megatron/data/recall.py``)."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from swax_megatron.data.recall import RecallTask, gap_ranges, make_row
from swax_megatron.eval.model import Progress, Subject


def by_gap(subject: Subject, task: RecallTask, rows: int, batch: int, seed: int, progress: Progress) -> dict[str, Any]:
    """Share of values recalled, by gap, over ``rows`` rows of each range of gaps.

    Raises ValueError where the model's vocabulary is not the task's.
    """
    if subject.model.config.vocab_size != task.vocabulary:
        raise ValueError(
            f"{subject.name} knows {subject.model.config.vocab_size} ids and the recall task has {task.vocabulary}: "
            "give --recall-keys, --recall-values and --recall-fillers of its training data"
        )
    ranges, table = gap_ranges(task.length), []
    for index, gap_range in enumerate(ranges):
        right = asked = 0
        for start in range(0, rows, batch):
            made = [make_row(task, seed, index * rows + number, gap_range) for number in range(start, min(rows, start + batch))]
            ids_bt = torch.from_numpy(np.stack([row.ids for row in made]))
            guess_bt = torch.cat([logits.argmax(-1).cpu() for _, logits in subject.logits(ids_bt[:, :-1])], 1)
            wanted = torch.from_numpy(np.stack([row.mask for row in made])[:, 1:]).bool()
            right += int((guess_bt == ids_bt[:, 1:])[wanted].sum())
            asked += int(wanted.sum())
        table.append({"from": gap_range[0], "to": gap_range[1], "accuracy": right / max(asked, 1), "queries": asked})
        progress("recall", index + 1, len(ranges))
    return {"length": task.length, "rows": rows, "seed": seed, "by_gap": table}
