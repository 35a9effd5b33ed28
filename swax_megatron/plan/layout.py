"""A configuration on a number of processes, in the numbers that the formulas of the plan are made of."""

from __future__ import annotations

from dataclasses import dataclass

from swax_megatron.model.cost import COSTS, padded_vocab_size
from swax_megatron.model.pattern import parse_pattern
from swax_megatron.model.stages import expected_windows, stage_layers
from swax_megatron.schema import Config


@dataclass(frozen=True)
class Layout:
    """Sizes of one run. parts: the layer kinds of every stage (and chunk, where interleaved), in the model's order."""

    config: Config
    world_size: int
    parts: tuple[str, ...]
    tensor: int
    pipeline: int
    chunks: int
    context: int
    replicas: int  # of the model and of rows: what is left for data parallelism
    microbatches: int
    width: int  # bytes of a weight and of an activation
    kernels: str  # "triton" or "reference"

    @classmethod
    def of(cls, config: Config, world_size: int, kernels: str) -> Layout:
        """kernels: whose memory to count, "triton" (a GPU) or "reference" (plain torch on the CPU). The configuration must be valid."""
        parallel, train = config.parallel, config.train
        kinds, parts, start = parse_pattern(config.model.pattern), [], 0
        for count in stage_layers(config, kinds):
            parts.append(kinds[start : start + count])
            start += count
        replicas = world_size // (parallel.tensor * parallel.pipeline * parallel.context)
        return cls(
            config,
            world_size,
            tuple(parts),
            parallel.tensor,
            parallel.pipeline,
            parallel.virtual_pipeline or 1,
            parallel.context,
            replicas,
            train.global_batch_size // (train.micro_batch_size * replicas),
            2 if train.precision == "bf16" else 4,
            kernels,
        )

    @property
    def shards(self) -> int:
        """Ranks over which the optimizer's state is partitioned: data x context."""
        return self.replicas * self.context

    @property
    def piece(self) -> int:
        """Tokens of a row on one rank."""
        return self.config.data.sequence_length // self.context

    @property
    def tokens(self) -> int:
        """Tokens of a micro-batch on one rank, inside the tensor-parallel regions."""
        return self.config.train.micro_batch_size * self.piece

    @property
    def split(self) -> int:
        """Ranks over which the tokens between the tensor-parallel regions are split."""
        return self.tensor if self.config.parallel.sequence else 1

    @property
    def vocabulary(self) -> int:
        """Rows of the embedding and of the head on one rank."""
        return padded_vocab_size(self.config.model.vocab_size) // self.tensor

    def stage(self, stage: int) -> list[str]:
        """The chunks of a stage, each as its layer kinds."""
        return list(self.parts[stage :: self.pipeline])

    def windows(self) -> list[tuple[float, int]]:
        """(share of the steps, window)"""
        return [(share, min(window, self.config.data.sequence_length)) for share, window in expected_windows(self.config)]

    def layer_parameters(self, kind: str) -> int:
        """Parameters of one layer on one rank: everything is split over tensor-parallel ranks but the two norms."""
        model = self.config.model
        split = COSTS[kind].param_count(model) + 3 * model.hidden_size * model.ffn_hidden_size
        return split // self.tensor + 2 * model.hidden_size

    def parameters(self, stage: int) -> int:
        """Parameters of one rank of a stage."""
        model = self.config.model
        count = sum(self.layer_parameters(kind) for chunk in self.stage(stage) for kind in chunk)
        last = stage == self.pipeline - 1
        table = self.vocabulary * model.hidden_size
        tables = (stage == 0) + last - (stage == 0 and last and model.tie_embeddings)
        return count + tables * table + (model.hidden_size if last else 0)

    def in_flight(self, stage: int) -> list[int]:
        """Micro-batches whose activations each chunk of a stage holds at the worst moment (1F1B; interleaved: Narayanan et al. 2021)."""
        if self.chunks == 1:
            return [min(self.pipeline - stage, self.microbatches)]
        warm_up = min((self.pipeline - stage - 1) * 2 + (self.chunks - 1) * self.pipeline, self.microbatches * self.chunks - 1)
        held = [0] * self.chunks
        for slot in range(warm_up + 1):
            held[slot // self.pipeline % self.chunks] += 1
        return held
