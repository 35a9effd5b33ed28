"""A checkpoint of this project -> a folder that ``transformers`` loads with ``trust_remote_code=True``.

Reads the checkpoint alone: no megatron, no GPU, one tensor in memory at a time. See docs/huggingface.md.
"""

from __future__ import annotations

import argparse
import inspect
import json
import os
import re
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import GenerationConfig

from swax_megatron.checkpoint.store import Checkpoint, latest, open_checkpoint
from swax_megatron.config import from_dict
from swax_megatron.data.shards import fingerprint
from swax_megatron.hf.card import model_card
from swax_megatron.hf.configuration_swax import SwaxConfig
from swax_megatron.hf.modeling_swax import SwaxForCausalLM, SwaxPreTrainedModel
from swax_megatron.hf.names import EMBEDDING, LAYER_TYPES, OUTPUT, hf_names, layer_types
from swax_megatron.hf.shards import Planned, write_shards
from swax_megatron.hf.tokenizer import export_tokenizer
from swax_megatron.model.cost import padded_vocab_size
from swax_megatron.model.pattern import parse_pattern
from swax_megatron.schema import Config

MODEL_FILES = ("configuration_swax.py", "cell_swax.py", "modeling_swax.py")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
PARAMETER = "param."  # prefix of the weights among a checkpoint's keys
_AUTO_MAP = {
    "AutoConfig": "configuration_swax.SwaxConfig",
    "AutoModel": "modeling_swax.SwaxModel",
    "AutoModelForCausalLM": "modeling_swax.SwaxForCausalLM",
}
EPILOG = "example:\n  python -m swax_megatron.hf.export --checkpoint runs/my-run --out exports/my-model --dtype bf16"


def find_checkpoint(path: str | Path) -> Path:
    """A checkpoint folder, or the newest complete one of a run folder or of its ``checkpoints``. ValueError where there is none."""
    path = Path(path)
    if (path / "manifest.json").exists() or re.fullmatch(r"step_\d+", path.name):
        return path
    for folder in (path / "checkpoints", path):
        found = latest(folder)
        if found is not None:
            return found
    raise ValueError(f"--checkpoint {path}: no complete checkpoint there; give a run folder, its checkpoints folder or a step_N in it")


def swax_config(config: Config, *, bos: int, eos: int) -> SwaxConfig:
    """The export's configuration: the test window becomes its sliding window, pad is EOS."""
    model = config.model
    kinds = parse_pattern(model.pattern)
    return SwaxConfig(
        vocab_size=model.vocab_size,
        hidden_size=model.hidden_size,
        intermediate_size=model.ffn_hidden_size,
        num_hidden_layers=len(kinds),
        layer_types=layer_types(kinds),
        num_attention_heads=model.attention_heads,
        num_key_value_heads=model.attention_kv_heads,
        head_dim=model.attention_head_dim,
        sliding_window=config.window.test_window,
        rope_theta=model.rope_base,
        rope_layer_types=[LAYER_TYPES[kind] for kind in model.rope_kinds if kind in LAYER_TYPES and kind != "M"],
        num_mlstm_heads=model.mlstm_heads,
        mlstm_qk_head_dim=model.mlstm_qk_dim,
        mlstm_v_head_dim=model.mlstm_v_dim,
        gate_cap=model.gate_cap,
        logit_cap=model.logit_cap or None,
        norm_eps=model.norm_eps,
        initializer_range=model.init_std,
        max_position_embeddings=config.data.sequence_length,
        tie_word_embeddings=model.tie_embeddings,
        bos_token_id=bos,
        eos_token_id=eos,
        pad_token_id=eos,
    )


def find_tokenizer(config: Config, given: str | Path | None) -> Path:
    """The SentencePiece model: given, from the configuration, or beside the first training source. ValueError where none is found."""
    if given is not None:
        path, source = Path(given), "--tokenizer"
    elif config.data.tokenizer is not None:
        path, source = Path(config.data.tokenizer), "data.tokenizer of the checkpoint"
    elif config.data.train:
        path, source = Path(config.data.train[0].path) / "tokenizer.model", "beside the checkpoint's first training source"
    else:
        raise ValueError("the checkpoint names no tokenizer and no training data; give --tokenizer X.model")
    if not path.is_file():
        raise ValueError(f"{path} ({source}) is no file here; give --tokenizer X.model")
    for data in config.data.train:
        written_with = _data_fingerprint(Path(data.path) / "manifest.json")
        if written_with is not None and written_with != fingerprint(path):
            raise ValueError(f"{path} is not the tokenizer that wrote the training data {data.path}; give the tokenizer.model beside it")
    return path


def _data_fingerprint(manifest: Path) -> str | None:
    """The tokenizer's sha256 of a data set; None where the data is not on this machine."""
    try:
        return json.loads(manifest.read_text(encoding="utf-8"))["tokenizer"]["sha256"]
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{manifest} is no data set manifest ({error!r})") from error


def plan_weights(
    checkpoint: Checkpoint, config: Config, exported: SwaxConfig, dtype: torch.dtype
) -> tuple[dict[str, Planned], dict[str, str]]:
    """({export name: shape and type}, {export name: training name}).

    Raises ValueError that lists every parameter that is missing, misshaped or unknown.
    """
    names = hf_names(parse_pattern(config.model.pattern), tied=config.model.tie_embeddings)
    with torch.device("meta"):
        wanted = {name: tuple(tensor.shape) for name, tensor in SwaxForCausalLM(exported).named_parameters()}
    assert set(names.values()) == set(wanted), set(names.values()) ^ set(wanted)
    stored = {key.removeprefix(PARAMETER) for key in checkpoint.keys() if key.startswith(PARAMETER)}
    problems = [f"{name} is unknown" for name in sorted(stored - set(names))]
    for training, name in names.items():
        if training not in stored:
            problems.append(f"{training} is missing")
            continue
        shape, right = tuple(checkpoint.shape(PARAMETER + training)), wanted[name]
        if training in (EMBEDDING, OUTPUT):
            right = (padded_vocab_size(config.model.vocab_size), *right[1:])
        if shape != right:
            problems.append(f"{training} is {shape}, not {right}")
    if problems:
        raise ValueError(f"the checkpoint does not fit its own configuration: {'; '.join(problems)}")
    keep_fp32 = SwaxPreTrainedModel._keep_in_fp32_modules_strict
    plan = {
        name: Planned(wanted[name], torch.float32 if any(part in keep_fp32 for part in name.split(".")) else dtype)
        for name in names.values()
    }
    return plan, {name: training for training, name in names.items()}


def export_model(
    checkpoint: Checkpoint,
    out: str | Path,
    *,
    dtype: str | None = None,
    max_shard_bytes: int = 2 << 30,
    tokenizer: str | Path | None = None,
    license_id: str = "unknown",
    overwrite: bool = False,
) -> Path:
    """Write the export of an opened checkpoint to the folder ``out``, which appears whole or not at all.

    dtype: "fp32", "bf16" or None (the precision of the training); gates stay fp32. Raises ValueError, before anything is
    written, where the checkpoint, the tokenizer or ``out`` does not allow it.
    """
    out = Path(out)
    _refuse_existing(out, overwrite)
    config = from_dict(checkpoint.config)
    dtype = dtype or config.train.precision
    if dtype not in DTYPES:
        raise ValueError(f"--dtype={dtype}: choose one of {', '.join(DTYPES)}")
    tokenizer = find_tokenizer(config, tokenizer)
    plan, training_names = plan_weights(checkpoint, config, swax_config(config, bos=1, eos=2), DTYPES[dtype])
    out.parent.mkdir(parents=True, exist_ok=True)
    aside = out.with_name(f"{out.name}.tmp-{os.getpid()}")
    aside.mkdir()
    try:
        special = export_tokenizer(tokenizer, aside)
        if special["vocab_size"] != config.model.vocab_size:
            raise ValueError(
                f"{tokenizer} has {special['vocab_size']} ids, the model {config.model.vocab_size}; give the training's with --tokenizer"
            )
        exported = swax_config(config, bos=special["bos"], eos=special["eos"])

        def read(name: str) -> Tensor:
            tensor = checkpoint.read_tensor(PARAMETER + training_names[name])
            return tensor[: plan[name].shape[0]].to(plan[name].dtype)

        write_shards(aside, plan, read, max_shard_bytes, _Progress(sum(tensor.bytes for tensor in plan.values())))
        _write_json(aside / "config.json", _config_json(exported, dtype))
        generation = GenerationConfig(bos_token_id=special["bos"], eos_token_id=special["eos"], pad_token_id=special["eos"])
        generation.save_pretrained(aside)
        for file in MODEL_FILES:
            shutil.copyfile(Path(__file__).with_name(file), aside / file)
        card = model_card(config, checkpoint.step, checkpoint.state, plan, dtype=dtype, license_id=license_id, name=out.name)
        (aside / "README.md").write_text(card, encoding="utf-8")
        _fsync(aside)
        _publish(aside, out)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return out


def _refuse_existing(out: Path, overwrite: bool) -> None:
    if not os.path.lexists(out):
        return
    if not overwrite:
        raise ValueError(f"{out} exists already; choose another --out or add --overwrite")
    try:
        ours = json.loads((out / "config.json").read_text(encoding="utf-8")).get("model_type") == SwaxConfig.model_type
    except (OSError, ValueError, AttributeError):
        ours = False
    if not ours:
        raise ValueError(f"{out} holds something else than an export: --overwrite does not replace it; choose another --out")


def _config_json(config: SwaxConfig, dtype: str) -> dict[str, Any]:
    """config.json with every field of SwaxConfig, also those at their defaults."""
    everything = config.to_dict()
    fields = [name for name in inspect.signature(SwaxConfig.__init__).parameters if name in everything]
    return {
        "architectures": [SwaxForCausalLM.__name__],
        "auto_map": _AUTO_MAP,
        "model_type": SwaxConfig.model_type,
        "dtype": str(DTYPES[dtype]).removeprefix("torch."),
        **{name: everything[name] for name in fields},
        "number_of_conv_states": config.number_of_conv_states,
        "transformers_version": transformers.__version__,
    }


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _fsync(folder: Path) -> None:
    for path in [*folder.iterdir(), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _publish(aside: Path, out: Path) -> None:
    """Rename into place; an older export steps aside first and is deleted last."""
    old = None
    if out.exists():
        old = out.with_name(f"{out.name}.replaced-{os.getpid()}")
        out.rename(old)
    try:
        aside.rename(out)
    except OSError:
        if old is not None:
            old.rename(out)
        raise
    if old is not None:
        shutil.rmtree(old)


class _Progress:
    """Lines on stderr: share written, rate, time left."""

    def __init__(self, total: int, interval: float = 5.0) -> None:
        self._total, self._interval, self._done = total, interval, 0
        self._start = self._last = time.monotonic()

    def __call__(self, written: int) -> None:
        self._done += written
        now = time.monotonic()
        if now - self._last >= self._interval:
            self._last = now
            rate = self._done / (now - self._start)
            left = (self._total - self._done) / rate
            print(f"{100 * self._done / self._total:5.1f} %, {rate / 1e6:.0f} MB/s, {left:.0f} s left", file=sys.stderr, flush=True)


def parse_size(text: str) -> int:
    """Bytes of "2GB", "500MB", "150KB" or "4096" (decimal, as in transformers) or of "2GiB" (binary)."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?", text.strip(), re.IGNORECASE)
    size = int(float(match[1]) * (1024 if match[3] else 1000) ** " KMGT".index(match[2].upper() or " ")) if match else 0
    if size < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no size; write for example 2GB, 500MB or 2GiB")
    return size


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True, metavar="PATH", help="a step_N folder, or a run folder (its newest complete one)")
    parser.add_argument("--out", required=True, metavar="DIR", help="the folder to write")
    parser.add_argument("--dtype", choices=list(DTYPES), help="type of the weights, gates stay fp32 (default: as in training)")
    parser.add_argument("--max-shard-size", type=parse_size, default="2GB", metavar="SIZE", help="of a weight file (default %(default)s)")
    parser.add_argument("--tokenizer", metavar="FILE", help="SentencePiece .model (default: the one of the training data)")
    parser.add_argument("--license", default="unknown", metavar="ID", help="license of the weights on the model card, e.g. apache-2.0")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing export")
    parser.add_argument("--no-verify", action="store_true", help="do not compare the checkpoint's files with their sha256 first")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    args = parser().parse_args(argv)
    try:
        _refuse_existing(Path(args.out), args.overwrite)
        checkpoint = open_checkpoint(find_checkpoint(args.checkpoint))
        if not args.no_verify:
            print(f"verifying {checkpoint.path}", file=sys.stderr, flush=True)
            checkpoint.verify()
        out = export_model(
            checkpoint,
            args.out,
            dtype=args.dtype,
            max_shard_bytes=args.max_shard_size,
            tokenizer=args.tokenizer,
            license_id=args.license,
            overwrite=args.overwrite,
        )
    except (ValueError, OSError) as error:
        print("error: " + " ".join(str(error).split()), file=sys.stderr)
        return 2
    print(f"{out}: step {checkpoint.step} of {checkpoint.path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
