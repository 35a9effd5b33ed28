"""Every refusal of a configuration, before any process exists.

``validate`` looks at the values alone, ``validate_inputs`` at the data folders they name. Each ValueError names the
field, its value and what to do. Nothing here imports megatron; torch is asked for a GPU and for nothing else.
"""

from __future__ import annotations

import hashlib
import json
import math
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

from swax_megatron.config import Config, SourceConfig, field_paths
from swax_megatron.model.cost import VOCABULARY_MULTIPLE, padded_vocab_size
from swax_megatron.model.pattern import parse_pattern

AT_LEAST_ONE = (
    "model.hidden_size model.ffn_hidden_size model.vocab_size model.attention_heads model.attention_kv_heads "
    "model.attention_head_dim model.mlstm_heads model.mlstm_qk_dim model.mlstm_v_dim data.sequence_length parallel.tensor "
    "parallel.pipeline parallel.virtual_pipeline parallel.context train.micro_batch_size train.global_batch_size "
    "validation.sequences kernels.mlstm_chunk monitor.log_interval"
).split()
NOT_NEGATIVE = (
    "window.check_interval optimizer.min_learning_rate optimizer.warmup optimizer.weight_decay optimizer.clip_grad "
    "optimizer.z_loss train.steps train.threads validation.interval "
    "checkpoint.interval checkpoint.keep_last"
).split()
POSITIVE = (
    "model.rope_base model.gate_cap model.norm_eps model.logit_cap model.init_std optimizer.learning_rate optimizer.eps "
    "train.distributed_timeout monitor.peak_tflops"
).split()
SEEDS = "train.model_seed train.data_seed train.window_seed validation.seed".split()
FRACTION = "window.anneal_fraction optimizer.decay_fraction".split()
BELOW_ONE = "optimizer.beta1 optimizer.beta2".split()


def validate(config: Config, world_size: int | None = None, cuda: bool | None = None) -> None:
    """Refuse what cannot run.

    world_size: processes of the run; None leaves out what depends on it
    cuda: whether the run has a GPU; None asks this machine
    Raises ValueError with the field, its value and the fix.
    """
    _ranges(config)
    kinds = parse_pattern(config.model.pattern)
    _model(config, kinds)
    _window(config)
    _data(config)
    _tensor_parallel(config, kinds)
    _pipeline(config, len(kinds))
    _world(config, world_size)
    _optimizer(config)
    _checkpoint(config)
    _kernels(config, cuda)


def model_parallel_size(config: Config) -> int:
    """Processes that hold one copy of the model."""
    return config.parallel.tensor * config.parallel.pipeline * config.parallel.context


def validate_inputs(config: Config) -> None:
    """Refuse data folders that are missing or were written with other tokenizers; reads their manifests only."""
    wanted, owner = None, ""
    if config.data.tokenizer is not None:
        owner = f"data.tokenizer={config.data.tokenizer!r}"
        try:
            wanted = hashlib.sha256(Path(config.data.tokenizer).read_bytes()).hexdigest()
        except OSError as error:
            raise ValueError(f"{owner} cannot be read ({error.strerror}); train one with data_prep/tokenizer.py") from error
    for role in ("train", "validation"):
        for index, source in enumerate(getattr(config.data, role)):
            where = f"data.{role}.{index}.path"
            found = _source(config, where, source)
            if wanted is not None and found is not None and found != wanted:
                raise ValueError(
                    f"{where}={source.path!r} was tokenised with another tokenizer than {owner}; shard the text again with one tokenizer"
                )
            wanted, owner = wanted or found, owner or f"{where}={source.path!r}"


def validate_run_dir(config: Config) -> None:
    """Refuse a run directory that cannot be written; makes it where it is missing."""
    folder = Path(config.run_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(f"run_dir={config.run_dir!r} cannot be written ({error.strerror}): name another folder") from error


def _source(config: Config, where: str, source: SourceConfig) -> str | None:
    """The sha256 of the tokenizer that wrote a data set, where its manifest says."""
    manifest = Path(source.path) / "manifest.json"
    try:
        content = json.loads(manifest.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{where}={source.path!r}: no manifest.json there; write the data set with data_prep/shard.py") from None
    except (OSError, ValueError) as error:
        raise ValueError(f"{where}={source.path!r}: {manifest} cannot be read ({error}); write the data set again") from error
    tokenizer = content.get("tokenizer") if isinstance(content, dict) else None
    size = tokenizer.get("vocab_size") if isinstance(tokenizer, dict) else None
    if size is not None and size != config.model.vocab_size:
        raise ValueError(
            f"model.vocab_size={config.model.vocab_size}: the data set {source.path} was tokenised with a vocabulary of {size}; "
            f"use model.vocab_size={size} or shard the text again"
        )
    return tokenizer.get("sha256") if isinstance(tokenizer, dict) else None


def _value(config: Config, path: str) -> Any:
    node: Any = config
    for part in path.split("."):
        node = getattr(node, part)
    return node


def _ranges(config: Config) -> None:
    rules = (
        (AT_LEAST_ONE, lambda x: x >= 1, "must be at least 1"),
        (NOT_NEGATIVE, lambda x: 0 <= x < math.inf, "must be 0 or more"),
        (SEEDS, lambda x: 0 <= x < 2**63, "must be 0 or more and less than 2^63"),
        (POSITIVE, lambda x: 0 < x < math.inf, "must be more than 0 and finite"),
        (["train.distributed_timeout"], lambda x: x <= 30 * 86400, "must be at most 30 days, in seconds"),
        (FRACTION, lambda x: 0 <= x <= 1, "must lie between 0 and 1"),
        (BELOW_ONE, lambda x: 0 <= x < 1, "must be at least 0 and less than 1"),
    )
    for paths, holds, requirement in rules:
        for path in paths:
            value = _value(config, path)
            if value is not None and not holds(value):
                raise ValueError(f"{path}={value!r}: {requirement}")
    if not config.run_dir:
        raise ValueError("run_dir='': name a folder for this run, e.g. run_dir=runs/first")


def _model(config: Config, kinds: str) -> None:
    model = config.model
    for letter in model.rope_kinds:
        if letter not in "SF":
            raise ValueError(f"model.rope_kinds={model.rope_kinds!r}: {letter!r} is no attention kind; use letters of 'SF', '' for none")
    rotated = set(model.rope_kinds) & set(kinds)
    if rotated and model.attention_head_dim % 2:
        raise ValueError(
            f"model.attention_head_dim={model.attention_head_dim}: rotary positions turn pairs of channels; "
            "use an even size or model.rope_kinds=''"
        )
    if model.attention_heads % model.attention_kv_heads:
        raise ValueError(
            f"model.attention_kv_heads={model.attention_kv_heads}: must divide model.attention_heads={model.attention_heads}, "
            "so that every key-value head serves equally many query heads"
        )


def _window(config: Config) -> None:
    window, length = config.window, config.data.sequence_length
    if not window.windows:
        raise ValueError("window.windows=[]: name at least one window, e.g. window.windows=[128,2048]")
    named = [(f"window.windows.{index}", value) for index, value in enumerate(window.windows)]
    for path, value in [*named, ("window.anneal_window", window.anneal_window), ("window.test_window", window.test_window)]:
        if not 1 <= value <= length:
            raise ValueError(f"{path}={value}: must lie between 1 and data.sequence_length={length}")
    for value, count in Counter(window.windows).items():
        if count > 1:
            raise ValueError(
                f"window.windows={window.windows}: {value} is listed {count} times; list it once, weigh by window.probabilities"
            )
    chances = window.probabilities
    if len(chances) != len(window.windows):
        raise ValueError(f"window.probabilities={chances}: needs one probability for each of window.windows={window.windows}")
    if not all(0 <= chance <= 1 for chance in chances) or not math.isclose(math.fsum(chances), 1.0, abs_tol=1e-6):
        raise ValueError(f"window.probabilities={chances}: must be between 0 and 1 and sum to 1, they sum to {math.fsum(chances):g}")
    if window.per_layer and window.schedule != "stochastic":
        raise ValueError(
            f"window.per_layer=True: window.schedule={window.schedule} draws nothing; use stochastic or window.per_layer=false"
        )


def _data(config: Config) -> None:
    data = config.data
    if not data.train:
        raise ValueError("data.train=[]: name at least one data set, e.g. data.train=[{path: data/train}]")
    if config.validation.interval > 0 and not data.validation:
        raise ValueError(
            f"data.validation=[]: validation.interval={config.validation.interval} needs a data set; name one or set validation.interval=0"
        )
    for role in ("train", "validation"):
        sources = getattr(data, role)
        for index, source in enumerate(sources):
            where = f"data.{role}.{index}"
            if not source.path:
                raise ValueError(f"{where}.path='': name a folder written by data_prep/shard.py")
            if not 0 <= source.weight < math.inf:
                raise ValueError(f"{where}.weight={source.weight!r}: must be 0 or more and finite")
        if sources and not math.fsum(source.weight for source in sources) > 0:
            raise ValueError(f"data.{role}: every weight is 0; give at least one source a positive weight")
        for name, count in Counter(source.name for source in sources).items():
            if count > 1:
                raise ValueError(f"data.{role}: {count} sources are named {name!r}; give each a name of its own with data.{role}.N.name")


def _tensor_parallel(config: Config, kinds: str) -> None:
    tensor, model = config.parallel.tensor, config.model
    _divides(tensor, "model.attention_heads", model.attention_heads)
    if model.attention_kv_heads < tensor:
        raise ValueError(
            f"model.attention_kv_heads={model.attention_kv_heads}: every one of parallel.tensor={tensor} ranks needs a key-value head; "
            f"use parallel.tensor={math.gcd(tensor, model.attention_kv_heads)} or more heads"
        )
    _divides(tensor, "model.attention_kv_heads", model.attention_kv_heads)
    if "M" in kinds:
        _divides(tensor, "model.mlstm_heads", model.mlstm_heads)
    _divides(tensor, "model.ffn_hidden_size", model.ffn_hidden_size)
    padded = padded_vocab_size(model.vocab_size)
    if padded % tensor:
        raise ValueError(
            f"parallel.tensor={tensor}: must divide the vocabulary padded to a multiple of {VOCABULARY_MULTIPLE}, "
            f"{padded} for model.vocab_size={model.vocab_size}; use a power of two"
        )
    if config.parallel.sequence:
        _divides(tensor, "data.sequence_length", config.data.sequence_length, "; or parallel.sequence=false")


def _divides(tensor: int, path: str, value: int, otherwise: str = "") -> None:
    if value % tensor:
        multiple = -(-value // tensor) * tensor
        raise ValueError(f"{path}={value}: must be divisible by parallel.tensor={tensor}, e.g. {path}={multiple}{otherwise}")


def _pipeline(config: Config, layers: int) -> None:
    parallel = config.parallel
    stages, chunks = parallel.pipeline, parallel.virtual_pipeline or 1
    if chunks > 1 and stages == 1:
        raise ValueError(
            f"parallel.virtual_pipeline={chunks}: chunks interleave over several stages; leave it out with parallel.pipeline=1"
        )
    if parallel.pipeline_layers is None:
        if layers % (stages * chunks):
            raise ValueError(
                f"parallel.pipeline={stages}: {layers} layers (model.pattern={config.model.pattern}) cannot be divided over {stages} "
                f"stages x {chunks} chunks; change one of them or give every stage's layers in parallel.pipeline_layers"
            )
        return
    counts = parallel.pipeline_layers
    if chunks > 1:
        raise ValueError(f"parallel.pipeline_layers={counts}: cannot be combined with parallel.virtual_pipeline={chunks}; drop one of them")
    if len(counts) != stages:
        raise ValueError(f"parallel.pipeline_layers={counts}: needs {stages} numbers, one for each of parallel.pipeline={stages} stages")
    if min(counts) < 1:
        raise ValueError(f"parallel.pipeline_layers={counts}: every stage needs at least one layer")
    if sum(counts) != layers:
        raise ValueError(
            f"parallel.pipeline_layers={counts}: sums to {sum(counts)}; model.pattern={config.model.pattern} has {layers} layers"
        )


def _world(config: Config, world_size: int | None) -> None:
    parallel, train = config.parallel, config.train
    if parallel.context > 1:
        raise ValueError(
            f"parallel.context={parallel.context}: context parallelism needs an exchange of window halos and mLSTM states between ranks, "
            "which is not built yet, and Megatron's own would be silently wrong here; use parallel.context=1"
        )
    if train.global_batch_size % train.micro_batch_size:
        raise ValueError(
            f"train.global_batch_size={train.global_batch_size}: must be a multiple of train.micro_batch_size={train.micro_batch_size}"
        )
    if world_size is None:
        return
    size = model_parallel_size(config)
    if world_size < 1 or world_size % size:
        raise ValueError(
            f"{world_size} processes: must be a multiple of parallel.tensor={parallel.tensor} x parallel.pipeline={parallel.pipeline} x "
            f"parallel.context={parallel.context} = {size}; start {max(1, world_size // size) * size} or change the layout"
        )
    replicas = world_size // size
    rows = train.micro_batch_size * replicas
    if train.global_batch_size % rows:
        raise ValueError(
            f"train.global_batch_size={train.global_batch_size}: must be divisible by train.micro_batch_size={train.micro_batch_size} x "
            f"{replicas} data-parallel replicas, e.g. train.global_batch_size={-(-train.global_batch_size // rows) * rows}"
        )
    microbatches = train.global_batch_size // rows
    if (parallel.virtual_pipeline or 1) > 1 and microbatches % parallel.pipeline:
        raise ValueError(
            f"parallel.virtual_pipeline={parallel.virtual_pipeline}: the interleaved schedule needs microbatches in multiples of "
            f"parallel.pipeline={parallel.pipeline}, there are {microbatches}; "
            f"e.g. train.global_batch_size={-(-microbatches // parallel.pipeline) * parallel.pipeline * rows}"
        )


def _optimizer(config: Config) -> None:
    optimizer, train = config.optimizer, config.train
    if optimizer.backend == "zero" and optimizer.zero_stage != 1:
        reason = {
            0: "without sharding the optimizer backend megatron does the same work",
            2: "stage 2 shards gradients, which the pipeline schedules accumulate whole in any case, so it would save nothing over stage 1",
            3: "stage 3 gathers weights inside the forward pass and could run with parallel.pipeline=1 only; it is not built yet",
        }.get(optimizer.zero_stage, "ZeRO has the stages 0 to 3, and stage 1 is the one that runs at every parallel.pipeline")
        raise ValueError(f"optimizer.zero_stage={optimizer.zero_stage}: {reason}; use optimizer.zero_stage=1 or optimizer.backend=megatron")
    if optimizer.min_learning_rate > optimizer.learning_rate:
        raise ValueError(
            f"optimizer.min_learning_rate={optimizer.min_learning_rate}: must not exceed optimizer.learning_rate={optimizer.learning_rate}"
        )
    unit = train.global_batch_size * config.data.sequence_length if optimizer.schedule_unit == "tokens" else 1
    total = train.steps * unit
    if total and optimizer.warmup > total:
        raise ValueError(
            f"optimizer.warmup={optimizer.warmup}: the run has {total} {optimizer.schedule_unit} and would end in its warm-up; "
            f"use e.g. optimizer.warmup={max(1, total // 10)}, or more train.steps"
        )


def _checkpoint(config: Config) -> None:
    known = set(field_paths())
    for name in config.checkpoint.allow_change:
        if name.startswith("model."):
            raise ValueError(f"checkpoint.allow_change: {name} is part of a checkpoint's identity and can never change; use a new run_dir")
        if name not in known:
            raise ValueError(f"checkpoint.allow_change: {name!r} is no field of the configuration; use a full name such as train.steps")


def _kernels(config: Config, cuda: bool | None) -> None:
    if config.kernels.backend != "triton":
        return
    if cuda is None:
        import torch

        cuda = torch.cuda.is_available()
    if not cuda:
        raise ValueError("kernels.backend='triton': Triton kernels need a CUDA GPU and there is none; use kernels.backend=auto")
