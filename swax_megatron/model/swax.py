"""SwaxModel: Megatron-core's LanguageModule and TransformerBlock around our layers.

Legend: s sequence, b batch, v vocabulary entries of this tensor-parallel rank.
"""

from __future__ import annotations

from megatron.core.models.common.embeddings.language_model_embedding import LanguageModelEmbedding
from megatron.core.models.common.language_module.language_module import LanguageModule
from megatron.core.transformer.enums import ModelType
from megatron.core.transformer.transformer_block import TransformerBlock
from torch import Tensor

from swax_megatron.model import parameters
from swax_megatron.model.cost import padded_vocab_size
from swax_megatron.model.head import Head
from swax_megatron.model.initial import embedding, matrix
from swax_megatron.model.layers.specs import stage_spec
from swax_megatron.model.transformer_config import SwaxTransformerConfig, transformer_config
from swax_megatron.parallel.context import SequenceContext
from swax_megatron.parallel.groups import Groups
from swax_megatron.schema import Config


class SwaxModel(LanguageModule):
    """One pipeline chunk of the language model: embedding on the first, head and loss on the last."""

    def __init__(self, config: SwaxTransformerConfig, sequence_length: int, pre_process: bool, post_process: bool, vp_stage: int | None):
        super().__init__(config, pg_collection=config.groups)
        self.model_type = ModelType.encoder_or_decoder  # Megatron's schedules read it
        self.pre_process, self.post_process, self.vp_stage = pre_process, post_process, vp_stage
        self.share_embeddings_and_output_weights = config.model.tie_embeddings
        self.padded_vocab_size = padded_vocab_size(config.model.vocab_size)
        if pre_process:
            self.embedding = LanguageModelEmbedding(
                config, self.padded_vocab_size, sequence_length, position_embedding_type="none", tp_group=config.groups.tp
            )
            parameters.declare(self.embedding.word_embeddings.weight, embedding(config.model), shard_dim=0)
        self.decoder = TransformerBlock(
            config,
            stage_spec(config, vp_stage),
            pre_process=pre_process,
            post_process=post_process,
            pg_collection=config.groups,
            vp_stage=vp_stage,
        )
        if post_process:
            self.output_layer = Head(config, weightless=pre_process and config.model.tie_embeddings)
            if self.output_layer.weight is not None:
                table = embedding if config.model.tie_embeddings else matrix
                parameters.declare(self.output_layer.weight, table(config.model), shard_dim=0)
        if pre_process or post_process:
            self.setup_embeddings_and_output_layer()

    def set_input_tensor(self, input_tensor: Tensor | list[Tensor] | None) -> None:
        """The hidden states received from the previous stage (called by Megatron's schedules)."""
        self.decoder.set_input_tensor(input_tensor[0] if isinstance(input_tensor, list) else input_tensor)

    def forward(self, tokens_bt: Tensor, context: SequenceContext, targets_bt: Tensor | None = None) -> Tensor:
        """Hidden states (s, b, h) on a stage before the last; on the last stage logits (s, b, v) or, with targets,
        the losses of every token, (1 or 2, b, s) fp32: the cross-entropy and, where it is on, the z-loss.
        """
        hidden_sbh = self.embedding(tokens_bt, None) if self.pre_process else None
        hidden_sbh = self.decoder(hidden_sbh, attention_mask=None, packed_seq_params=context)
        if not self.post_process:
            return hidden_sbh
        shared = self.shared_embedding_or_output_weight() if self.share_embeddings_and_output_weights else None
        return self.output_layer(hidden_sbh, shared, targets_bt)


def build_model(config: Config, groups: Groups) -> list[SwaxModel]:
    """This rank's model chunks (one, or virtual_pipeline many), initialised and on its device."""
    megatron = transformer_config(config, groups)
    chunk_count = config.parallel.virtual_pipeline or 1
    chunks = []
    for index in range(chunk_count):
        chunk = SwaxModel(
            megatron,
            config.data.sequence_length,
            pre_process=groups.pipeline_rank == 0 and index == 0,
            post_process=groups.is_last_stage and index == chunk_count - 1,
            vp_stage=index if config.parallel.virtual_pipeline else None,
        ).to(groups.device)
        parameters.initialize(chunk, config.train.model_seed, groups.tensor_rank, groups.tensor_size)
        chunks.append(chunk)
    return chunks
