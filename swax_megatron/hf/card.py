"""The model card (README.md) of an export."""

from __future__ import annotations

from math import prod
from typing import Any

import yaml

from swax_megatron.config import to_dict
from swax_megatron.hf.shards import Planned
from swax_megatron.schema import Config

_TEXT = """---
{front}---

# {name}

A SWAX language model: mLSTM layers interleaved with sliding-window attention. {parameters} parameters in {dtype}
(the mLSTM gates in fp32), layer pattern `{pattern}`.

| | |
|---|---|
| training steps | {step:,} of {steps:,} |
| tokens seen | {tokens} |
| sequence length of the training | {length:,} |
| attention window in training | {windows} |
| attention window here (`sliding_window`) | {test_window} |
| documents in a training row | {boundary} |
| vocabulary | {vocabulary:,} (SentencePiece BPE) |

## Use

Needs `torch` and `transformers>=5.17,<6`. The folder holds its own modelling code, hence
`trust_remote_code` (for the tokenizer it only avoids a question: it has no code).

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{name}", trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained("{name}", trust_remote_code=True, dtype="auto")
inputs = tokenizer("The quick brown fox", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=50)[0], skip_special_tokens=True))
```

The tokenizer adds neither BOS nor EOS, as in training; pad is EOS. Text such as `</s>` is plain text
(`split_special_tokens=False` reads it as the special token). Memory at generation does not grow with the length in
mLSTM and sliding-window layers. Every row is one document: packed rows are not separated.

## Training configuration

```yaml
{config}```
"""

_SECTIONS = ("model", "window", "optimizer", "train")  # the others hold paths of the machine and nothing of the model

_WINDOWS = {
    "fixed": "{first}",
    "stochastic": "drawn each step from {all} with probabilities {probabilities}",
    "ramp": "raised in equal phases over {all}",
}


def model_card(
    config: Config, step: int, state: dict[str, Any], tensors: dict[str, Planned], *, dtype: str, license_id: str, name: str
) -> str:
    """Markdown with YAML front matter."""
    window = config.window
    windows = _WINDOWS[window.schedule].format(first=window.windows[0], all=window.windows, probabilities=window.probabilities)
    if window.anneal_fraction > 0 and window.schedule != "fixed":
        windows += f"; {window.anneal_window} in the last {100 * window.anneal_fraction:g} % of the steps"
    front = {"license": license_id, "library_name": "transformers", "pipeline_tag": "text-generation", "tags": ["swax", "mlstm"]}
    return _TEXT.format(
        front=yaml.safe_dump(front, sort_keys=False),
        name=name,
        parameters=f"{sum(prod(tensor.shape) for tensor in tensors.values()):,}",
        dtype=dtype,
        pattern=config.model.pattern,
        step=step,
        steps=config.train.steps,
        tokens=f"{state['tokens_seen']:,}" if "tokens_seen" in state else "not recorded",
        length=config.data.sequence_length,
        windows=windows,
        test_window=window.test_window,
        boundary="separate (`reset`)" if config.model.document_boundary == "reset" else "memory and attention cross (`carry`)",
        vocabulary=config.model.vocab_size,
        config=yaml.safe_dump({section: to_dict(config)[section] for section in _SECTIONS}, sort_keys=False),
    )
