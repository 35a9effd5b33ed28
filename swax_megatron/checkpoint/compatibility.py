"""What may differ between a checkpoint's configuration and the one that resumes it.

* Never: the model, the seeds of the weights and of the data order, the row length, packing and shuffling, names and order of
  the training sources there were, weights and batch sizes of steps already done, and whatever would give
  those steps another attention window. They are the past; another past is another run.
* With the field named in ``checkpoint.allow_change``: what alters the steps to come (train.steps, batch size, optimizer, window,
  precision, source weights now and from a later step on, further sources, and every field this file does not know).
* Freely: layout, backend, micro-batch, recomputation, kernels, monitoring, validation, checkpointing, resilience, paths.
"""

from __future__ import annotations

from math import ceil
from typing import Any

from swax_megatron.batching import batch_rows, batch_sizes, rows_before
from swax_megatron.config import from_dict, to_dict
from swax_megatron.model.window import WindowSchedule
from swax_megatron.schema import Config

_NEVER = {"train.model_seed", "train.data_seed", "data.sequence_length", "data.packing", "data.shuffle_tokens"}
_FREE_SECTIONS = {"parallel", "validation", "checkpoint", "kernels", "monitor", "resilience"}
_FREE = {
    "run_dir",
    "format_version",
    "data.validation",
    "data.tokenizer",
    "data.verify",
    "data.damaged",
    "data.workers",
    "data.prefetch",
    "data.cache",
    "data.cache_gib",
    "data.retries",
    "optimizer.backend",
    "optimizer.zero_stage",
    "optimizer.overlap_gradients",
    "optimizer.overlap_parameters",
    "optimizer.offload",
    "train.micro_batch_size",
    "train.recompute",
    "train.loss_chunk",
    "train.deterministic",
    "train.threads",
    "train.distributed_timeout",
    "window.check_interval",
    "window.test_window",
}


def check_resume(saved_config: dict[str, Any], config: dict[str, Any], allow_change: list[str], done_steps: int) -> list[str]:
    """Compare a checkpoint's configuration with the one that resumes it, both as ``config.to_dict`` gives them.

    Args:
        allow_change: dotted fields the user lets change (``checkpoint.allow_change``).
        done_steps: updates the checkpoint holds.

    Returns the accepted changes as lines ``field: old -> new``, for the log.
    Raises ValueError, listing every refused field with both values and the way out.
    """
    try:
        old = from_dict(saved_config)  # fills in fields that the checkpoint's version did not know
    except ValueError as error:
        raise ValueError(f"the checkpoint's configuration cannot be read by this version: {error}") from error
    new = from_dict(config)
    before, after = _flatten(to_dict(old)), _flatten(to_dict(new))
    accepted: list[str] = []
    never: list[str] = []
    flagged: list[str] = []
    for field in before:
        if before[field] == after[field]:
            continue
        line = f"{field}: {_short(before[field])} -> {_short(after[field])}"
        kind = _kind(field, before[field], after[field])
        if kind == "never":
            never.append(line)
        elif kind == "free" or field in allow_change:
            accepted.append(line)
        else:
            flagged.append(line)
    if never:
        raise ValueError(
            f"this resume would be another run ({'; '.join(never)}): put the checkpoint's values back, or start anew in another run_dir"
        )
    if flagged:
        names = ", ".join(line.partition(":")[0] for line in flagged)
        raise ValueError(
            f"this resume changes the run ({'; '.join(flagged)}): put the checkpoint's values back, "
            f"or name what you mean to change, checkpoint.allow_change=[{names}]"
        )
    if new.train.steps < done_steps:
        raise ValueError(f"train.steps={new.train.steps}: the checkpoint already holds {done_steps} updates; set train.steps to more")
    _check_windows(old, new, done_steps)
    _check_phases(old, new, done_steps)
    _check_learning_rate(old, new, allow_change, done_steps)
    return accepted


def _kind(field: str, before: Any, after: Any) -> str:
    section = field.partition(".")[0]
    if section == "model" or field in _NEVER:
        return "never"
    if section in _FREE_SECTIONS or field in _FREE:
        return "free"
    if field == "data.train":
        names_before, names_after = ([source["name"] for source in sources] for sources in (before, after))
        if names_after[: len(names_before)] != names_before:
            return "never"  # positions in the data are kept by the source's place in the list
        if [source["weight"] for source in before] == [source["weight"] for source in after]:
            return "free"  # only paths moved
    return "flag"


def _flatten(node: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in node.items():
        flat |= _flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


def _short(value: Any) -> str:
    if isinstance(value, list) and value and isinstance(value[0], dict) and "path" in value[0]:
        return "[" + ", ".join(f"{source['name']}*{source['weight']:g} at {source['path']}" for source in value) + "]"
    return repr(value)


def _check_windows(old: Config, new: Config, done_steps: int) -> None:
    """Refuse where a step already done would have had another window."""
    before, after = WindowSchedule.from_config(old), WindowSchedule.from_config(new)
    if before == after:
        return
    first = 0
    fields = ("schedule", "windows", "probabilities", "anneal_window", "per_layer", "seed")
    if before.schedule != "ramp" and all(getattr(before, name) == getattr(after, name) for name in fields):
        first = min(before.anneal_start, after.anneal_start)  # draws do not depend on the total
    step = next((step for step in range(first, done_steps) if _windows(before, step) != _windows(after, step)), None)
    if step is None:
        return
    fraction = 1.0 - before.anneal_start / after.steps
    keep = f"set window.anneal_fraction={fraction!r} to keep the first annealed step at {before.anneal_start}, " if fraction > 0 else ""
    raise ValueError(
        f"this resume would give step {step}, one of the {done_steps} already done, another attention window "
        f"(train.steps {before.steps} -> {after.steps}, first annealed step {before.anneal_start} -> {after.anneal_start}): "
        f"{keep}or put the window section, train.window_seed and train.steps back, or resume a checkpoint of step {step} or before"
    )


def _check_phases(old: Config, new: Config, done_steps: int) -> None:
    """Refuse a curriculum or a ramp of the batch that would give a step already done other weights or another batch."""
    weights = [[(change.step, change.weights) for change in c.data.curriculum if change.step < done_steps] for c in (old, new)]
    if weights[0] != weights[1]:
        raise ValueError(
            f"data.curriculum: changes before step {done_steps}, which is done, were {weights[0]} and would now be {weights[1]}: "
            "put them back; later ones may change"
        )
    sizes = [[batch_rows(c, step) for step in range(min(done_steps, _ramp_end(old, new)))] for c in (old, new)]
    if sizes[0] != sizes[1]:
        step = next(step for step, (before, after) in enumerate(zip(*sizes, strict=True)) if before != after)
        raise ValueError(
            f"train.batch_ramp: step {step}, one of the {done_steps} already done, had {sizes[0][step]} rows and would now have "
            f"{sizes[1][step]}: put the past phases back; later ones may change"
        )


def _ramp_end(*configs: Config) -> int:
    return max((phase.until_step for c in configs for phase in c.train.batch_ramp), default=0)


def _windows(schedule: WindowSchedule, step: int) -> tuple[int, ...]:
    layers = range(len(schedule.kinds)) if schedule.per_layer else (0,)
    each = tuple(min(schedule.window(step, layer), schedule.sequence_length) for layer in layers)
    return each[:1] if len(set(each)) == 1 else each


def _check_learning_rate(old: Config, new: Config, allow_change: list[str], done_steps: int) -> None:
    """A new total moves the learning-rate schedule: past steps may be affected only where optimizer.schedule is named as well."""
    batch_changed = batch_sizes(old) != batch_sizes(new)
    if batch_changed and done_steps and new.optimizer.schedule_unit == "tokens" and "optimizer.schedule" not in allow_change:
        raise ValueError(
            f"train.global_batch_size={new.train.global_batch_size} (the checkpoint has {old.train.global_batch_size}) moves a schedule in "
            "tokens, whose total is train.steps x batch x length: set optimizer.schedule_unit=steps (with optimizer.schedule_unit in "
            "checkpoint.allow_change), or accept the jump by adding optimizer.schedule to checkpoint.allow_change"
        )
    if "optimizer.schedule" in allow_change or _total(old) == _total(new) or old.optimizer.schedule != new.optimizer.schedule:
        return
    if new.optimizer.schedule == "wsd":
        starts = [ceil(round((1.0 - c.optimizer.decay_fraction) * c.train.steps, 6)) for c in (old, new)]
        if starts[0] == starts[1] or done_steps <= min(starts):
            return
        fraction = 1.0 - starts[0] / new.train.steps
        why = f"the decay began at step {starts[0]} and would now begin at {starts[1]}"
        way = f"set optimizer.decay_fraction={fraction!r}, " if 0 < fraction else ""
        way += f"resume a checkpoint of step {min(starts)} or before, "
    else:
        tokens_a_step = batch_rows(new, 0) * new.data.sequence_length
        warmup = new.optimizer.warmup if new.optimizer.schedule_unit == "steps" else new.optimizer.warmup // tokens_a_step
        if done_steps <= warmup:
            return
        why, way = "a cosine spans the whole run", ""
    raise ValueError(
        f"train.steps={new.train.steps} (the checkpoint has {old.train.steps}) would change the learning rate of the {done_steps} steps "
        f"already done ({why}): {way}keep the old total, or accept the jump by adding optimizer.schedule to checkpoint.allow_change"
    )


def _total(config: Config) -> int:
    """Length of the run in the schedule's unit."""
    if config.optimizer.schedule_unit == "steps":
        return config.train.steps
    return rows_before(config, config.train.steps) * config.data.sequence_length
