"""Progress line, TensorBoard and metrics.jsonl (rank 0)."""

from __future__ import annotations

import json
import logging
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from swax_megatron.callbacks.callback import Callback
from swax_megatron.config import to_dict, to_yaml
from swax_megatron.errors import RunError
from swax_megatron.hardware import peak_tflops
from swax_megatron.model.cost import param_count, training_flops
from swax_megatron.state import StepResult

if TYPE_CHECKING:
    from swax_megatron.trainer import Trainer

_log = logging.getLogger(__name__)


class Metrics(Callback):
    """Every step's scalars, one x-axis: the 0-based step. A resumed run drops what a killed one wrote beyond its checkpoint."""

    def __init__(self, run_dir: str) -> None:
        self.run_dir = Path(run_dir)
        self.writer: SummaryWriter | None = None
        self.peak = 0.0

    def on_start(self, trainer: Trainer) -> None:
        config, first = trainer.config, trainer.state.step
        self.peak = peak_tflops(config.monitor.peak_tflops, config.train.precision, trainer.groups.device)  # on every rank: equal load
        self.started, self.first = time.perf_counter(), first
        if trainer.groups.rank != 0:
            return
        self.run_dir.mkdir(parents=True, exist_ok=True)
        self.path = self.run_dir / "metrics.jsonl"
        _keep_steps_before(self.path, first)
        self.lines = self.path.open("a", encoding="utf-8")
        self.writer = SummaryWriter(str(self.run_dir / "tensorboard"), purge_step=first)
        self.writer.add_text("config", "```yaml\n" + to_yaml(config) + "```", first)
        for summary in hparams(_flat(to_dict(config)), {"loss/train": float("nan")}):
            self.writer.file_writer.add_summary(summary, first)
        _log.info(
            "%s parameters, step %d of %d, %d processes (tensor %d, pipeline %d, context %d, data %d) on %s, run directory %s",
            f"{param_count(config.model):,}",
            first,
            config.train.steps,
            trainer.groups.world_size,
            trainer.groups.tensor_size,
            trainer.groups.pipeline_size,
            trainer.groups.context_size,
            trainer.groups.replicas,
            trainer.groups.device.type,
            self.run_dir,
        )

    def on_rewind(self, trainer: Trainer, step: int) -> None:
        if self.writer is None:
            return
        self.lines.close()
        _keep_steps_before(self.path, trainer.state.step)
        self.lines = self.path.open("a", encoding="utf-8")
        self.writer.close()
        self.writer = SummaryWriter(str(self.run_dir / "tensorboard"), purge_step=trainer.state.step)

    def after_step(self, trainer: Trainer, result: StepResult) -> None:
        if self.writer is None or trainer.state.step <= result.step:
            return  # not rank 0, or undone by a rewind
        metrics, config = result.metrics, trainer.config
        rate = result.tokens / result.seconds / trainer.groups.world_size
        tflops = training_flops(config.model, config.data.sequence_length, result.windows) * rate / 1e12
        metrics.update(
            {
                "throughput/tokens_per_second_per_device": rate,
                "throughput/model_tflops": tflops,
                "throughput/mfu": tflops / self.peak,
                "data/epoch": max(trainer.data.epochs(trainer.state.data).values()),
                **_memory(trainer.groups.device),
            }
        )
        try:
            for name, value in metrics.items():
                self.writer.add_scalar(name, value, result.step)
            for name, values in result.histograms.items():
                self.writer.add_histogram(name, np.array(values), result.step)
            self.lines.write(json.dumps({"step": result.step, **metrics}) + "\n")
            self.lines.flush()
        except OSError as error:
            raise RunError(f"step {result.step}: metrics of {self.run_dir} cannot be written ({error}); mend that, start again") from error
        last = result.step + 1 == config.train.steps
        if last or result.step == self.first or (result.step + 1) % config.monitor.log_interval == 0:
            _log.info(self._progress(trainer, result))

    def on_end(self, trainer: Trainer) -> None:
        if self.writer is not None:
            self.writer.close()
            self.lines.flush()
            os.fsync(self.lines.fileno())
            self.lines.close()

    def _progress(self, trainer: Trainer, result: StepResult) -> str:
        metrics, total = result.metrics, trainer.config.train.steps
        done = result.step + 1
        eta = (time.perf_counter() - self.started) / (done - self.first) * (total - done)
        validation = f" · validation {metrics['loss/validation']:.4f}" if "loss/validation" in metrics else ""
        speed = metrics["throughput/tokens_per_second_per_device"] * trainer.groups.world_size
        return (
            f"step {done}/{total} · loss {metrics['loss/train']:.4f}{validation} · window {_range(result.attention_windows)} · "
            f"{speed:,.0f} tok/s · MFU {metrics['throughput/mfu']:.1%} · ETA {_clock(eta)}"
        )


def _range(windows: tuple[int, ...]) -> str:
    return str(windows[0]) if len(set(windows)) == 1 else f"{min(windows)}-{max(windows)}"


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def _memory(device: torch.device) -> dict[str, float]:
    if device.type != "cuda":
        return {}
    return {
        "memory/max_reserved_gib": torch.cuda.max_memory_reserved(device) / 2**30,
        "memory/alloc_retries": float(torch.cuda.memory_stats(device).get("num_alloc_retries", 0)),
    }


def _flat(node: dict, prefix: str = "") -> dict[str, bool | int | float | str]:
    """Dotted names and plain values, which is what TensorBoard's hparams tab takes."""
    flat: dict[str, bool | int | float | str] = {}
    for key, value in node.items():
        if isinstance(value, dict):
            flat.update(_flat(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = value if isinstance(value, (bool, int, float, str)) else json.dumps(value)
    return flat


def _keep_steps_before(path: Path, step: int) -> None:
    """Drop the lines of steps that will be done again, and a half-written last line."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line)["step"] < step:
                kept.append(line)
        except (json.JSONDecodeError, KeyError):
            continue  # a killed process may leave half a line
    aside = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    aside.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
    aside.replace(path)
