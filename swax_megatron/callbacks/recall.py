"""Every N steps: which share of values is recalled at which gap, at every window (rows: ``swax_megatron/data/recall.py``)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from swax_megatron.callbacks.callback import Callback
from swax_megatron.data.packing import Batch, pack
from swax_megatron.data.recall import EOS, RecallTask, gap_ranges, make_row
from swax_megatron.kernels import fp8
from swax_megatron.parallel.context import sequence_context
from swax_megatron.state import StepResult

if TYPE_CHECKING:
    from swax_megatron.trainer import Trainer

ROWS = 16  # of each range of gaps
SEED = 42  # as ``python -m swax_megatron.eval``: no rows of the training set


class Recall(Callback):
    """Scalars recall/window_W/gap_FROM: the same rows every time. Every rank holds the whole model and does the same."""

    def __init__(self, task: dict[str, Any] | None) -> None:
        """task: what the manifest of the first training source says of its rows."""
        if task is None:
            raise ValueError("monitor.recall_interval: the first training source holds no rows of data_prep/recall_rows.py; set it to 0")
        self.task = RecallTask(**task)
        self.batches: dict[int, Batch] = {}  # by the gaps' lower edge

    def on_start(self, trainer: Trainer) -> None:
        for index, (low, high) in enumerate(gap_ranges(self.task.length)):
            rows = [make_row(self.task, SEED, index * ROWS + number, (low, high)) for number in range(ROWS)]
            ids = np.stack([np.append(row.ids, EOS) for row in rows])  # as long as a row of training with its last target
            mask = np.stack([np.append(row.mask, 0) for row in rows])
            batch = pack(ids, mask, EOS, trainer.config.model.document_boundary)
            self.batches[low] = Batch(**{name: tensor.to(trainer.groups.device) for name, tensor in vars(batch).items()})

    def after_step(self, trainer: Trainer, result: StepResult) -> None:
        config, done = trainer.config, trainer.state.step
        if done % config.monitor.recall_interval and done != config.train.steps:
            return
        trainer.progress.enter("validation", result.step)
        (model,) = trainer.backend.chunks
        fp8.Weights.changed()  # by the update
        for window in sorted({*config.window.windows, config.window.test_window}):
            for low, batch in self.batches.items():
                with torch.no_grad():
                    logits_sbv = model(batch.inputs_bt, sequence_context(batch, trainer.windows.expand(window), trainer.groups.context))
                right_bt = logits_sbv.argmax(-1).transpose(0, 1) == batch.targets_bt
                share = (right_bt * batch.loss_mask_bt).sum() / batch.loss_mask_bt.sum().clamp(min=1)
                result.metrics[f"recall/window_{window}/gap_{low:05d}"] = share.item()
