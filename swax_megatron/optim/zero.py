"""DeepSpeed ZeRO (Rajbhandari et al. 2020), stages 0 to 3, under Megatron's schedules.

DeepSpeed's engine wants to own backward; Megatron's schedules do. So the ZeRO optimizers are used directly: their hooks
take every microbatch's gradient, and ``step`` does what the engine would. What is kept apart on the data-parallel ranks:

* stage 0: nothing; gradients are averaged, every rank updates everything;
* stage 1: masters and moments. Gradients are accumulated whole, in fp32, and reduced once a step (or, with
  optimizer.overlap_gradients, bucket by bucket while the last microbatch's backward runs);
* stage 2: gradients as well. Each microbatch's are reduced as they appear and added up, in fp32, where they belong;
* stage 3: weights as well. They are gathered module by module in forward, in recomputation and in backward.

What Megatron's ``finalize_model_grads`` would do besides is done here: norm gradients under sequence parallelism are
added up over the tensor-parallel ranks, tied embeddings over the first and last stage.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn

from swax_megatron.checkpoint.store import Fragment
from swax_megatron.model.feedforward import SwiGLU
from swax_megatron.model.layers.mixer import Mixer
from swax_megatron.optim.backend import Piece, adamw_arguments, decay_groups, fragments, step_tensor
from swax_megatron.parallel.groups import Groups
from swax_megatron.schema import Config

os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
import deepspeed  # noqa: E402  (reads DS_ACCELERATOR when imported)
from deepspeed.runtime.utils import combine_grad_norm_groups, is_model_parallel_parameter  # noqa: E402
from deepspeed.runtime.zero.offload_config import DeepSpeedZeroOffloadOptimizerConfig  # noqa: E402
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3  # noqa: E402
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


def zero_backend(config: Config, chunks: list[nn.Module], groups: Groups) -> ZeroBackend:
    """The backend of optimizer.zero_stage."""
    stages = {0: WholeGradients, 1: WholeGradients, 2: PartitionedGradients, 3: PartitionedWeights}
    if config.optimizer.zero_stage == 1 and config.optimizer.overlap_gradients:
        return OverlappedGradients(config, chunks, groups)
    from swax_megatron.optim import direct

    if direct.serves(config, groups):
        return direct.DirectUpdate(config, chunks, groups)
    return stages[config.optimizer.zero_stage](config, chunks, groups)


class ZeroBackend(ABC):
    """What the stages share. ``_zero`` is DeepSpeed's optimizer."""

    def __init__(self, config: Config, chunks: list[nn.Module], groups: Groups) -> None:
        self.chunks, self._groups, self._config = chunks, groups, config
        logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
        with contextlib.redirect_stdout(io.StringIO()):  # it announces a build of its C++ op even when it only loads it
            deepspeed.init_distributed(dist_backend=dist.get_backend(), verbose=False)
        for chunk in chunks:
            chunk.config.finalize_model_grads_func = None
            chunk.config.no_sync_func = None
            for parameter in chunk.parameters():
                if getattr(parameter, "shared", False):
                    parameter.ds_pipe_replicated = True  # a tied copy must not count twice in the gradient norm
        self._parameters = [parameter for chunk in chunks for parameter in chunk.parameters()]
        # fused: one pass over weights, moments and gradients, and no intermediate copy of them
        self._zero = self._build(torch.optim.AdamW(decay_groups(chunks, config), fused=True, **adamw_arguments(config)))
        for flat in self._flat_masters():  # AdamW would create its state in the first update only
            self._zero.optimizer.state[flat].update(
                step=step_tensor(0, flat.device), exp_avg=torch.zeros_like(flat.data), exp_avg_sq=torch.zeros_like(flat.data)
            )

    @abstractmethod
    def _build(self, adamw: torch.optim.Optimizer) -> DeepSpeedZeroOptimizer | DeepSpeedZeroOptimizer_Stage3: ...

    def _flat_masters(self) -> list[Tensor]:
        """This rank's fp32 weights, one flat tensor a parameter group."""
        return self._zero.single_partition_of_fp32_groups

    def _arguments(self) -> dict:
        """What both of DeepSpeed's optimizers take."""
        optimizer = self._config.optimizer
        names = {parameter: f"{i}.{name}" for i, chunk in enumerate(self.chunks) for name, parameter in chunk.named_parameters()}
        sizes = [parameter.numel() for parameter in self._parameters]
        return {
            "param_names": names,
            "timers": NoopTimer(),
            "reduce_bucket_size": max(min(_BUCKET_ELEMENTS, sum(sizes)), *sizes),  # stage 3 holds a bucket of this size always
            "dp_process_group": self._groups.data,
            "reduce_scatter": True,
            "overlap_comm": optimizer.overlap_gradients,
            "mpu": _ModelParallelUnit(self._groups),
            "clip_grad": optimizer.clip_grad,
            "gradient_accumulation_dtype": torch.float32,
            "communication_data_type": torch.float32,
            "offload_optimizer_config": DeepSpeedZeroOffloadOptimizerConfig(device="cpu") if optimizer.offload else None,
        }

    def _build_stage_1_or_2(self, adamw: torch.optim.Optimizer, **special: object) -> DeepSpeedZeroOptimizer:
        arguments = {
            "optimizer_params": {},
            "contiguous_gradients": False,
            "allgather_bucket_size": _BUCKET_ELEMENTS,
            "check_grad_overflow": False,
            **self._arguments(),
            **special,
        }
        return DeepSpeedZeroOptimizer(adamw, arguments.pop("param_names"), **arguments)

    def zero_grad(self, microbatches: int) -> None:
        self._zero.zero_grad(set_to_none=True)

    def begin_reduce(self) -> None:
        """DeepSpeed's reductions wait for ``reduce``."""
        self._known_norm: Tensor | None = None

    def reduce(self) -> float:
        self._reduce()
        known = self._known_norm = self._norm()
        norm = float(known)
        return norm if norm >= 0.0 else float("nan")  # DeepSpeed may mask a norm that is not finite as -1

    def update(self, learning_rate: float) -> None:
        for group in self._zero.optimizer.param_groups:
            group["lr"] = learning_rate
        with self._norm_known():
            self._zero.step()
        self._zero.zero_grad(set_to_none=True)

    def discard(self) -> None:
        self._zero.micro_step_id = -1
        self._forget_partitions()
        self._zero.zero_grad(set_to_none=True)

    def close(self) -> None:
        self._zero.destroy()

    def _norm(self) -> Tensor:
        """The global norm of the reduced gradients (a collective), as DeepSpeed counts parameters.

        Its own makes a float64 copy of every gradient first, on a GPU a tenth of a short step; it stays where gradients lie in host memory.
        """
        if self._config.optimizer.offload:
            return self._deepspeed_norm()
        first = self._groups.tensor_rank == 0  # what tensor parallelism does not divide, all its ranks hold
        gradients = [
            gradient
            for parameter, gradient in self._partition_gradients()
            if not getattr(parameter, "ds_pipe_replicated", False) and (first or is_model_parallel_parameter(parameter))
        ]
        squared = _norm_of(gradients, self._zero.device).square()
        dist.all_reduce(squared, group=self._zero.dp_process_group)
        dist.all_reduce(squared, group=self._groups.model)
        return squared.sqrt().float()

    def _deepspeed_norm(self) -> Tensor:
        return self._zero.scaled_global_norm()

    def _partition_gradients(self) -> Iterator[tuple[nn.Parameter, Tensor]]:
        """Parameters with a part on this rank and the reduced gradient of that part."""
        for index, parameters in enumerate(self._zero.params_in_partition):
            real = (tensor for tensor in self._zero.averaged_gradients[index] if not getattr(tensor, "_zero_padding", False))
            yield from zip(parameters, real, strict=False)  # an unmarked padding may follow

    @contextlib.contextmanager
    def _norm_known(self) -> Iterator[None]:
        """DeepSpeed's step would compute the norm a second time."""
        self._zero.scaled_global_norm = lambda norm_type=2: self._known_norm
        try:
            yield
        finally:
            del self._zero.scaled_global_norm  # the class's own again

    def _forget_partitions(self) -> None:
        """As DeepSpeed does after an overflow."""
        self._zero._release_preflattened_grad_buffers()
        if self._config.optimizer.offload:
            self._zero.reset_cpu_buffers()
            return
        for added_up in (self._zero.averaged_gradients, self._zero.all_grad_tensors):
            added_up.update(dict.fromkeys(added_up))

    @abstractmethod
    def _reduce(self) -> None:
        """Bring the gradients of all microbatches and ranks where the update expects them."""

    def fragments(self, *, saving: bool) -> list[Fragment]:
        return fragments(self.chunks, self._pieces(), self._groups, saving=saving)

    def _pieces(self) -> Iterator[Piece]:
        self._zero._lazy_init_hp_params_optimizer_state()  # links every group's moments; DeepSpeed itself links the first only
        for parameter in (parameter for group in self._zero.bit16_groups for parameter in group):
            mapping = parameter._hp_mapping
            if mapping is not None:  # else no part of it lives on this data-parallel rank
                moments = {name: mapping.get_hp_fragment(name) for name in ("exp_avg", "exp_avg_sq")}
                yield Piece(parameter, mapping.lp_fragment_address.start, {"param": mapping.get_hp_fragment().detach(), **moments})

    def loaded(self, updates: int) -> None:
        for flat in self._flat_masters():
            self._zero.optimizer.state[flat]["step"] = step_tensor(updates, flat.device)
        self._zero.update_lp_params()  # model weights from the masters, gathered over the data-parallel ranks

    def _sum_over_tensor_ranks(self, gradients: Iterable[tuple[nn.Parameter, Tensor]]) -> None:
        """Under sequence parallelism a norm's gradient is that of a piece of the sequence."""
        partial = [gradient for parameter, gradient in gradients if parameter.sequence_parallel]
        if self._groups.tensor_size > 1 and partial:
            flat = torch._utils._flatten_dense_tensors(partial)
            dist.all_reduce(flat, group=self._groups.tensor)
            for gradient, total in zip(partial, torch._utils._unflatten_dense_tensors(flat, partial), strict=True):
                gradient.copy_(total)


class WholeGradients(ZeroBackend):
    """Stages 0 and 1: gradients accumulate whole and are reduced once a step, at any pipeline layout."""

    def _build(self, adamw: torch.optim.Optimizer) -> DeepSpeedZeroOptimizer:
        if self._config.optimizer.zero_stage == 0:
            alone = dist.new_group([dist.get_rank()], use_local_synchronization=True)
            return self._build_stage_1_or_2(adamw, partition_grads=False, dp_process_group=alone)
        return self._build_stage_1_or_2(adamw, partition_grads=False)

    def fragments(self, *, saving: bool) -> list[Fragment]:
        replica = self._config.optimizer.zero_stage == 0 and self._groups.data_rank > 0
        return [] if saving and replica else super().fragments(saving=saving)

    def _gradient(self, parameter: nn.Parameter) -> Tensor:
        return self._zero.get_gradient_for_reduction(parameter)

    def _reduce(self) -> None:
        self._reduce_over_model_parallel_ranks()
        if self._config.optimizer.zero_stage == 0:
            self._average_over_data_ranks()
        self._zero.set_gradient_accumulation_boundary(True)
        self._zero.reduce_gradients(pipeline_parallel=True)

    def _reduce_over_model_parallel_ranks(self) -> None:
        partial = [parameter for parameter in self._parameters if parameter.sequence_parallel and self._groups.tensor_size > 1]
        self._sum_over_tensor_ranks((parameter, self._gradient(parameter)) for parameter in partial)
        tied, groups = self.chunks[0].share_embeddings_and_output_weights, self._groups
        if tied and groups.pipeline_size > 1 and (groups.pipeline_rank == 0 or groups.is_last_stage):
            chunk = self.chunks[0] if groups.pipeline_rank == 0 else self.chunks[-1]
            dist.all_reduce(self._gradient(chunk.shared_embedding_or_output_weight()), group=groups.embedding)

    def _average_over_data_ranks(self) -> None:
        bucket: list[Tensor] = []
        for index, parameter in enumerate(self._parameters):
            bucket.append(self._gradient(parameter))
            if sum(tensor.numel() for tensor in bucket) >= _BUCKET_ELEMENTS or index + 1 == len(self._parameters):
                flat = torch._utils._flatten_dense_tensors(bucket)
                dist.all_reduce(flat, group=self._groups.data)
                flat /= self._groups.data_size
                for gradient, mean in zip(bucket, torch._utils._unflatten_dense_tensors(flat, bucket), strict=True):
                    gradient.copy_(mean)
                bucket = []


class _ByMicrobatch(ZeroBackend):
    """Stages whose communication runs inside backward: DeepSpeed must know where a microbatch ends and which is the last.

    One model chunk and no pipeline (validate() sees to it): a forward pass then begins only after the backward pass
    of the microbatch before it.
    """

    def __init__(self, config: Config, chunks: list[nn.Module], groups: Groups) -> None:
        super().__init__(config, chunks, groups)
        self._microbatches = self._begun = 0
        (chunk,) = chunks
        chunk.register_forward_pre_hook(self._before_forward)

    def zero_grad(self, microbatches: int) -> None:
        if self._begun:  # a step that was given up after its backward passes: empty the buckets, forget what was added up
            self._begun = 0
            self._zero.independent_gradient_partition_epilogue()
            self._forget_partitions()
        self._microbatches = microbatches
        super().zero_grad(microbatches)

    def _before_forward(self, chunk: nn.Module, _: object) -> None:
        if not (chunk.training and torch.is_grad_enabled()):
            return  # validation
        if self._begun:
            self._end_microbatch()
        self._begun += 1
        self._zero.set_gradient_accumulation_boundary(self._begun == self._microbatches)

    def _end_microbatch(self) -> None:
        """After the backward pass of a microbatch: reduce what is left in the bucket, add it up."""
        self._zero.independent_gradient_partition_epilogue()

    def _reduce(self) -> None:
        assert self._begun == self._microbatches, (self._begun, self._microbatches)
        self._begun = 0
        self._zero.independent_gradient_partition_epilogue()
        if not self._config.optimizer.offload:  # validate() allows offload only where there is nothing to add up
            self._sum_over_tensor_ranks(self._partition_gradients())


class OverlappedGradients(_ByMicrobatch):
    """Stage 1 whose reduction runs during the last microbatch's backward pass."""

    def _build(self, adamw: torch.optim.Optimizer) -> DeepSpeedZeroOptimizer:
        return self._build_stage_1_or_2(adamw, partition_grads=False)

    def _end_microbatch(self) -> None:
        """Gradients of a microbatch before the last stay where they accumulate."""


class PartitionedGradients(_ByMicrobatch):
    """Stage 2: a rank keeps the gradients of the weights that it updates."""

    def _build(self, adamw: torch.optim.Optimizer) -> DeepSpeedZeroOptimizer:
        return self._build_stage_1_or_2(adamw, partition_grads=True)


class PartitionedWeights(_ByMicrobatch):
    """Stage 3: a rank keeps an equal flat range of every parameter, padded at the end."""

    def _build(self, adamw: torch.optim.Optimizer) -> DeepSpeedZeroOptimizer_Stage3:
        (chunk,) = self.chunks
        model = self._config.model
        zero = DeepSpeedZeroOptimizer_Stage3(
            chunk,
            adamw,
            # without this, DeepSpeed replaces torch.nn.functional.linear in the whole process
            ds_config={"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3, "memory_efficient_linear": False}},
            prefetch_bucket_size=_BUCKET_ELEMENTS,
            # norms, biases and gates stay whole: gathering them costs a message each and saves nothing
            param_persistence_threshold=model.hidden_size * model.mlstm_heads,
            offload_ratio=1.0,
            **self._arguments(),
        )
        if chunk.share_embeddings_and_output_weights:  # the head uses a weight that another module owns
            deepspeed.zero.register_external_parameter(chunk.output_layer, chunk.embedding.word_embeddings.weight)
        for module in chunk.modules():
            for parameter in module.borrowed() if isinstance(module, (Mixer, SwiGLU)) else ():
                deepspeed.zero.register_external_parameter(module, parameter)
        return zero

    def _flat_masters(self) -> list[Tensor]:
        return self._zero.fp32_partitioned_groups_flat

    def _deepspeed_norm(self) -> Tensor:
        return combine_grad_norm_groups(self._zero._get_norm_groups())

    @contextlib.contextmanager
    def _norm_known(self) -> Iterator[None]:
        self._zero._get_norm_groups = lambda: [self._known_norm]
        try:
            yield
        finally:
            del self._zero._get_norm_groups

    def _forget_partitions(self) -> None:
        """The next step's first microbatch overwrites them."""

    def _before_forward(self, chunk: nn.Module, inputs: object) -> None:
        super()._before_forward(chunk, inputs)
        self._zero.micro_step_id = max(self._begun - 1, 0)  # the first microbatch overwrites, the others add

    def _partition_gradients(self) -> Iterator[tuple[nn.Parameter, Tensor]]:
        for index, parameters in enumerate(self._zero.fp16_groups):
            yield from zip(parameters, self._zero.averaged_gradients[index], strict=True)

    def _pieces(self) -> Iterator[Piece]:
        for group, flat in zip(self._zero.fp16_groups, self._flat_masters(), strict=True):
            state = {"param": flat.detach(), **{name: self._zero.optimizer.state[flat][name] for name in ("exp_avg", "exp_avg_sq")}}
            for parameter in group:
                _, offset, size = self._zero.grad_position[self._zero.get_param_id(parameter)]
                start = size * self._groups.data_rank
                real = min(size, parameter.ds_numel - start)  # the rest is padding
                if real > 0:
                    yield Piece(parameter, start, {name: tensor[offset : offset + real] for name, tensor in state.items()})

    def loaded(self, updates: int) -> None:
        zero = self._zero
        zero._partition_all_parameters()
        for index, flat in enumerate(self._flat_masters()):
            zero.optimizer.state[flat]["step"] = step_tensor(updates, flat.device)
            zero._reassign_or_swap_out_partitioned_parameters(index)
        if zero.persistent_parameters:
            zero.persistent_parameters[0].all_gather(zero.persistent_parameters)


def _norm_of(gradients: list[Tensor], device: torch.device) -> Tensor:
    """Of all elements, in float64. A GPU sums pieces of a tensor apart in float32, a CPU from end to end, which loses digits."""
    if not gradients:
        return torch.zeros((), dtype=torch.float64, device=device)
    if gradients[0].is_cuda:
        alike = [[gradient for gradient in gradients if gradient.dtype is kind] for kind in {gradient.dtype for gradient in gradients}]
        return torch.stack([norm for some in alike for norm in torch._foreach_norm(some, 2, dtype=torch.float32)]).double().norm()
    return torch.stack([torch.linalg.vector_norm(gradient, dtype=torch.float64) for gradient in gradients]).norm()
