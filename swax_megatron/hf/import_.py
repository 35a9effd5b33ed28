"""A Hugging Face model -> a training checkpoint (step 0, fresh optimizer), which ``launcher.run`` continues at any layout.

Takes an export of this project (the weights come back bit by bit), an ``xLSTMForCausalLM`` (the layout of xLSTM-7B), or
Llama-style weights layer by layer. The configuration says how to train; what its model section leaves out is taken from the
weights, and what it says otherwise is refused. One tensor in memory at a time. See docs/huggingface.md.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from swax_megatron.checkpoint.store import Deferred, Fragment, latest, save
from swax_megatron.config import from_dict, read_raw, to_dict, to_yaml
from swax_megatron.errors import RunError
from swax_megatron.hf.export import PARAMETER
from swax_megatron.hf.folder import ModelFolder
from swax_megatron.hf.llama import MODEL_TYPES as LLAMA
from swax_megatron.hf.llama import PARTS, llama_source
from swax_megatron.hf.names import EMBEDDING, OUTPUT
from swax_megatron.hf.progress import Progress
from swax_megatron.hf.same_tokenizer import refuse_other_tokenizer
from swax_megatron.hf.swax import swax_source
from swax_megatron.hf.taken import Source, Taken, read
from swax_megatron.hf.targets import parameter_shapes
from swax_megatron.hf.xlstm import xlstm_source
from swax_megatron.model.initial import fill, initial_value
from swax_megatron.model.pattern import parse_pattern
from swax_megatron.model.window import WindowSchedule
from swax_megatron.schema import Config
from swax_megatron.sources import build_mixture
from swax_megatron.validate import validate, validate_inputs

EPILOG = """examples:
  python -m swax_megatron.hf.import_ --model exports/my-model --config train.yaml run_dir=runs/again
  python -m swax_megatron.hf.import_ --model xLSTM-7b --show
  python -m swax_megatron.hf.import_ --model llama --config hybrid.yaml --layers 1=0,3=1 --without embedding head
  python -m launcher.run runs/again/config.yaml

--show prints the model section that the weights ask for and writes nothing.
"""
_TYPES = ("swax", "xlstm", *LLAMA)


def open_source(folder: ModelFolder, layers: str = "order", without: Collection[str] = ()) -> Source:
    """What kind of model a folder holds. ValueError where none of ours."""
    kind = folder.config.get("model_type")
    if kind not in LLAMA and (layers != "order" or without):
        raise ValueError(f"--layers and --without choose among Llama-style weights; {folder.path} is {kind!r}")
    if kind == "swax":
        return swax_source(folder.config)
    if kind == "xlstm":
        return xlstm_source(folder.config)
    if kind in LLAMA:
        return llama_source(folder.config, layers, without)
    raise ValueError(f"{folder.path} is a model of type {kind!r}; {', '.join(_TYPES)} can be imported")


def model_section(source: Source, given: dict[str, Any]) -> dict[str, Any]:
    """The configuration's model section: what it says, and from the weights what it leaves out.

    ValueError that lists every field of ``given`` that does not fit the weights.
    """
    problems = []
    for name, value in source.fixed.items():
        if name in given and not _same(name, given[name], value):
            problems.append(f"model.{name}={given[name]!r}, the weights have {value!r}")
    if problems:
        raise ValueError(f"the configuration does not fit the weights: {'; '.join(problems)}")
    return {**source.suggested, **source.fixed, **given}


def _same(name: str, given: Any, value: Any) -> bool:
    if name == "pattern" and isinstance(given, str):
        return parse_pattern(given) == parse_pattern(value)
    if name in ("attention_kv_heads", "attention_head_dim", "mlstm_qk_dim", "mlstm_v_dim") and given is None:
        return True  # derived; compared once more through the tensors' shapes
    return (given or None) == (value or None) if name == "logit_cap" else given == value


@dataclass(frozen=True)
class Plan:
    """What will be written. fresh: parameters that the source lacks; left: tensors of the source that are not used."""

    config: Config
    shapes: dict[str, tuple[int, ...]]
    taken: dict[str, Taken]
    fresh: list[str]
    left: list[str]


def plan_import(folder: ModelFolder, source: Source, config: Config) -> Plan:
    """ValueError that lists every tensor that is missing, misshaped or has no place in the model."""
    kinds = parse_pattern(config.model.pattern)
    shapes = parameter_shapes(config, padded=False)
    taken = source.plan(kinds, config.model)
    problems = []
    for name, part in taken.items():
        found = part.shape(folder)
        if found is None:
            problems.append(f"{part.name} is missing")
        elif found != shapes.get(name):
            where = "" if part.start is None else f" rows {part.start} to {part.stop}"
            problems.append(f"{part.name}{where} is {found}, not {shapes.get(name)} ({name})")
    unused = set(folder.shapes) - {part.name for part in taken.values()}
    problems += [f"{name} has no place in the model" for name in sorted(unused - source.ignored(taken))]
    if problems:
        raise ValueError(f"{folder.path} does not fit the model: {'; '.join(dict.fromkeys(problems))}")
    return Plan(config, parameter_shapes(config, padded=True), taken, [name for name in shapes if name not in taken], sorted(unused))


def import_model(
    folder: ModelFolder,
    raw: dict[str, Any],
    *,
    layers: str = "order",
    without: Collection[str] = (),
    check_tokenizer: bool = True,
) -> tuple[Path, Plan]:
    """Write ``run_dir/checkpoints/step_0`` and ``run_dir/config.yaml``.

    raw: the training configuration as plain dictionaries (``config.read_raw``)
    Raises ValueError, before anything is written, that names every difference between configuration, weights and tokenizer.
    """
    source = open_source(folder, layers, without)
    given = raw.get("model") or {}
    if not isinstance(given, dict):
        raise ValueError(f"model={given!r}: expected a section with fields")
    config = from_dict({**raw, "model": model_section(source, given)})
    validate(config)
    validate_inputs(config)
    root = Path(config.run_dir) / "checkpoints"
    if latest(root) is not None:
        raise ValueError(f"run_dir={config.run_dir!r} holds checkpoints already: name another run_dir, or move {root} away")
    plan = plan_import(folder, source, config)
    data = build_mixture(config, config.data.train, "train", config.train.data_seed)
    if check_tokenizer and {EMBEDDING, OUTPUT} & set(plan.taken):
        refuse_other_tokenizer(folder.path, config)
    state = {
        "tokens_seen": 0,
        "data": data.state_to_json(data.initial_state()),
        "window_schedule": f"{WindowSchedule.from_config(config).fingerprint():016x}",
        "imported": {"from": folder.path.name, "kind": source.kind, "fresh": plan.fresh},
    }
    path = save(root, 0, _fragments(folder, plan), config=to_dict(config), state=state)
    aside = root.parent / "config.yaml.tmp"
    aside.write_text(to_yaml(config), encoding="utf-8")
    aside.replace(root.parent / "config.yaml")
    return path, plan


def _fragments(folder: ModelFolder, plan: Plan) -> list[Fragment]:
    """Masters from the source or the initialiser, and moments of zero, each made when it is written."""
    total = 3 * 4 * sum(torch.Size(shape).numel() for shape in plan.shapes.values())
    progress = Progress(total)
    found = []
    for name, shape in plan.shapes.items():
        for prefix in (PARAMETER, "exp_avg.", "exp_avg_sq."):
            tensor = Deferred(shape, torch.float32, _reader(folder, plan, name, prefix, progress))
            found.append(Fragment(prefix + name, shape, (0,) * len(shape), tensor))
    return found


def _reader(folder: ModelFolder, plan: Plan, name: str, prefix: str, progress: Progress):
    def make() -> Tensor:
        shape = plan.shapes[name]
        progress(4 * torch.Size(shape).numel())
        if prefix != PARAMETER:
            return torch.zeros(1).expand(shape)  # expanded by the writer, one tensor at a time
        return _master(folder, plan, name)

    return make


def _master(folder: ModelFolder, plan: Plan, name: str) -> Tensor:
    """The fp32 master; rows that pad the vocabulary, and what the source lacks, as the training would have begun with them."""
    shape = plan.shapes[name]
    tensor = torch.empty(shape)
    stored = read(folder, plan.taken[name]) if name in plan.taken else tensor[:0]
    tensor[: stored.shape[0]] = stored
    if stored.shape[0] < shape[0]:
        rest = tensor[stored.shape[0] :]
        offsets = (stored.shape[0], *(0,) * (len(shape) - 1))
        fill(rest, initial_value(name, plan.config.model), name, plan.config.train.model_seed, shape, offsets)
    return tensor


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, metavar="DIR", help="the Hugging Face folder (config.json and safetensors)")
    parser.add_argument("--config", metavar="YAML", help="how to train: data, optimizer, ...; its model section may be left out")
    parser.add_argument("overrides", nargs="*", metavar="section.field=value", help="overrides of single fields")
    parser.add_argument(
        "--layers", default="order", metavar="MAP", help="Llama: order (k-th attention layer), index, or pairs OURS=THEIRS (default order)"
    )
    parser.add_argument("--without", nargs="+", choices=PARTS, default=[], help="Llama: tables that start fresh")
    parser.add_argument("--no-tokenizer-check", action="store_true", help="trust that the data was written with the model's tokenizer")
    parser.add_argument("--show", action="store_true", help="print the model section of the weights and stop")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    args = parser().parse_intermixed_args(argv)
    try:
        folder = ModelFolder(args.model)
        raw = read_raw(args.config, args.overrides)
        if args.show:
            source = open_source(folder, args.layers, args.without)
            print(yaml.safe_dump({"model": {**source.suggested, **source.fixed}}, sort_keys=False), end="")
            return 0
        path, plan = import_model(
            folder, raw, layers=args.layers, without=args.without, check_tokenizer=not args.no_tokenizer_check
        )
    except (ValueError, OSError, RunError) as error:
        print("error: " + " ".join(str(error).split()), file=sys.stderr)
        return 2
    print(f"{path}: {len(plan.taken)} parameters of {folder.path}")
    _tell("start fresh", plan.fresh)
    _tell("of the source were not used", plan.left)
    print(f"continue with: python -m launcher.run {Path(plan.config.run_dir) / 'config.yaml'}")
    return 0


def _tell(what: str, names: list[str]) -> None:
    if names:
        print(f"{len(names)} parameters {what}:", *names, sep="\n  ")


if __name__ == "__main__":
    sys.exit(main())
