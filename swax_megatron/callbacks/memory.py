"""Every N steps: what each head remembers and attends to, measured on the first training rows (``model/memory.py``)."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from swax_megatron.callbacks.callback import Callback
from swax_megatron.execution import Pass, run_microbatches
from swax_megatron.kernels.elementwise import rotary
from swax_megatron.model.layers.mlstm.mixer import MlstmMixer
from swax_megatron.model.layers.swa.mixer import AttentionMixer
from swax_megatron.model.memory import Report, attention_use, mlstm_memory, report_attention, report_mlstm
from swax_megatron.parallel.context import SequenceContext
from swax_megatron.state import StepResult

if TYPE_CHECKING:
    from swax_megatron.trainer import Trainer


class Memory(Callback):
    """Medians over heads as scalars, all heads as histograms. The same rows every time, at the step's windows.

    The longest document of the first row is measured (under context parallelism, of this rank's piece of it).
    """

    def after_step(self, trainer: Trainer, result: StepResult) -> None:
        if (result.step + 1) % trainer.config.monitor.memory_interval:
            return
        groups, train = trainer.groups, trainer.config.train
        plan, _ = trainer.data.plan(trainer.data.initial_state(), train.micro_batch_size * groups.replicas * groups.pipeline_size)
        heads: dict[str, Tensor] = {}
        with watched(trainer.backend.chunks, heads.setdefault), torch.no_grad():
            job = Pass(trainer.config, groups, trainer.backend.chunks, result.windows)
            run_microbatches(job, trainer.load_microbatches(plan), backward=False)
        first = groups.replica == 0 and (groups.context is None or groups.context.rank == 0)
        mine = {name: values.tolist() for name, values in heads.items()} if first else {}
        gathered: list[dict[str, list[float]]] | None = [{}] * groups.world_size if groups.rank == 0 else None
        dist.gather_object(mine, gathered, group=groups.cpu)  # ranks count tensor-parallel neighbours first: heads come in order
        for part in gathered or []:
            for name, values in part.items():
                result.histograms.setdefault(name, []).extend(values)
        result.metrics |= {name: statistics.median(values) for name, values in result.histograms.items()}


@contextmanager
def watched(chunks: list[torch.nn.Module], report: Report) -> Iterator[None]:
    """While open, the mixers of the model chunks report the statistics of what their cores are given."""
    mixers = [module for chunk in chunks for module in chunk.modules() if isinstance(module, (MlstmMixer, AttentionMixer))]
    for mixer in mixers:
        mixer.core = _reporting(mixer, report)  # on the instance: hides the class's own until it is deleted
    try:
        yield
    finally:
        for mixer in mixers:
            del mixer.core


def _reporting(mixer: MlstmMixer | AttentionMixer, report: Report):
    core = mixer.core

    def measured(context: SequenceContext, *inputs: Tensor) -> Tensor:
        document = _longest_document(context)
        parts = [tensor[:1, document] for tensor in inputs]
        if isinstance(mixer, MlstmMixer):
            report_mlstm(report, mixer.layer, mlstm_memory(*parts[:5], cap=mixer.config.model.gate_cap))
        else:
            if mixer.rope:
                model, kernels = mixer.config.model, mixer.config.kernels
                parts[:2] = rotary(*parts[:2], context.positions_bt[:1, document], model.rope_base, backend=kernels.backend)
            report_attention(report, mixer.layer, attention_use(*parts[:2], context.windows[mixer.layer]))
        return core(context, *inputs)

    return measured


def _longest_document(context: SequenceContext) -> slice:
    """Of the first row."""
    length = context.positions_bt.shape[1]
    edges = context.cu_seqlens.clamp(max=length)
    longest = int(edges.diff().argmax())
    return slice(int(edges[longest]), int(edges[longest + 1]))
