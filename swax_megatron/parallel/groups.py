"""All of Megatron's parallel state in one object that travels as an argument."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

from swax_megatron.parallel.context_exchange.ranks import ContextRanks
from swax_megatron.parallel.device import collective_backend, select_device
from swax_megatron.schema import Config


@dataclass(frozen=True)
class Groups:
    """The process groups of one run and this rank's place in them."""

    collection: ProcessGroupCollection
    tensor: dist.ProcessGroup
    pipeline: dist.ProcessGroup
    data: dist.ProcessGroup  # data x context parallel: the ranks that average gradients
    context: ContextRanks | None  # the ranks that share this rank's rows; None: it has whole rows
    model: dist.ProcessGroup  # tensor x pipeline: the ranks that hold one copy of the model
    embedding: dist.ProcessGroup | None  # first and last stage, for tied embeddings
    cpu: dist.ProcessGroup  # every rank, gloo: small objects, checkpoints
    device: torch.device

    @property
    def tensor_rank(self) -> int:
        return self.tensor.rank()

    @property
    def tensor_size(self) -> int:
        return self.tensor.size()

    @property
    def pipeline_rank(self) -> int:
        return self.pipeline.rank()

    @property
    def pipeline_size(self) -> int:
        return self.pipeline.size()

    @property
    def data_rank(self) -> int:
        return self.data.rank()

    @property
    def data_size(self) -> int:
        return self.data.size()

    @property
    def context_size(self) -> int:
        return self.context.size if self.context else 1

    @property
    def replica(self) -> int:
        """Which rows are read here: context-parallel ranks are one replica and share them."""
        return self.data_rank // self.context_size

    @property
    def replicas(self) -> int:
        return self.data_size // self.context_size

    @property
    def is_last_stage(self) -> bool:
        return self.pipeline_rank == self.pipeline_size - 1

    @property
    def rank(self) -> int:
        return dist.get_rank()

    @property
    def world_size(self) -> int:
        return dist.get_world_size()


def initialize(config: Config) -> Groups:
    """Join the job (RANK, WORLD_SIZE, LOCAL_RANK as torchrun sets them) and build every group."""
    device = select_device()
    backend = collective_backend()
    timeout = timedelta(seconds=config.train.distributed_timeout)
    if not dist.is_initialized():
        # No device_id: with it NCCL makes every group's communicator at once, 0.4 GB each on an H100, and Megatron makes 21 groups.
        dist.init_process_group(backend, timeout=timeout)
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=config.parallel.tensor,
        pipeline_model_parallel_size=config.parallel.pipeline,
        virtual_pipeline_model_parallel_size=config.parallel.virtual_pipeline,
        context_parallel_size=1,  # ours, not Megatron's: to Megatron the ranks that share a row are data-parallel ranks
        create_gloo_process_groups=False,
        distributed_timeout_minutes=max(1, round(config.train.distributed_timeout / 60)),
    )
    model_parallel_cuda_manual_seed(config.train.model_seed)
    data = parallel_state.get_data_parallel_group()
    joined = Groups(
        collection=ProcessGroupCollection.use_mpu_process_groups(),
        tensor=parallel_state.get_tensor_model_parallel_group(),
        pipeline=parallel_state.get_pipeline_model_parallel_group(),
        data=data,
        context=_context_ranks(config, data, timeout),
        model=parallel_state.get_model_parallel_group(),
        embedding=parallel_state.get_embedding_group(check_initialized=False),
        cpu=dist.group.WORLD if backend == "gloo" else dist.new_group(backend="gloo", timeout=timeout),
        device=device,
    )
    if backend == "nccl":
        _connect(joined)
    return joined


def _connect(joined: Groups) -> None:
    """Make the communicators that several ranks will use, all ranks at once: a wrong network is found here, and not by the first
    transfer between two stages, which NCCL leaves undefined while other stages have not joined."""
    for group in (joined.tensor, joined.pipeline, joined.data, joined.model, joined.context and joined.context.group):
        if group is not None and group.size() > 1:
            dist.all_reduce(torch.zeros(1, device=joined.device), group=group)


def context_layout(world_size: int, tensor: int, pipeline: int, context: int) -> list[list[int]]:
    """The ranks of every context-parallel group, each in the order of its pieces of a row.

    Megatron's order of ranks: tensor fastest, then data, then pipeline; neighbouring data-parallel ranks share rows.
    """
    data = world_size // (tensor * pipeline)
    starts = [stage * data * tensor + replica * context * tensor for stage in range(pipeline) for replica in range(data // context)]
    return [[start + piece * tensor + lane for piece in range(context)] for start in starts for lane in range(tensor)]


def rank_layout(world_size: int, tensor: int, pipeline: int, context: int) -> dict[str, list[list[int]]]:
    """The ranks of every group that ``initialize`` would build, by kind, from Megatron's own generator; no process is needed."""
    generator = parallel_state.RankGenerator(
        tp=tensor, ep=1, dp=world_size // (tensor * pipeline), pp=pipeline, cp=1, order="tp-cp-ep-dp-pp"
    )
    names = {"tensor": "tp", "pipeline": "pp", "data": "dp", "model": "tp-pp"}
    found = {name: generator.get_ranks(token) for name, token in names.items()}
    return found | {"context": context_layout(world_size, tensor, pipeline, context)}


def _context_ranks(config: Config, data: dist.ProcessGroup, timeout: timedelta) -> ContextRanks | None:
    parallel = config.parallel
    if parallel.context == 1:
        return None
    mine = None
    for ranks in context_layout(dist.get_world_size(), parallel.tensor, parallel.pipeline, parallel.context):
        group = dist.new_group(ranks, timeout=timeout)  # every rank makes every group, in one order
        if dist.get_rank() in ranks:
            mine = ContextRanks(group)
            first = data.rank() // parallel.context * parallel.context
            assert ranks == dist.get_process_group_ranks(data)[first : first + parallel.context], "Megatron orders ranks otherwise"
    return mine


def shut_down() -> None:
    """Leave every group; a later ``initialize`` in the same process may choose another layout."""
    parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()
