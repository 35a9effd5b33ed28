"""Refusals of how optimizer state, gradients and weights are partitioned, reduced, gathered and offloaded."""

from __future__ import annotations

from swax_megatron.schema import Config


def check_sharding(config: Config, cuda: bool | None) -> None:
    """cuda: whether the run has a GPU; None asks this machine, where the configuration depends on it."""
    if config.optimizer.backend == "zero":
        _check_zero(config)
    elif config.optimizer.overlap_parameters and not config.optimizer.overlap_gradients:
        raise ValueError(
            "optimizer.overlap_parameters=True: Megatron-core gathers weights by the buckets of the overlapped reduction; "
            "set optimizer.overlap_gradients=true as well"
        )
    if config.optimizer.offload:
        _check_offload(config, cuda)


def _check_zero(config: Config) -> None:
    optimizer, stages = config.optimizer, config.parallel.pipeline
    stage = optimizer.zero_stage
    if not 0 <= stage <= 3:
        raise ValueError(f"optimizer.zero_stage={stage}: ZeRO has the stages 0 to 3; use optimizer.zero_stage=1")
    if stage == 2 and stages > 1:
        raise ValueError(
            f"optimizer.zero_stage=2: with parallel.pipeline={stages} a stage's gradients would have to be reduced inside every slot "
            "of the schedule, or kept whole until its end, which saves nothing over stage 1; use optimizer.zero_stage=1"
        )
    if stage == 3 and stages > 1:
        raise ValueError(
            f"optimizer.zero_stage=3: with parallel.pipeline={stages} every slot of the schedule would gather the stage's weights anew, "
            "while forward and backward passes of several microbatches hold them at once; use optimizer.zero_stage=1"
        )
    if optimizer.overlap_parameters:
        raise ValueError(
            "optimizer.overlap_parameters=True: DeepSpeed gathers updated weights at the end of the step (stage 3: ahead of their use, "
            "without being asked); use optimizer.backend=megatron or optimizer.overlap_parameters=false"
        )
    if optimizer.overlap_gradients and stage == 0:
        raise ValueError(
            "optimizer.overlap_gradients=True: ZeRO stage 0 averages all gradients after backward; "
            "use optimizer.zero_stage=1, or optimizer.backend=megatron"
        )
    if optimizer.overlap_gradients and stages > 1:
        raise ValueError(
            f"optimizer.overlap_gradients=True: with parallel.pipeline={stages} DeepSpeed's backward hooks cannot know the last "
            "microbatch, Megatron-core's do; use optimizer.backend=megatron or optimizer.overlap_gradients=false"
        )


def _check_offload(config: Config, cuda: bool | None) -> None:
    optimizer = config.optimizer
    if optimizer.backend != "zero":
        raise ValueError("optimizer.offload=True: is DeepSpeed's; use optimizer.backend=zero or optimizer.offload=false")
    if optimizer.zero_stage == 0:
        raise ValueError(
            "optimizer.offload=True: at ZeRO stage 0 every rank would update all weights on the host; use optimizer.zero_stage=1"
        )
    if optimizer.overlap_gradients:
        raise ValueError(
            "optimizer.offload=True: gradients on their way to the host are not reduced under way as well; "
            "set optimizer.overlap_gradients=false"
        )
    if optimizer.zero_stage > 1 and config.parallel.sequence:
        raise ValueError(
            f"optimizer.offload=True: at ZeRO stage {optimizer.zero_stage} gradients leave the device before those of norms are added up "
            "over the tensor-parallel ranks; use optimizer.zero_stage=1 or parallel.sequence=false"
        )
    if cuda is None:
        import torch

        cuda = torch.cuda.is_available()
    if not cuda:
        raise ValueError("optimizer.offload=True: there is no GPU, so that all memory is the host's; use optimizer.offload=false")
