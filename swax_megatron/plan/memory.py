"""Bytes on one rank, by part, at the fullest moment of a training step.

Weights, gradients and optimizer state follow from ZeRO's definitions (Rajbhandari et al. 2020) as the backends keep them; activations
from what each layer kind says of itself (``model/layers/<kind>/cost.py``) and what norms, SwiGLU, residuals and the head keep. Tests
compare the sum with the tensors of real training steps. What an allocator wastes, NCCL's buffers and the CUDA context come on top.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from swax_megatron.model.cost import COSTS
from swax_megatron.plan.layout import Layout

ASIDE = ("host", "snapshot", "resident")  # no part of the sum on the device
BUCKET = 50_000_000  # elements that the backends reduce or gather at a time
GATHERED = 1_000_000_000  # elements of weights that DeepSpeed's stage 3 may hold whole at a time


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank. ``working``: what exists for a moment: one layer's recomputation and gradients, buckets, the update."""

    weights: float
    gradients: float
    optimizer: float
    activations: float
    states: float
    logits: float
    working: float
    host: float = 0.0  # in host memory: offloaded state, gradients and buffers
    snapshot: float = 0.0  # in host memory: what a thread writes of a checkpoint while training goes on
    resident: float = 0.0  # of all on the device, what stays there between two steps

    @property
    def total(self) -> float:
        """Bytes on the device."""
        return sum(getattr(self, item.name) for item in fields(self) if item.name not in ASIDE)


def memory(layout: Layout, stage: int) -> Memory:
    """The fullest rank of a pipeline stage, at the largest window of the run."""
    weights, gradients, optimizer, host, update = _persistent(layout, stage)
    resident = weights + optimizer
    snapshot = 12.0 * _mine(layout, stage) if layout.config.checkpoint.asynchronous else 0.0
    if layout.config.optimizer.backend == "megatron":
        resident += gradients  # one buffer, zeroed and filled again
    elif layout.config.optimizer.zero_stage == 3:
        gradients += _bucket(layout, stage)
        resident += gradients
    held = [_chunk(layout, chunk) for chunk in layout.stage(stage)]
    flying = layout.in_flight(stage)
    activations = sum(kept * count for (kept, _, _), count in zip(held, flying, strict=True))
    states = sum(part * count for (_, part, _), count in zip(held, flying, strict=True))
    passing = max(moment for _, _, moment in held)
    last = stage == layout.pipeline - 1
    if stage == 0:
        activations += 8.0 * layout.tokens * flying[0]
    logits = 0.0
    if last:
        kept, moment = _head(layout)
        activations += kept
        logits = moment
    # the logits of a chunk exist before the first layer's backward pass begins, the update after the last
    working = max(0.0, max(passing, _received(layout)) - logits)
    spare = activations + states + logits + working
    working += max(0.0, update - spare)
    if layout.microbatches == 1 and _direct(layout, layout.config.optimizer.zero_stage):
        gradients = max(0.0, gradients - spare)  # they appear as the activations go that they come from
    if layout.config.optimizer.backend == "zero" and layout.config.optimizer.zero_stage == 3:
        working += layout.width * min(GATHERED, layout.parameters(stage))  # whole weights, in forward and backward
    return Memory(weights, gradients, optimizer, activations, states, logits, working, host, snapshot, resident)


def fullest(layout: Layout) -> tuple[int, Memory]:
    """The stage that needs most, and what it needs."""
    found = [(stage, memory(layout, stage)) for stage in range(layout.pipeline)]
    return max(found, key=lambda pair: pair[1].total)


def _persistent(layout: Layout, stage: int) -> tuple[float, float, float, float, float]:
    """Weights, gradients, optimizer state, its part in host memory, and what the update needs for a moment."""
    settings, count = layout.config.optimizer, layout.parameters(stage)
    level = settings.zero_stage if settings.backend == "zero" else 1
    width, mine = layout.width, _mine(layout, stage)
    weights = width * (mine if level == 3 else count)
    direct = _direct(layout, level)
    # one micro-batch's gradients stay in the weights' type there
    gradients = (width if direct and layout.microbatches == 1 else 4.0) * (mine if level >= 2 else count)
    own = settings.backend == "zero" or width == 2  # Megatron's optimizer works on fp32 weights in place
    optimizer = (12.0 if own else 8.0) * mine
    update = 0.0 if direct else _update(layout, level, count, mine)
    if settings.offload:
        # an fp32 gradient that the update reads; stages 1 and 2: the updated weights on their way to the device; stage 3: a second
        # gradient, in which microbatches add up
        host = optimizer + (4.0 + (4.0 if level == 3 else width)) * mine
        # on the device stage 1 accumulates whole gradients; stages 1 and 2 fill a bucket during backward, 1 in fp32
        bucket = (4.0 if level == 1 else width) * min(BUCKET, count) if level < 3 else 0.0
        return weights, (gradients if level == 1 else 0.0) + bucket, 0.0, host, update
    return weights, gradients, optimizer, 0.0, update


def _direct(layout: Layout, level: int) -> bool:
    """Whether optim/direct.py updates the weights, in one launch."""
    settings = layout.config.optimizer
    whole = settings.backend == "zero" and (level == 0 or (level == 1 and layout.shards == 1))
    return whole and layout.kernels == "triton" and layout.width == 2 and not (settings.offload or settings.overlap_gradients)


def _mine(layout: Layout, stage: int) -> float:
    """Parameters whose optimizer state is this rank's."""
    settings = layout.config.optimizer
    whole = settings.backend == "zero" and settings.zero_stage == 0
    return layout.parameters(stage) / (1 if whole else layout.shards)


def _update(layout: Layout, level: int, count: float, mine: float) -> float:
    """The fuller of two moments: gradients on their way to other ranks, and the reduced ones as the optimizer wants them, flat.

    A bucket is copied to be sent; from stage 2 on its gradients wait for that beside those that are kept. Fused AdamW needs no more.
    """
    if layout.config.optimizer.backend == "megatron":
        return 4.0 * mine
    copies = 0.0 if layout.shards == 1 else 1.0 if level < 2 else 2.0
    return max(copies * 4.0 * min(BUCKET, count), 4.0 * mine)


def _bucket(layout: Layout, stage: int) -> float:
    """Stage 3's gradients on their way to the other ranks: a buffer that every weight fits in."""
    model = layout.config.model
    largest = model.hidden_size * max(layout.vocabulary, model.ffn_hidden_size // layout.tensor)
    return 4.0 * max(min(BUCKET, layout.parameters(stage)), largest)


def _chunk(layout: Layout, kinds: str) -> tuple[float, float, float]:
    """Of one micro-batch in one chunk of layers: bytes kept, of them mLSTM states apart, and the largest moment of backward."""
    recompute, kept, states, moment = layout.config.train.recompute, 0.0, 0.0, 0.0
    for kind in kinds:
        whole, core, part = _layer(layout, kind)
        moment = max(moment, _gradients(layout))
        if recompute == "full":
            kept += layout.width * layout.config.model.hidden_size * layout.tokens / layout.split
            moment = max(moment, whole + _gradients(layout))
        elif recompute == "selective":
            kept += whole - core
            moment = max(moment, core + _residual(layout) - _feedforward(layout))  # whose turn in backward came before
        else:
            kept, states = kept + whole - part, states + part
    return kept, states, moment


def _layer(layout: Layout, kind: str) -> tuple[float, float, float]:
    """Everything that a layer keeps for one micro-batch, what of it a recomputed core saves, and the states in it."""
    model, tokens, width = layout.config.model, layout.tokens, layout.width
    window = max(window for _, window in layout.windows())
    chunk = layout.config.kernels.mlstm_chunk
    mixer = COSTS[kind].footprint(model, layout.piece, window, width, layout.kernels, chunk)
    # the projections' input: whole, since gathered
    before = _norm(layout) * tokens / layout.split + (width * model.hidden_size + mixer.whole) * tokens
    inside = tokens / layout.tensor
    whole = before + (mixer.core + mixer.output) * inside + _feedforward(layout)
    return whole, max(0.0, mixer.core - mixer.inputs) * inside, mixer.states * inside


def _feedforward(layout: Layout) -> float:
    """What the SwiGLU of one layer and the norm before it keep: gate and up, in plain torch silu(gate) and the product as well."""
    model, width = layout.config.model, layout.width
    units = (2.0 if layout.kernels == "triton" else 4.0) * model.ffn_hidden_size / layout.tensor
    each = width * (model.hidden_size + units)
    return (_norm(layout) / layout.split + each) * layout.tokens


def _norm(layout: Layout) -> float:
    """Bytes a token that an RMSNorm keeps: its input, or in plain torch the input and the normed input in fp32."""
    hidden = layout.config.model.hidden_size
    return layout.width * hidden + 4.0 if layout.kernels == "triton" else 8.0 * hidden + 4.0


def _residual(layout: Layout) -> float:
    """The gradient of a micro-batch's hidden states."""
    return layout.width * layout.tokens * layout.config.model.hidden_size / layout.split


def _gradients(layout: Layout) -> float:
    """Gradients on their way through a SwiGLU: the residual's, and those of gate and up; with the kernels, the product once more."""
    units = 3 if layout.kernels == "triton" else 2
    return _residual(layout) + layout.width * layout.tokens * units * layout.config.model.ffn_hidden_size / layout.tensor


def _received(layout: Layout) -> float:
    """A micro-batch's hidden states from the neighbour stage and their gradient."""
    if layout.pipeline == 1:
        return 0.0
    return 2.0 * _residual(layout)


def _head(layout: Layout) -> tuple[float, float]:
    """What final norm and loss keep of a micro-batch, and what the logits of a chunk of tokens need for a moment."""
    model, tokens = layout.config.model, layout.tokens
    kept = _norm(layout) * tokens / layout.split + layout.width * model.hidden_size * tokens + 16.0 * tokens
    chunk = min(layout.config.train.loss_chunk or tokens, tokens)
    raw = layout.width * chunk * layout.vocabulary
    logits = raw + (0.0 if layout.kernels == "triton" else 16.0 * chunk * layout.vocabulary)  # the kernels hold none in fp32
    if tokens <= chunk:  # kept from forward to backward
        kept, logits = kept + raw, logits - raw
    several = 4.0 if tokens > chunk else 0.0
    weight = (several + layout.width) * layout.vocabulary * model.hidden_size
    return kept, logits + weight + layout.width * tokens * model.hidden_size
