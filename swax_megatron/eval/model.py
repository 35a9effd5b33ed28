"""A model to evaluate: an export, a checkpoint or a run directory, at any attention window.

Shapes: b rows, t tokens, v vocabulary.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from swax_megatron.checkpoint.store import open_checkpoint
from swax_megatron.config import from_dict
from swax_megatron.data.recall import EOS
from swax_megatron.hf.export import PARAMETER, find_checkpoint, find_tokenizer, plan_weights
from swax_megatron.hf.modeling_swax import SwaxForCausalLM
from swax_megatron.hf.targets import swax_config, swax_target
from swax_megatron.hf.tokenizer import export_tokenizer

Progress = Callable[[str, int, int], None]  # what, done, of how many
CHUNK = 4096  # tokens of one forward pass: memory is O(chunk x window), whatever the context
TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Subject:
    """What is evaluated.

    tokenizer: None where the model has none, for the reason in ``tokenizer_problem``
    name: for reports; window: keys a query of a sliding layer sees in this evaluation
    """

    model: SwaxForCausalLM
    tokenizer: PreTrainedTokenizerBase | None
    tokenizer_problem: str
    name: str
    window: int

    @property
    def device(self) -> torch.device:
        return self.model.device

    def count(self, text: str) -> int:
        """Tokens of a text."""
        return len(self.need_tokenizer()(text, add_special_tokens=False)["input_ids"])

    def need_tokenizer(self) -> PreTrainedTokenizerBase:
        if self.tokenizer is None:
            raise ValueError(f"text tasks need the model's tokenizer: {self.tokenizer_problem}")
        return self.tokenizer

    @torch.inference_mode()
    def logits(self, ids_bt: Tensor) -> Iterator[tuple[int, Tensor]]:
        """(first position, logits (b, chunk, v) in fp32) of unpadded rows, chunk after chunk through the cache."""
        cache = None
        for start in range(0, ids_bt.shape[1], CHUNK):
            output = self.model(ids_bt[:, start : start + CHUNK].to(self.device), past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            yield start, output.logits

    @torch.inference_mode()
    def answer(self, prompts: Sequence[str], tokens: int) -> list[str]:
        """Greedy continuations of at most ``tokens`` tokens, cut at the end-of-text token."""
        tokenizer = self.need_tokenizer()
        rows = [tokenizer(prompt, add_special_tokens=False)["input_ids"] for prompt in prompts]
        longest = max(map(len, rows))
        end = tokenizer.eos_token_id
        ids_bt = torch.tensor([[end] * (longest - len(row)) + row for row in rows], device=self.device)
        mask_bt = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows], device=self.device)
        padded = bool((mask_bt == 0).any())
        cache, done, answers = None, torch.zeros(len(rows), dtype=torch.bool, device=self.device), []
        for start in range(0, longest, CHUNK):
            part = ids_bt[:, start : start + CHUNK]
            seen = mask_bt[:, : start + part.shape[1]] if padded else None
            output = self.model(part, attention_mask=seen, position_ids=_positions(mask_bt, start, part), past_key_values=cache,
                                use_cache=True, logits_to_keep=1)  # fmt: skip
            cache = output.past_key_values
        while True:
            chosen_b1 = output.logits[:, -1].argmax(-1, keepdim=True)
            done |= chosen_b1[:, 0] == end
            answers.append(chosen_b1.masked_fill(done[:, None], end))
            if len(answers) == tokens or bool(done.all()):
                break
            mask_bt = torch.cat([mask_bt, torch.ones_like(chosen_b1)], 1)
            output = self.model(chosen_b1, attention_mask=mask_bt if padded else None, position_ids=mask_bt.sum(1, keepdim=True) - 1,
                                past_key_values=cache, use_cache=True)  # fmt: skip
        return [tokenizer.decode([token for token in row if token != end]) for row in torch.cat(answers, 1).tolist()]


def _positions(mask_bt: Tensor, start: int, part: Tensor) -> Tensor:
    """Positions of a chunk, counted from each row's first real token."""
    return (mask_bt.cumsum(1) - 1).clamp(min=0)[:, start : start + part.shape[1]]


def open_subject(
    path: str | Path, *, window: int | None = None, dtype: str = "bf16", device: str | None = None, tokenizer: Path | None = None
) -> Subject:
    """Load what ``path`` names: an export (config.json), a checkpoint, or a run directory (its newest checkpoint).

    window: None for the one stored with the model; tokenizer: SentencePiece model of a checkpoint, None for that of its training data
    Raises ValueError where the path holds none of these or the window is no positive number.
    """
    path = Path(path)
    if window is not None and window < 1:
        raise ValueError(f"--window {window}: must be at least 1 (a query sees itself)")
    if not path.exists():
        raise ValueError(f"{path} does not exist: give an export folder, a checkpoint or a run directory")
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if (path / "config.json").exists():
        model, encoder, problem = _from_export(path, TYPES[dtype])
    else:
        path = find_checkpoint(path)  # its step belongs to the name: a run that trained on is another model
        model, encoder, problem = _from_checkpoint(path, TYPES[dtype], tokenizer)
    if window is not None:
        model.config.sliding_window = window
    return Subject(model.to(device).eval(), encoder, problem, str(path), model.config.sliding_window)


Loaded = tuple[SwaxForCausalLM, PreTrainedTokenizerBase | None, str]


def _from_export(path: Path, dtype: torch.dtype) -> Loaded:
    model = SwaxForCausalLM.from_pretrained(path, dtype=dtype)
    if not (path / "tokenizer.json").exists():
        return model, None, f"{path} has no tokenizer files; export it again with --tokenizer FILE.model"
    return model, PreTrainedTokenizerFast.from_pretrained(path), ""  # AutoTokenizer would ask whether to run the export's own code


def _from_checkpoint(path: Path, dtype: torch.dtype, tokenizer: Path | None) -> Loaded:
    """The fp32 masters in ``dtype`` (the gates stay fp32, as in training)."""
    checkpoint = open_checkpoint(path)
    config = from_dict(checkpoint.config)
    target = swax_target(config)
    plan = plan_weights(checkpoint, config, target, dtype)
    model = SwaxForCausalLM(swax_config(config, bos=1, eos=EOS))
    weights = {
        name: checkpoint.read_tensor(PARAMETER + target.names[name])[: wanted.shape[0]].to(wanted.dtype) for name, wanted in plan.items()
    }
    model.load_state_dict(weights, strict=False, assign=True)  # plan_weights compared every name and shape
    model.tie_weights()
    with tempfile.TemporaryDirectory(prefix="swax-eval-") as folder:
        try:
            export_tokenizer(find_tokenizer(config, tokenizer), folder)
        except ValueError as error:  # data of ids alone has none; whoever needs one is told why
            return model, None, str(error)
        return model, PreTrainedTokenizerFast.from_pretrained(folder), ""
