"""A checkpoint of this project -> a folder that ``transformers`` loads with ``trust_remote_code=True``.

Reads the checkpoint alone: no megatron, no GPU, one tensor in memory at a time. See docs/huggingface.md.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig

from swax_megatron.checkpoint.store import Checkpoint, latest, open_checkpoint
from swax_megatron.config import from_dict
from swax_megatron.data.shards import fingerprint
from swax_megatron.hf.card import model_card
from swax_megatron.hf.progress import Progress
from swax_megatron.hf.shards import Planned, write_shards
from swax_megatron.hf.targets import TARGETS, Target, parameter_shapes
from swax_megatron.hf.tokenizer import export_tokenizer
from swax_megatron.schema import Config

MODEL_FILES = ("configuration_swax.py", "cell_swax.py", "kernels_swax.py", "masks_swax.py", "modeling_swax.py")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
PARAMETER = "param."  # prefix of the weights among a checkpoint's keys
EPILOG = "example:\n  python -m swax_megatron.hf.export --checkpoint runs/my-run --out exports/my-model --dtype bf16"


def find_checkpoint(path: str | Path) -> Path:
    """A checkpoint folder, or the newest of a run folder or of its ``checkpoints``. ValueError where there is none or it is damaged."""
    path = Path(path)
    if (path / "manifest.json").exists() or re.fullmatch(r"step_\d+", path.name):
        return path
    for folder in (path / "checkpoints", path):
        found = latest(folder)
        if found is not None:
            return found
    raise ValueError(f"{path}: no complete checkpoint there; give a run folder, its checkpoints folder or a step_N in it")


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


def plan_weights(checkpoint: Checkpoint, config: Config, target: Target, dtype: torch.dtype) -> dict[str, Planned]:
    """{export name: shape and type}. ValueError that lists every parameter that is missing, misshaped or unknown."""
    shapes = parameter_shapes(config, padded=True)
    stored = {key.removeprefix(PARAMETER) for key in checkpoint.keys() if key.startswith(PARAMETER)}
    problems = [f"{name} is unknown" for name in sorted(stored - set(shapes))]
    for name, right in shapes.items():
        if name not in stored:
            problems.append(f"{name} is missing")
            continue
        shape = tuple(checkpoint.shape(PARAMETER + name))
        if shape != right:
            problems.append(f"{name} is {shape}, not {right}")
    if problems:
        raise ValueError(f"the checkpoint does not fit its own configuration: {'; '.join(problems)}")
    unpadded = parameter_shapes(config, padded=False)
    return {
        name: Planned(unpadded[training], torch.float32 if target.keeps_fp32(name) else dtype) for name, training in target.names.items()
    }


def export_model(
    checkpoint: Checkpoint,
    out: str | Path,
    *,
    dtype: str | None = None,
    max_shard_bytes: int = 2 << 30,
    tokenizer: str | Path | None = None,
    license_id: str = "unknown",
    overwrite: bool = False,
    kind: str = "swax",
) -> Path:
    """Write the export of an opened checkpoint to the folder ``out``, which appears whole or not at all.

    kind: "swax", or "xlstm" (transformers' own xLSTM, for patterns of mLSTM layers alone)
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
    target = TARGETS[kind](config)
    plan = plan_weights(checkpoint, config, target, DTYPES[dtype])
    out.parent.mkdir(parents=True, exist_ok=True)
    aside = out.with_name(f"{out.name}.tmp-{os.getpid()}")
    aside.mkdir()
    try:
        special = export_tokenizer(tokenizer, aside)
        if special["vocab_size"] != config.model.vocab_size:
            raise ValueError(
                f"{tokenizer} has {special['vocab_size']} ids, the model {config.model.vocab_size}; give the training's with --tokenizer"
            )

        def read(name: str) -> Tensor:
            tensor = checkpoint.read_tensor(PARAMETER + target.names[name])
            return tensor[: plan[name].shape[0]].to(plan[name].dtype)

        write_shards(aside, plan, read, max_shard_bytes, Progress(sum(tensor.bytes for tensor in plan.values())))
        _write_json(aside / "config.json", target.config(special["bos"], special["eos"], str(DTYPES[dtype]).removeprefix("torch.")))
        generation = GenerationConfig(bos_token_id=special["bos"], eos_token_id=special["eos"], pad_token_id=special["eos"])
        generation.save_pretrained(aside)
        for file in MODEL_FILES if target.remote_code else ():
            shutil.copyfile(Path(__file__).with_name(file), aside / file)
        card = model_card(config, checkpoint.step, checkpoint.state, plan, dtype=dtype, license_id=license_id, name=out.name, kind=kind)
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
        ours = json.loads((out / "config.json").read_text(encoding="utf-8")).get("model_type") in TARGETS
    except (OSError, ValueError, AttributeError):
        ours = False
    if not ours:
        raise ValueError(f"{out} holds something else than an export: --overwrite does not replace it; choose another --out")


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
    parser.add_argument(
        "--as", dest="kind", choices=list(TARGETS), default="swax", help="xlstm: transformers' own xLSTM, for patterns of M layers alone"
    )
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
            kind=args.kind,
        )
    except (ValueError, OSError) as error:
        print("error: " + " ".join(str(error).split()), file=sys.stderr)
        return 2
    print(f"{out}: step {checkpoint.step} of {checkpoint.path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
