"""Megatron-core's own DistributedDataParallel and DistributedOptimizer, the second backend."""

from __future__ import annotations

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.optimizer_config import ParamKey, ParamPredicate
from torch import nn

from swax_megatron.checkpoint.store import Fragment
from swax_megatron.optim.backend import Piece, fragments, step_tensor
from swax_megatron.parallel.device import cuda_type_names
from swax_megatron.parallel.groups import Groups
from swax_megatron.schema import Config


class MegatronBackend:
    """AdamW with masters and moments partitioned over the data-parallel ranks by Megatron's gradient buffers."""

    def __init__(self, config: Config, chunks: list[nn.Module], groups: Groups) -> None:
        self._inner, self._groups = chunks, groups
        self._weight_decay = config.optimizer.weight_decay
        overlap = config.optimizer.overlap_gradients
        ddp = DistributedDataParallelConfig(
            grad_reduce_in_fp32=True,
            overlap_grad_reduce=overlap,
            overlap_param_gather=config.optimizer.overlap_parameters,
            use_distributed_optimizer=True,
            average_in_collective=False,
        )
        self.chunks = [
            DistributedDataParallel(chunk.config, ddp, chunk, disable_bucketing=index > 0) for index, chunk in enumerate(chunks)
        ]
        for chunk in chunks:
            chunk.config.finalize_model_grads_func = finalize_model_grads
            # the schedule leaves this context for the last microbatch, whose backward then reduces bucket by bucket
            no_sync = [wrapped.no_sync for wrapped in self.chunks]
            chunk.config.no_sync_func = (no_sync if len(no_sync) > 1 else no_sync[0]) if overlap else None
        settings = OptimizerConfig(
            optimizer="adam",
            lr=config.optimizer.learning_rate,
            min_lr=config.optimizer.min_learning_rate,
            weight_decay=config.optimizer.weight_decay,
            adam_beta1=config.optimizer.beta1,
            adam_beta2=config.optimizer.beta2,
            adam_eps=config.optimizer.eps,
            clip_grad=config.optimizer.clip_grad,
            bf16=config.train.precision == "bf16",
            params_dtype=chunks[0].config.params_dtype,
            use_distributed_optimizer=True,
            overlap_param_gather=config.optimizer.overlap_parameters,
        )
        undecayed = ParamKey(predicate=ParamPredicate(name="undecayed", fn=lambda parameter: not parameter.decay))
        with cuda_type_names():
            self._optimizer = get_megatron_optimizer(
                settings, self.chunks, config_overrides={undecayed: {"wd_mult": 0.0}}, use_gloo_process_groups=False
            )

    def zero_grad(self, microbatches: int) -> None:
        self._forget_gradients()

    def _forget_gradients(self) -> None:
        for chunk in self.chunks:
            chunk.zero_grad_buffer()
        self._optimizer.zero_grad()

    def begin_reduce(self) -> None:
        """Megatron's schedules have reduced already."""

    def reduce(self) -> float:
        with cuda_type_names():  # the gradients are reduced already: Megatron's schedules end with that
            if self._optimizer.prepare_grads():
                return float("inf")
            return float(self._optimizer.get_grad_norm())

    def update(self, learning_rate: float) -> None:
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate
            group["weight_decay"] = self._weight_decay * group["wd_mult"]
        with cuda_type_names():
            self._optimizer.step()

    def discard(self) -> None:
        self._forget_gradients()

    def close(self) -> None:
        """Megatron's hooks go with the model."""

    def fragments(self, *, saving: bool) -> list[Fragment]:
        pieces = []
        for optimizer in self._partitioned():
            for parameter, (group, order) in optimizer.model_param_group_index_map.items():
                main = optimizer.optimizer.param_groups[group]["params"][order]
                state = optimizer.optimizer.state[main]
                if "exp_avg" not in state:
                    state.update(step=step_tensor(0), exp_avg=torch.zeros_like(main.data), exp_avg_sq=torch.zeros_like(main.data))
                tensors = {"param": main.detach(), "exp_avg": state["exp_avg"], "exp_avg_sq": state["exp_avg_sq"]}
                tensors = {name: tensor.view(-1) for name, tensor in tensors.items()}
                start = optimizer._get_model_param_range_map(parameter)["param"].start
                pieces.append(Piece(parameter, start, tensors))
        return fragments(self._inner, pieces, self._groups, saving=saving)

    def loaded(self, updates: int) -> None:
        for optimizer in self._partitioned():
            for main in (main for group in optimizer.optimizer.param_groups for main in group["params"]):
                optimizer.optimizer.state[main]["step"] = step_tensor(updates)
            optimizer._copy_main_params_to_model_params()
        for chunk in self.chunks:
            chunk.start_param_sync(force_sync=True)  # every rank gathers what the others own

    def _partitioned(self) -> list:
        """Megatron chains one optimizer for dense and one for expert parameters; ours are all dense."""
        return getattr(self._optimizer, "chained_optimizers", [self._optimizer])
