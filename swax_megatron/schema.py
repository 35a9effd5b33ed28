"""Every field of the configuration: one dataclass a section, a ``doc`` and a default a field.

Conventions shared by all of them:

* steps are 0-based optimizer updates, tokens are input positions without padding;
* a window w lets a query see itself and the w-1 keys before it, inside its document;
* a dimension that is not given (None) is derived, and the resolved config holds the derived value.

A new field also belongs in a range of ``swax_megatron/validate/ranges.py`` (numbers), in ``swax_megatron/checkpoint/compatibility.py``
(whether a resume may change it) and in ``docs/configuration.md``, which ``python scripts/write_docs.py`` writes.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal

FORMAT_VERSION = 1


def _f(default: Any, doc: str) -> Any:
    """A documented field; mutable defaults are copied per instance."""
    if isinstance(default, (list, dict)) or (isinstance(default, type) and dataclasses.is_dataclass(default)):
        factory = default if isinstance(default, type) else (lambda: type(default)(default))
        return field(default_factory=factory, metadata={"doc": doc})
    return field(default=default, metadata={"doc": doc})


@dataclass
class ModelConfig:
    """The network. Everything here is part of a checkpoint's identity: a resume with other values is refused."""

    pattern: str = _f("(MS)x12", "layers in order: M mLSTM, S sliding-window attention, F full attention; groups repeat: (MS)x12")
    hidden_size: int = _f(2048, "width of the residual stream")
    ffn_hidden_size: int = _f(5504, "width of the SwiGLU feed-forward network")
    vocab_size: int = _f(32768, "vocabulary of the tokenizer; the tables are padded to a multiple of 128 at every layout")
    attention_heads: int = _f(16, "query heads of S and F layers")
    attention_kv_heads: int | None = _f(None, "key-value heads of S and F layers; null: as many as query heads")
    attention_head_dim: int | None = _f(None, "size of an attention head; null: hidden_size / attention_heads")
    rope_kinds: str = _f("SF", "layer kinds that use rotary positions; a kind not named has none (NoPE)")
    rope_base: float = _f(10000.0, "base of the rotary angles")
    mlstm_heads: int = _f(4, "heads of M layers")
    mlstm_qk_dim: int | None = _f(None, "query-key size of an mLSTM head; null: hidden_size / mlstm_heads / 2")
    mlstm_v_dim: int | None = _f(None, "value size of an mLSTM head; null: hidden_size / mlstm_heads")
    gate_cap: float = _f(15.0, "soft cap c*tanh(x/c) of the mLSTM gate pre-activations")
    norm_eps: float = _f(1e-6, "epsilon of every norm")
    logit_cap: float | None = _f(30.0, "soft cap of the output logits; null: no cap")
    tie_embeddings: bool = _f(False, "use the token embedding as the output head")
    document_boundary: Literal["reset", "carry"] = _f(
        "reset", "at a document's start inside a packed row: reset the memory and mask attention, or carry both across"
    )
    init_std: float = _f(0.02, "standard deviation of the initial weights; output projections get init_std / sqrt(2 * layers)")
    embedding_init_std: float | None = _f(None, "standard deviation of the initial token embedding; null: init_std")
    mlstm_igate_bias: float = _f(
        -10.0, "initial bias of the mLSTM input gates: at -10 (xLSTM-7B) a memory begins almost silent, at 0 it speaks from the first step"
    )


@dataclass
class WindowConfig:
    """The attention window of each step, a pure function of (seed, step)."""

    schedule: Literal["fixed", "stochastic", "ramp"] = _f(
        "stochastic", "fixed: the first window; stochastic: drawn each step; ramp: from the first to the last, in equal phases"
    )
    windows: list[int] = _f([128, 2048], "the windows of the schedule")
    probabilities: list[float] | None = _f(None, "stochastic: the probability of each window; null: equal")
    anneal_fraction: float = _f(0.1, "last fraction of the training steps that stays at anneal_window; 0: no annealing")
    anneal_window: int | None = _f(None, "window of the annealed steps; null: the largest of windows")
    test_window: int | None = _f(None, "window of validation and export; null: the anneal window")
    per_layer: bool = _f(False, "stochastic: draw for every S layer of its own instead of one window for the step")
    check_interval: int = _f(100, "ranks compare the window and the schedule's hash at the first and every N-th step; 0: never")


@dataclass
class SourceConfig:
    """One data set written by data_prep/shard.py."""

    path: str = _f("", "folder that holds manifest.json and the shards; or a URL (s3://, https://, ...), or pipe:COMMAND with {file}")
    weight: float = _f(1.0, "share of the sequences drawn from this source")
    name: str | None = _f(None, "name in logs and checkpoints; null: the folder's name")
    skip_shards: list[str] = _f([], "shards to leave out, such as shard-000007.tar, because they are damaged; part of the data's order")


@dataclass
class CurriculumConfig:
    """Other weights of the training sources from a step on."""

    step: int = _f(0, "first step with these weights")
    weights: dict[str, float] = _f({}, "weight of every training source, by name")


@dataclass
class DataConfig:
    """What is read, in which order."""

    train: list[SourceConfig] = _f([], "training sources")
    validation: list[SourceConfig] = _f([], "validation sources")
    tokenizer: str | None = _f(None, "SentencePiece .model; null: the one beside the first training source")
    sequence_length: int = _f(16384, "tokens a row")
    packing: Literal["concatenate", "best_fit"] = _f(
        "concatenate", "rows: cut one line of all documents; or fill each with whole documents, where only longer ones than a row are cut"
    )
    curriculum: list[CurriculumConfig] = _f([], "weights of the training sources that change at a step")
    shuffle_tokens: int = _f(2**31, "rows are shuffled inside blocks of this many tokens; for remote data a few shards' worth")
    verify: Literal["size", "use", "sha256"] = _f(
        "use",
        "checks of local shards: size: sizes and index headers at opening; use: and a shard's sha256 when it is first read; "
        "sha256: of all shards at opening",
    )
    damaged: Literal["stop", "skip"] = _f("stop", "a damaged or missing training shard found at opening: stop, or leave it out and say so")
    workers: int = _f(2, "threads that read ahead; 0: read between the steps")
    prefetch: int = _f(2, "steps that are read ahead")
    cache: str = _f("~/.cache/swax_megatron", "folder on a local disk for fetched files of remote data and for tables of best_fit packing")
    cache_gib: float = _f(64.0, "size limit of the fetched files, GiB a host; those used longest ago are removed")
    retries: int = _f(5, "how often a failed fetch of remote data is tried again")


@dataclass
class ParallelConfig:
    """How the model is laid over processes; data parallelism is what remains of the world size."""

    tensor: int = _f(1, "tensor-parallel degree")
    sequence: bool = _f(True, "split norms and residuals along the sequence over the tensor-parallel ranks (only where tensor > 1)")
    pipeline: int = _f(1, "pipeline stages")
    virtual_pipeline: int | None = _f(None, "model chunks a stage (interleaved schedule); null: one")
    pipeline_layers: list[int] | None = _f(
        None,
        "layers of each stage (of each chunk, with virtual_pipeline, in the model's order); null: balanced by operations, head included",
    )
    context: int = _f(1, "ranks that share a row: each holds a piece; window halos and mLSTM memories travel between them")
    overlap: bool = _f(False, "tensor-parallel transfers run beside the products that do not need them (not with zero_stage 3)")


@dataclass
class OptimizerConfig:
    """AdamW and its schedule."""

    backend: Literal["zero", "megatron"] = _f("zero", "zero: DeepSpeed ZeRO; megatron: Megatron-core's distributed optimizer")
    zero_stage: int = _f(
        1, "what DeepSpeed partitions over data-parallel ranks: 0 nothing; 1 optimizer state; 2 and gradients; 3 and weights"
    )
    overlap_gradients: bool = _f(False, "reduce gradients while backward still computes")
    overlap_parameters: bool = _f(
        False, "backend megatron: gather updated weights while the next forward computes (ZeRO stage 3 gathers ahead in any case)"
    )
    offload: bool = _f(False, "backend zero: keep masters and moments, and update them, in host memory")
    learning_rate: float = _f(6e-4, "peak learning rate")
    min_learning_rate: float = _f(0.0, "learning rate at the end")
    schedule: Literal["cosine", "wsd"] = _f(
        "wsd", "wsd: constant, then linear decay over the last decay_fraction; cosine: over the whole run"
    )
    warmup: int = _f(2000, "linear warm-up, in schedule_unit")
    decay_fraction: float = _f(0.1, "wsd: last fraction of the run that decays")
    schedule_unit: Literal["steps", "tokens"] = _f("steps", "unit of warmup and of the schedule's progress")
    beta1: float = _f(0.9, "AdamW beta 1")
    beta2: float = _f(0.95, "AdamW beta 2")
    eps: float = _f(1e-8, "AdamW epsilon")
    weight_decay: float = _f(0.1, "decoupled weight decay of matrices; norms, biases and gates have none")
    decay_embeddings: bool = _f(False, "apply weight decay to the embedding and the output head as well")
    clip_grad: float = _f(1.0, "largest global gradient norm; 0: no clipping")
    z_loss: float = _f(0.0, "coefficient of the squared log-partition added to the loss; 0: off")


@dataclass
class BatchPhase:
    """A smaller batch at the beginning of a run."""

    until_step: int = _f(0, "first step that no longer has this batch size")
    rows: int = _f(0, "rows an update until then")


@dataclass
class TrainConfig:
    """The loop."""

    steps: int = _f(1000, "optimizer updates in all")
    micro_batch_size: int = _f(1, "rows a forward pass and data-parallel rank")
    global_batch_size: int = _f(64, "rows an update over all ranks")
    batch_ramp: list[BatchPhase] = _f([], "smaller batches before global_batch_size is reached, e.g. [{until_step: 500, rows: 16}]")
    precision: Literal["bf16", "fp32"] = _f("bf16", "type of weights and activations; masters and optimizer state are fp32")
    fp8: bool = _f(False, "matrix products of the layers' projections in 8 bits (Hopper GPUs only; docs/throughput.md)")
    recompute: Literal["none", "selective", "full"] = _f(
        "none", "activations recomputed in backward: none; selective, the mixers' cores; full, whole layers"
    )
    loss_chunk: int = _f(
        1024, "tokens whose logits exist at a time, in forward and again in backward; 0: all, computed once and kept for backward"
    )
    model_seed: int = _f(1, "seed of the initial weights")
    data_seed: int = _f(1, "seed of the data order")
    window_seed: int = _f(1, "seed of the window draws")
    deterministic: bool = _f(False, "use deterministic algorithms on the GPU (slower)")
    threads: int = _f(0, "CPU threads a process; 0: the launcher gives each cores / processes, torchrun OMP_NUM_THREADS")
    distributed_timeout: float = _f(600.0, "seconds after which a collective that a rank never joined ends the job")


@dataclass
class ValidationConfig:
    """Validation at every window of the schedule and at the test window."""

    interval: int = _f(500, "steps between validations (also after the last step); 0: never")
    seed: int = _f(1, "seed of the order of the validation rows, apart from the training data's")
    sequences: int = _f(64, "rows of the validation set that are read, the same every time")


@dataclass
class CheckpointConfig:
    """Saving and resuming."""

    interval: int = _f(500, "steps between checkpoints (also after the last step); 0: never")
    asynchronous: bool = _f(
        True, "train on while a thread writes; takes as much host memory as this rank's master weights and moments; false: wait"
    )
    keep_last: int = _f(2, "newest complete checkpoints that are kept; 0: all")
    keep_every: int = _f(0, "checkpoints of every N-th step are kept for ever (N a multiple of interval); 0: none")
    remote: str | None = _f(
        None, "URL of a second home, e.g. s3://bucket/run (any that fsspec reaches): copied there, fetched from there where it is newer"
    )
    resume: Literal["auto", "never"] = _f("auto", "auto: continue from the newest complete checkpoint of the run directory")
    allow_change: list[str] = _f(
        [], "fields outside model that may differ from the checkpoint's although they alter the run, e.g. train.steps"
    )


@dataclass
class KernelConfig:
    """Which implementation of the layers' mathematics runs."""

    backend: Literal["auto", "reference", "triton"] = _f("auto", "auto: Triton on CUDA where a kernel exists, plain torch elsewhere")
    mlstm_chunk: int = _f(64, "chunk length of the mLSTM reference")


@dataclass
class MonitorConfig:
    """What is reported."""

    log_interval: int = _f(10, "steps between progress lines; TensorBoard and metrics.jsonl get every step")
    memory_interval: int = _f(
        0, "steps between measurements of every head's memory: horizon, gates, state, attention (docs/evaluation.md); 0: never"
    )
    recall_interval: int = _f(
        0, "steps between tests of recall by gap, for rows of data_prep/recall_rows.py (docs/evaluation.md); 0: never"
    )
    peak_tflops: float | None = _f(
        None, "dense peak of one device for MFU, TFLOP/s; null: known GPUs by name, a measured matrix product elsewhere"
    )


FaultKind = Literal[
    "none", "kill", "segfault", "stop", "gil", "exception", "sleep", "slow", "nan", "spike", "sigterm", "disk_full", "corrupt"
]


@dataclass
class ResilienceConfig:
    """Spikes, hangs, stragglers, and the fault injector that tests them (docs/resilience.md)."""

    spike_threshold: float = _f(
        10.0, "robust standard deviations above the median loss of steps with the same window, from which an update is left out; 0: off"
    )
    spike_history: int = _f(128, "accepted losses of a window that the median is taken of")
    spike_minimum: int = _f(64, "losses of a window that must be known before a step with it is judged")
    spike_patience: int = _f(3, "left-out updates in a row after which the run goes back to a checkpoint and jumps over the data; 0: never")
    max_skips: int = _f(50, "left-out updates after which the run stops")
    max_rewinds: int = _f(3, "times the run may go back before it stops")
    hang_factor: float = _f(10.0, "a section of a step that takes this many times its usual (by window) is a hang; 0: no watchdog")
    hang_minimum: float = _f(180.0, "seconds: nothing shorter is a hang")
    hang_unknown: float = _f(1800.0, "seconds: what was not timed before (start, first steps with a window, first save) may take this long")
    straggler_interval: int = _f(50, "steps between comparisons of the ranks' own times; 0: never")
    straggler_factor: float = _f(1.3, "a rank that takes this many times the median of all ranks is reported")
    fault: FaultKind = _f("none", "fault injector, for tests: what is done to fault_rank at fault_step")
    fault_rank: int = _f(0, "fault injector: the rank")
    fault_step: int = _f(0, "fault injector: the 0-based step")
    fault_steps: int = _f(1, "fault injector: how many steps from fault_step on (nan, spike, slow)")
    fault_seconds: float = _f(1.0, "fault injector: how long (slow, sleep, gil)")


@dataclass
class Config:
    """A whole run."""

    run_dir: str = _f("runs/default", "folder of this run: logs, checkpoints, resolved config")
    model: ModelConfig = _f(ModelConfig, "")
    window: WindowConfig = _f(WindowConfig, "")
    data: DataConfig = _f(DataConfig, "")
    parallel: ParallelConfig = _f(ParallelConfig, "")
    optimizer: OptimizerConfig = _f(OptimizerConfig, "")
    train: TrainConfig = _f(TrainConfig, "")
    validation: ValidationConfig = _f(ValidationConfig, "")
    checkpoint: CheckpointConfig = _f(CheckpointConfig, "")
    kernels: KernelConfig = _f(KernelConfig, "")
    monitor: MonitorConfig = _f(MonitorConfig, "")
    resilience: ResilienceConfig = _f(ResilienceConfig, "")
    format_version: int = _f(FORMAT_VERSION, "version of this format; a newer one is refused")
