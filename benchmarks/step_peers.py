"""Other models of the same size, trained as their users train them: what ``benchmarks/train_step.py`` compares with.

Every peer has our number of layers, hidden size, feed-forward size, vocabulary and update: bf16 weights, fp32 masters and moments, fused
AdamW, gradients clipped at 1. Its ids lie on the GPU. Gradients of several micro-batches add up in bf16, as in the libraries themselves.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import nullcontext
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from swax_megatron.model.pattern import parse_pattern
from swax_megatron.optim.backend import adamw_arguments
from swax_megatron.schema import Config

Loss = Callable[[Tensor, Tensor], Tensor]  # ids (B, T), targets (B, T) -> mean loss


def cases(side: str, config: Config, accumulate: list[int], steps: int) -> list[dict[str, Any]]:
    """One case a number of micro-batches; a case that does not fit says so."""
    where = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        model, loss = BUILD[side](config, where)
    except ImportError as error:
        return [{"not_run": f"{type(error).__name__}: {error}"}]
    found = []
    for count in accumulate:
        try:
            found.append({"micro-batches": count, **_time(model, loss, config, count, steps, where)})
        except torch.cuda.OutOfMemoryError as error:
            found.append({"micro-batches": count, "not_run": str(error).split(". ")[0]})
            model.zero_grad(set_to_none=True)
            torch.cuda.empty_cache()
    return found


def _time(model: nn.Module, loss: Loss, config: Config, count: int, steps: int, where: torch.device) -> dict[str, Any]:
    rows, length = config.train.micro_batch_size, config.data.sequence_length
    update = Update(model, config)
    random = torch.Generator(where).manual_seed(1)
    ids = torch.randint(3, config.model.vocab_size, (count, rows, length + 1), generator=random, device=where)

    def step() -> tuple[float, float]:
        started = time.perf_counter()
        total = torch.zeros((), device=where)
        for batch in ids:
            value = loss(batch[:, :-1], batch[:, 1:]) / count
            value.backward()
            total += value.detach()
        found = float(total)  # waits for the device; the update runs on while the next step is prepared, as in our trainer
        update()
        return found, time.perf_counter() - started

    began = time.perf_counter()
    step(), step()
    first = time.perf_counter() - began
    if where.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    done = [step() for _ in range(steps)]
    seconds = median(taken for _, taken in done)
    measured = {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "seconds": round(seconds, 4),
        "slowest": round(max(taken for _, taken in done), 4),
        "first_two": round(first, 2),
        "tokens_per_second": round(count * rows * length / seconds),
        "loss": round(done[-1][0], 4),
    }
    if where.type == "cuda":
        measured["peak_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
    return measured


class Update:
    """Clipping and AdamW on fp32 masters; the weights follow in their own type."""

    def __init__(self, model: nn.Module, config: Config) -> None:
        self.weights = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.masters = [weight.detach().float().clone() for weight in self.weights]
        self.clip = config.optimizer.clip_grad
        self.adamw = torch.optim.AdamW(self.masters, fused=True, weight_decay=config.optimizer.weight_decay, **adamw_arguments(config))

    @torch.no_grad()
    def __call__(self) -> None:
        nn.utils.clip_grad_norm_(self.weights, self.clip, foreach=True)
        for master, weight in zip(self.masters, self.weights, strict=True):
            master.grad, weight.grad = weight.grad.float(), None
        self.adamw.step()
        self.adamw.zero_grad(set_to_none=True)
        torch._foreach_copy_(self.weights, self.masters)


def llama(config: Config, where: torch.device, *, attention: str = "sdpa", compiled: str = "") -> tuple[nn.Module, Loss]:
    """Hugging Face's Llama; attention "causal": scaled_dot_product_attention with is_causal and no mask, so that blocks are skipped.

    compiled: "whole", model and loss in one graph; "layers", every layer and the loss by itself; "": eager
    """
    import transformers

    if attention == "causal":
        from transformers.masking_utils import AttentionMaskInterface
        from transformers.modeling_utils import AttentionInterface

        AttentionInterface.register("causal", _causal)
        AttentionMaskInterface.register("causal", lambda *_, **__: None)
    model = config.model
    shape = transformers.LlamaConfig(
        vocab_size=model.vocab_size,
        hidden_size=model.hidden_size,
        intermediate_size=model.ffn_hidden_size,
        num_hidden_layers=len(parse_pattern(model.pattern)),
        num_attention_heads=model.attention_heads,
        num_key_value_heads=model.attention_kv_heads,
        head_dim=model.attention_head_dim,
        max_position_embeddings=config.data.sequence_length,
        tie_word_embeddings=model.tie_embeddings,
        use_cache=False,
    )
    shape._attn_implementation = attention
    with torch.device(where):
        built = transformers.LlamaForCausalLM(shape).to(torch.bfloat16).train()

    def plain(ids_bt: Tensor, targets_bt: Tensor) -> Tensor:
        return _loss(built(input_ids=ids_bt).logits, targets_bt)

    if not compiled:
        return built, plain
    if compiled == "whole":
        run = torch.compile(plain)
    else:
        for layer in built.model.layers:
            layer.compile()
        losses = torch.compile(_loss)

        def run(ids_bt: Tensor, targets_bt: Tensor) -> Tensor:
            return losses(built(input_ids=ids_bt).logits, targets_bt)

    def loss(ids_bt: Tensor, targets_bt: Tensor) -> Tensor:
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.CUDNN_ATTENTION) if ids_bt.is_cuda else nullcontext():
            return run(ids_bt, targets_bt)

    return built, loss


def _causal(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *_: Any, scaling: float, **__: Any) -> tuple[Tensor, None]:
    grouped = query.shape[1] != key.shape[1]
    y = nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling, enable_gqa=grouped)
    return y.transpose(1, 2), None


def xlstm(config: Config, where: torch.device) -> tuple[nn.Module, Loss]:
    """Hugging Face's xLSTM with as many blocks, over the kernels of ``mlstm_kernels`` on a GPU."""
    import transformers

    model, triton = config.model, {}
    if where.type == "cuda":
        import mlstm_kernels  # noqa: F401  the class falls back silently without

        triton = {"chunkwise_kernel": "chunkwise--triton_xl_chunk", "sequence_kernel": "native_sequence__triton", "step_kernel": "triton"}
    shape = transformers.xLSTMConfig(
        vocab_size=model.vocab_size,
        hidden_size=model.hidden_size,
        num_hidden_layers=len(parse_pattern(model.pattern)),
        num_heads=model.mlstm_heads,
        ffn_proj_factor=model.ffn_hidden_size / model.hidden_size,
        mode="train",
        use_cache=False,
        **triton,
    )
    with torch.device(where):
        built = transformers.xLSTMForCausalLM(shape).to(torch.bfloat16).train()
    return built, lambda ids_bt, targets_bt: _loss(built(input_ids=ids_bt).logits, targets_bt)


def megatron_gpt(config: Config, where: torch.device) -> tuple[nn.Module, Loss]:
    """Megatron-core's GPTModel with its layers in plain torch (no Transformer Engine), selective recomputation."""
    import os

    from swax_megatron.parallel import device, groups

    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}.items():
        os.environ.setdefault(name, value)
    device.install_cpu_shim()
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
    from megatron.core.transformer import TransformerConfig

    groups.initialize(config)
    if where.type == "cuda":
        model_parallel_cuda_manual_seed(1)
    model = config.model
    shape = TransformerConfig(
        num_layers=len(parse_pattern(model.pattern)),
        hidden_size=model.hidden_size,
        ffn_hidden_size=model.ffn_hidden_size,
        num_attention_heads=model.attention_heads,
        num_query_groups=model.attention_kv_heads,
        kv_channels=model.attention_head_dim,
        gated_linear_unit=True,
        activation_func=nn.functional.silu,
        normalization="RMSNorm",
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        bf16=True,
        params_dtype=torch.bfloat16,
        pipeline_dtype=torch.bfloat16,
        recompute_granularity="selective",
        use_cpu_initialization=where.type != "cuda",
    )
    built = GPTModel(
        shape,
        get_gpt_layer_local_spec(normalization="RMSNorm"),
        model.vocab_size,
        config.data.sequence_length,
        position_embedding_type="rope",
        share_embeddings_and_output_weights=model.tie_embeddings,
    )
    built = built.to(device=where, dtype=torch.bfloat16).train()

    def loss(ids_bt: Tensor, targets_bt: Tensor) -> Tensor:
        positions = torch.arange(ids_bt.shape[1], device=where).expand_as(ids_bt)
        mask = torch.ones(ids_bt.shape[1], ids_bt.shape[1], dtype=torch.bool, device=where).triu(1)[None, None]
        return built(ids_bt, positions, mask, labels=targets_bt).float().mean()

    return built, loss


def _loss(logits: Tensor, targets_bt: Tensor) -> Tensor:
    return nn.functional.cross_entropy(logits.float().flatten(0, 1), targets_bt.flatten())


BUILD: dict[str, Callable[[Config, torch.device], tuple[nn.Module, Loss]]] = {
    "llama": llama,
    "llama-layers-causal": lambda config, where: llama(config, where, attention="causal", compiled="layers"),
    "llama-compiled": lambda config, where: llama(config, where, compiled="whole"),
    "llama-compiled-causal": lambda config, where: llama(config, where, attention="causal", compiled="whole"),
    "megatron-gpt": megatron_gpt,
    "xlstm": xlstm,
}
