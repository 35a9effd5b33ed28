"""The memory statistics of a loaded model on documents of a data set: hooks on its mixers, one forward pass a document."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from swax_megatron.data.shards import ShardedDataset
from swax_megatron.eval.model import Progress, Subject
from swax_megatron.hf.modeling_swax import SwaxAttention, SwaxForCausalLM, SwaxMLSTM, rotate
from swax_megatron.model.memory import Report, attention_use, mlstm_memory, report_attention, report_mlstm


def memory_statistics(subject: Subject, dataset: ShardedDataset, documents: int, length: int, progress: Progress) -> dict[str, Any]:
    """Means over the first ``documents`` documents of at least ``length`` / 2 tokens: {name: [one value a head]}.

    Raises ValueError where no document is that long.
    """
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = defaultdict(int)

    def report(name: str, values: Tensor) -> None:
        sums[name] = sums.get(name, 0) + values.double().cpu()
        counts[name] += 1

    done = 0
    with probed(subject.model, report):
        for ids in _long_documents(dataset, length):
            with torch.inference_mode():
                subject.model.model(torch.from_numpy(ids.astype("int64"))[None].to(subject.device), use_cache=False)
            done += 1
            progress("memory", done, documents)
            if done == documents:
                break
    if not done:
        raise ValueError(f"--data {dataset.path} has no document of {length // 2} tokens or more; use a shorter --memory-length")
    return {"data": str(dataset.path), "documents": done, "length": length, "heads": {n: (sums[n] / counts[n]).tolist() for n in sums}}


@contextmanager
def probed(model: SwaxForCausalLM, report: Report) -> Iterator[None]:
    """While open, every forward pass of unpadded rows without a cache reports the statistics of every layer."""

    def on_mlstm(mixer: SwaxMLSTM, arguments: tuple, _: dict) -> None:
        (x_btm,) = arguments[:1]
        q, k, v = (each(x_btm).unflatten(-1, (mixer.num_heads, -1)) for each in (mixer.q_proj, mixer.k_proj, mixer.v_proj))
        gates = (F.linear(x_btm.float(), g.weight.float(), g.bias.float()) for g in (mixer.igate_proj, mixer.fgate_proj))
        report_mlstm(report, mixer.layer_idx, mlstm_memory(q, k, v, *gates, cap=mixer.config.gate_cap))

    def on_attention(mixer: SwaxAttention, arguments: tuple, named: dict) -> None:
        x_btm, rotary = arguments[0], arguments[1] if len(arguments) > 1 else named["rotary"]
        q, k = (each(x_btm).unflatten(-1, (-1, mixer.head_dim)).transpose(1, 2) for each in (mixer.q_proj, mixer.k_proj))
        if mixer.use_rope:
            q, k = rotate(q, rotary), rotate(k, rotary)
        window = mixer.sliding_window or x_btm.shape[1]
        report_attention(report, mixer.layer_idx, attention_use(q.transpose(1, 2), k.transpose(1, 2), window))

    hooks = []
    for module in model.modules():
        if isinstance(module, SwaxMLSTM):
            hooks.append(module.register_forward_pre_hook(on_mlstm, with_kwargs=True))
        elif isinstance(module, SwaxAttention):
            hooks.append(module.register_forward_pre_hook(on_attention, with_kwargs=True))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _long_documents(dataset: ShardedDataset, length: int) -> Iterator[Any]:
    for shard in range(len(dataset.shards)):
        for number, size in enumerate(dataset.index(shard).lengths):
            if size >= length // 2:
                yield dataset.document(shard, number)[:length]
