"""DeepSpeed ZeRO stage 1 under Megatron's schedules.

DeepSpeed's engine wants to own backward; Megatron's schedules do. So the ZeRO optimizer is used directly: its hooks
accumulate every microbatch's gradient in fp32, and ``step`` reduces once over the data-parallel ranks. What Megatron's
``finalize_model_grads`` would do besides (norm gradients under sequence parallelism, tied embeddings) is done here,
before that reduction.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os

import torch
import torch.distributed as dist
from torch import Tensor, nn

from swax_megatron.checkpoint.store import Fragment
from swax_megatron.optim.backend import Piece, adamw_arguments, decay_groups, fragments, step_tensor
from swax_megatron.parallel.groups import Groups
from swax_megatron.schema import Config

os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
import deepspeed  # noqa: E402  (reads DS_ACCELERATOR when imported)
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer  # noqa: E402
from deepspeed.utils.timer import NoopTimer  # noqa: E402

_BUCKET_ELEMENTS = 50_000_000  # DeepSpeed's default of 5e8 takes about 2 GB a process


class _ModelParallelUnit:
    """What DeepSpeed asks of Megatron's groups. Model parallel means tensor x pipeline."""

    def __init__(self, groups: Groups) -> None:
        self._groups = groups

    def get_model_parallel_group(self) -> dist.ProcessGroup:
        return self._groups.model

    def get_model_parallel_world_size(self) -> int:
        return self._groups.model.size()

    def get_model_parallel_rank(self) -> int:
        return self._groups.model.rank()

    def get_tensor_model_parallel_group(self) -> dist.ProcessGroup:
        return self._groups.tensor

    def get_tensor_model_parallel_rank(self) -> int:
        return self._groups.tensor_rank

    def get_tensor_model_parallel_world_size(self) -> int:
        return self._groups.tensor_size

    def get_data_parallel_group(self) -> dist.ProcessGroup:
        return self._groups.data

    def get_data_parallel_rank(self) -> int:
        return self._groups.data_rank

    def get_data_parallel_world_size(self) -> int:
        return self._groups.data_size


class ZeroBackend:
    """AdamW whose fp32 masters and moments are partitioned over the data-parallel ranks (Rajbhandari et al. 2020)."""

    def __init__(self, config: Config, chunks: list[nn.Module], groups: Groups) -> None:
        self.chunks, self._groups = chunks, groups
        logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
        with contextlib.redirect_stdout(io.StringIO()):  # it announces a build of its C++ op even when it only loads it
            deepspeed.init_distributed(dist_backend=dist.get_backend(), verbose=False)
        for chunk in chunks:
            chunk.config.finalize_model_grads_func = None
            chunk.config.no_sync_func = None
            for parameter in chunk.parameters():
                if getattr(parameter, "shared", False):
                    parameter.ds_pipe_replicated = True  # a tied copy must not count twice in the gradient norm
        largest = max(parameter.numel() for chunk in chunks for parameter in chunk.parameters())
        names = {parameter: f"{i}.{name}" for i, chunk in enumerate(chunks) for name, parameter in chunk.named_parameters()}
        self._zero = DeepSpeedZeroOptimizer(
            torch.optim.AdamW(decay_groups(chunks, config), **adamw_arguments(config)),
            names,
            timers=NoopTimer(),
            optimizer_params={},
            contiguous_gradients=False,
            reduce_bucket_size=max(_BUCKET_ELEMENTS, largest),
            allgather_bucket_size=_BUCKET_ELEMENTS,
            dp_process_group=groups.data,
            reduce_scatter=True,
            overlap_comm=False,
            mpu=_ModelParallelUnit(groups),
            clip_grad=config.optimizer.clip_grad,
            gradient_accumulation_dtype=torch.float32,
            communication_data_type=torch.float32,
            partition_grads=False,
            check_grad_overflow=False,
        )
        self._make_state()

    def zero_grad(self) -> None:
        self._zero.zero_grad(set_to_none=True)

    def reduce(self) -> float:
        self._reduce_over_model_parallel_ranks()
        self._zero.set_gradient_accumulation_boundary(True)
        self._zero.reduce_gradients(pipeline_parallel=True)
        known = self._zero.scaled_global_norm()
        self._zero.scaled_global_norm = lambda norm_type=2: known  # step() would compute it a second time
        norm = float(known)
        return norm if norm >= 0.0 else float("nan")  # DeepSpeed may mask a norm that is not finite as -1

    def update(self, learning_rate: float) -> None:
        for group in self._zero.optimizer.param_groups:
            group["lr"] = learning_rate
        self._zero.step()
        self._forget_gradients()

    def discard(self) -> None:
        self._zero._release_preflattened_grad_buffers()  # as DeepSpeed does after an overflow
        for index in self._zero.averaged_gradients:
            self._zero.averaged_gradients[index] = self._zero.all_grad_tensors[index] = None
        self._zero.micro_step_id = -1
        self._forget_gradients()

    def _forget_gradients(self) -> None:
        del self._zero.scaled_global_norm  # the class's own again
        self._zero.zero_grad(set_to_none=True)

    def fragments(self, *, saving: bool) -> list[Fragment]:
        pieces = []
        for group in self._zero.bit16_groups:
            for parameter in group:
                mapping = parameter._hp_mapping
                if mapping is None:
                    continue  # no part of it lives on this data-parallel rank
                tensors = {
                    "param": mapping.get_hp_fragment().detach(),
                    "exp_avg": mapping.get_hp_fragment("exp_avg"),
                    "exp_avg_sq": mapping.get_hp_fragment("exp_avg_sq"),
                }
                pieces.append(Piece(parameter, mapping.lp_fragment_address.start, tensors))
        return fragments(self.chunks, pieces, self._groups, saving=saving)

    def loaded(self, updates: int) -> None:
        for flat in self._zero.single_partition_of_fp32_groups:
            self._zero.optimizer.state[flat]["step"] = step_tensor(updates)
        self._zero.update_lp_params()  # model weights from the masters, gathered over the data-parallel ranks

    def _make_state(self) -> None:
        """AdamW would create its state in the first update, and DeepSpeed link only the first group's then."""
        for flat in self._zero.single_partition_of_fp32_groups:
            self._zero.optimizer.state[flat].update(
                step=step_tensor(0), exp_avg=torch.zeros_like(flat.data), exp_avg_sq=torch.zeros_like(flat.data)
            )
        self._zero._lazy_init_hp_params_optimizer_state()

    def _gradient(self, parameter: nn.Parameter) -> Tensor | None:
        return self._zero.get_gradient_for_reduction(parameter)

    def _reduce_over_model_parallel_ranks(self) -> None:
        parameters = [parameter for chunk in self.chunks for parameter in chunk.parameters()]
        if self._groups.tensor_size > 1:
            partial = [self._gradient(parameter) for parameter in parameters if parameter.sequence_parallel]
            if partial:
                flat = torch._utils._flatten_dense_tensors(partial)
                dist.all_reduce(flat, group=self._groups.tensor)
                for gradient, total in zip(partial, torch._utils._unflatten_dense_tensors(flat, partial), strict=True):
                    gradient.copy_(total)
        tied = self.chunks[0].share_embeddings_and_output_weights
        if tied and self._groups.pipeline_size > 1 and (self._groups.pipeline_rank == 0 or self._groups.is_last_stage):
            chunk = self.chunks[0] if self._groups.pipeline_rank == 0 else self.chunks[-1]
            dist.all_reduce(self._gradient(chunk.shared_embedding_or_output_weight()), group=self._groups.embedding)
