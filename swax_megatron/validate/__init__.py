"""Every refusal of a configuration, before any process exists.

``validate`` looks at the values alone, ``validate_inputs`` at the data folders they name. Each ValueError names the
field, its value and what to do. Nothing here imports megatron; torch is asked for a GPU and for nothing else.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from swax_megatron.model.pattern import parse_pattern
from swax_megatron.resilience import STOP_FILE
from swax_megatron.schema import Config
from swax_megatron.validate.data import check_data, validate_inputs
from swax_megatron.validate.model import check_model, check_window
from swax_megatron.validate.parallel import check_pipeline, check_row_pieces, check_tensor_parallel, check_world, model_parallel_size
from swax_megatron.validate.ranges import check_ranges
from swax_megatron.validate.sharding import check_sharding
from swax_megatron.validate.training import (
    check_batch_ramp,
    check_checkpoint,
    check_fp8,
    check_kernels,
    check_monitor,
    check_optimizer,
    check_resilience,
)

__all__ = ["model_parallel_size", "validate", "validate_inputs", "validate_run_dir"]


def validate(config: Config, world_size: int | None = None, cuda: bool | None = None) -> None:
    """Refuse what cannot run.

    world_size: processes of the run; None leaves out what depends on it
    cuda: whether the run has a GPU; None asks this machine
    Raises ValueError with the field, its value and the fix.
    """
    check_ranges(config)
    kinds = parse_pattern(config.model.pattern)
    check_model(config, kinds)
    check_window(config)
    check_data(config)
    check_batch_ramp(config)
    check_tensor_parallel(config, kinds)
    check_row_pieces(config)
    check_pipeline(config, len(kinds))
    check_world(config, world_size)
    check_sharding(config, cuda)
    check_optimizer(config)
    check_checkpoint(config)
    check_monitor(config)
    check_kernels(config, cuda)
    check_fp8(config, cuda)
    check_resilience(config, world_size)


def validate_run_dir(config: Config) -> None:
    """Refuse a run directory that cannot be written or holds a stop file; makes it where it is missing."""
    folder = Path(config.run_dir)
    if (folder / STOP_FILE).exists():
        raise ValueError(f"{folder / STOP_FILE} tells this run to stay stopped: remove the file to let it go on")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(f"run_dir={config.run_dir!r} cannot be written ({error.strerror}): name another folder") from error
