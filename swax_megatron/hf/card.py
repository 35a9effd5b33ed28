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

{what} {parameters} parameters in {dtype}
(the mLSTM gates in fp32), layer pattern `{pattern}`.

| | |
|---|---|
| training steps | {step:,} of {steps:,} |
| tokens seen | {tokens} |
| sequence length of the training | {length:,} |
| attention window in training | {windows} |
{window_here}| documents in a training row | {boundary} |
| vocabulary | {vocabulary:,} (SentencePiece BPE) |

{use}## Training configuration

```yaml
{config}```
"""

_SWAX_USE = """## Use

Needs `torch` and `transformers>=5.17,<5.25`. The folder holds its own modelling code, hence
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

"""

_XLSTM_USE = """## Use

Needs `torch` and `transformers>=5.17,<5.25`, whose own `xLSTMForCausalLM` this is.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{name}")
model = AutoModelForCausalLM.from_pretrained("{name}", dtype="auto")
inputs = tokenizer("The quick brown fox", return_tensors="pt", return_token_type_ids=False)
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=50)[0], skip_special_tokens=True))
```

The tokenizer adds neither BOS nor EOS, as in training; pad is EOS. transformers' xLSTM knows no padding: give rows of one
length. In bf16 it computes the gates in bf16 as well.

"""

_SECTIONS = ("model", "window", "optimizer", "train")  # the others hold paths of the machine and nothing of the model

_WINDOWS = {
    "fixed": "{first}",
    "stochastic": "drawn each step from {all} with probabilities {probabilities}",
    "ramp": "raised in equal phases over {all}",
}


def model_card(
    config: Config, step: int, state: dict[str, Any], tensors: dict[str, Planned], *, dtype: str, license_id: str, name: str, kind: str
) -> str:
    """Markdown with YAML front matter; ``kind`` is the form of the export."""
    window = config.window
    windows = _WINDOWS[window.schedule].format(first=window.windows[0], all=window.windows, probabilities=window.probabilities)
    if window.anneal_fraction > 0 and window.schedule != "fixed":
        windows += f"; {window.anneal_window} in the last {100 * window.anneal_fraction:g} % of the steps"
    front = {"license": license_id, "library_name": "transformers", "pipeline_tag": "text-generation", "tags": [kind, "mlstm"]}
    is_swax = kind == "swax"
    return _TEXT.format(
        what="A SWAX language model: mLSTM layers interleaved with sliding-window attention." if is_swax else "An xLSTM language model.",
        use=(_SWAX_USE if is_swax else _XLSTM_USE).format(name=name),
        window_here=f"| attention window here (`sliding_window`) | {window.test_window} |\n" if is_swax else "",
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
        boundary="separate (`reset`)" if config.model.document_boundary == "reset" else "memory and attention cross (`carry`)",
        vocabulary=config.model.vocab_size,
        config=yaml.safe_dump({section: to_dict(config)[section] for section in _SECTIONS}, sort_keys=False),
    )
