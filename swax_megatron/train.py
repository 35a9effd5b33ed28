"""Pretrain a SWAX language model: the program that every rank runs.

    torchrun --nproc-per-node 2 -m swax_megatron.train configs/demo.yaml train.steps=50

``python -m launcher.run`` starts it on this machine with the number of processes that the configuration needs.
"""

from __future__ import annotations

import argparse
import logging
import os
import socket
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import psutil
import torch

from swax_megatron.config import describe, load_config, to_yaml
from swax_megatron.errors import ExitCode, RunError
from swax_megatron.parallel import device
from swax_megatron.resilience import STOP_FILE
from swax_megatron.resilience.events import Events
from swax_megatron.resilience.stop import StopRequest
from swax_megatron.schema import Config
from swax_megatron.validate import validate, validate_inputs, validate_run_dir

_log = logging.getLogger(__name__)


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse, validate, run.

    The exit code is 0; 75 where it was told to stop and has saved; 2 after one clear sentence for a mistake in the input; 1
    after one for a run that cannot go on; 70 after a traceback. SWAX_LOG_LEVEL=DEBUG shows where a sentence comes from.
    """
    stop = StopRequest()
    stop.install()
    parser = argparse.ArgumentParser(
        prog="python -m swax_megatron.train",
        description=__doc__,
        epilog="Fields (section.field=default  meaning):\n" + describe(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("config", help="YAML file, e.g. configs/demo.yaml")
    parser.add_argument("overrides", nargs="*", help="section.field=value, e.g. train.steps=50")
    options = parser.parse_args(arguments)
    rank = int(os.environ.get("RANK", "0"))
    level = os.environ.get("SWAX_LOG_LEVEL", "INFO" if rank == 0 else "WARNING")
    logging.basicConfig(level=level, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    events: Events | None = None
    try:
        config = load_config(options.config, options.overrides)
        validate(config, int(os.environ.get("WORLD_SIZE", "1")))
        validate_inputs(config)
        validate_run_dir(config)
        stop.file = Path(config.run_dir) / STOP_FILE
        if rank == 0:
            events = Events.of_next_attempt(config.run_dir)
            events.write("start", **_origin())
        code = run(config, stop, events)
    except (ValueError, RunError) as error:
        print(f"error: {error}", file=sys.stderr, flush=True)  # the launcher shows rank 0's; the others' stand in their logs
        _log.debug("raised here:", exc_info=True)
        code = ExitCode.USER_ERROR if isinstance(error, ValueError) else ExitCode.RUN_ERROR
    except Exception:  # told in full; the code says that another start may help
        traceback.print_exc()
        code = ExitCode.CRASHED
    if events is not None:
        events.write("end", code=int(code))
    return code


def run(config: Config, stop: StopRequest, events: Events | None = None) -> ExitCode:
    """Join the job, build, load, fit."""
    _single_process_defaults()
    quiet_libraries()
    if config.train.threads:
        torch.set_num_threads(config.train.threads)
    if config.train.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    os.environ.setdefault("TORCH_FR_BUFFER_SIZE", "2000")  # collectives that a hang's report shows
    device.install_cpu_shim()
    # imported here: Megatron must see the shim, and --help and refused configurations need none of it
    from swax_megatron.build import build_trainer
    from swax_megatron.parallel import groups

    joined = groups.initialize(config)
    trainer, checkpoints = build_trainer(config, joined, stop, events)
    checkpoints.resume(trainer)
    if joined.rank == 0:
        _write_resolved(config)
    trainer.fit()
    groups.shut_down()
    return ExitCode.FINISHED if trainer.state.step == config.train.steps else ExitCode.PREEMPTED


def _origin() -> dict[str, Any]:
    """Where and as what this process was started."""
    began = round(psutil.Process().create_time(), 3)
    processes, job = int(os.environ.get("WORLD_SIZE", "1")), os.environ.get("SLURM_JOB_ID")
    return {"began": began, "host": socket.gethostname(), "pid": os.getpid(), "processes": processes, "job": job}


def leave(code: int) -> NoReturn:
    """End this process.

    After a failure at once: the other ranks wait in a collective that this one left, and the libraries' own goodbye
    would wait for them.
    """
    if code not in (ExitCode.FINISHED, ExitCode.PREEMPTED):
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def _single_process_defaults() -> None:
    """What torchrun sets, for a process started by hand."""
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}.items():
        os.environ.setdefault(name, value)


def quiet_libraries() -> None:
    """Megatron and DeepSpeed warn of optional packages on every rank."""
    import warnings

    for module in ("megatron", "deepspeed", "torch.distributed"):
        warnings.filterwarnings("ignore", module=module)
    warnings.filterwarnings("ignore", message="Transformer Engine and Apex are not installed")
    # Megatron's optimizer clears the gradients of views; on the CPU the call comes through the shim
    warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor that is not a leaf", module="swax_megatron.parallel.device")
    logging.getLogger("megatron").setLevel(logging.ERROR)


def _write_resolved(config: Config) -> None:
    path = Path(config.run_dir) / "config.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    aside.write_text(to_yaml(config), encoding="utf-8")
    aside.replace(path)


if __name__ == "__main__":
    leave(main())
