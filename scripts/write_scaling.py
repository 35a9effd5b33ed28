"""Writes the tables of docs/scaling.md: the plan's model of both shipped models from 1 to 1,024 GPUs. Nothing is run; some minutes."""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path

from swax_megatron.config import from_dict, load_config, to_dict
from swax_megatron.model.cost import COSTS, param_count
from swax_megatron.model.pattern import parse_pattern
from swax_megatron.plan.duration import duration
from swax_megatron.plan.layout import Layout
from swax_megatron.plan.propose import Proposal, fastest, fitting
from swax_megatron.plan.traffic import Cluster, all_to_all_bytes
from swax_megatron.schema import Config

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "scaling.md"
MODELS = {"1.4B": "swax_1p4b.yaml", "7B": "swax_7b.yaml"}
TRAINED = ROOT / "benchmarks" / "results" / "train_step_h200.jsonl"
SEVERAL = ROOT / "benchmarks" / "results" / "multi_gpu_h200x2.jsonl"
MEASURED = {  # layouts of the benchmark, and their settings
    "one GPU": {},
    "DP ZeRO-1": {},
    "DP Megatron": {"optimizer": {"backend": "megatron"}},
    "DP ZeRO-2": {"optimizer": {"zero_stage": 2}},
    "PP, four times the rows": {"parallel": {"pipeline": 2}},
    "TP SP": {"parallel": {"tensor": 2}},
    "TP SP, two rows": {"parallel": {"tensor": 2}},
    "TP SP overlapped, two rows": {"parallel": {"tensor": 2, "overlap": True}},
    "CP": {"parallel": {"context": 2}},
    "DP ZeRO-3": {"optimizer": {"zero_stage": 3}},
}
LENGTHS = (16384, 131072)
GPUS = (1, 8, 64, 256, 1024)
EPILOG = """example:
  python scripts/write_scaling.py
"""


def settings(path: str, length: int, transformer: bool) -> Config:
    """A shipped model with rows of ``length`` and as many tokens a step; as a Transformer all layers are full attention."""
    raw = to_dict(load_config(ROOT / "configs" / path))
    tokens = raw["train"]["global_batch_size"] * raw["data"]["sequence_length"]
    raw["train"]["global_batch_size"], raw["data"]["sequence_length"] = tokens // length, length
    raw["parallel"] = {}
    raw["optimizer"]["overlap_gradients"] = False
    if transformer:
        raw["model"]["pattern"] = raw["model"]["pattern"].replace("(MS)", "(FF)")
    return from_dict(raw)


def layout(found: Proposal) -> str:
    """tensor x pipeline x context x data, and what is recomputed and partitioned."""
    it = found.layout
    chunks = f"({it.chunks})" if it.chunks > 1 else ""
    extra = {"none": "", "selective": ", selective", "full": ", full"}[it.config.train.recompute]
    return f"{it.tensor}·{it.pipeline}{chunks}·{it.context}·{it.replicas}, Z{it.config.optimizer.zero_stage}{extra}"


def scaling_tables(path: str, length: int) -> tuple[list[str], list[str]]:
    """As the runs exchange between context-parallel ranks, and as an all-to-all would."""
    other = [
        "| GPUs | SWAX, all-to-all: layout | s a step | tokens/s a GPU | halo over all-to-all "
        "| Transformer, all-to-all: layout | s a step | tokens/s a GPU |",
        "|---|---|---|---|---|---|---|---|",
    ]
    lines = [
        "| GPUs | SWAX: layout | GiB | s a step | tokens/s a GPU | MFU "
        "| Transformer: layout | GiB | s a step | tokens/s a GPU | with its ring hidden |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for count in GPUS:
        cluster = Cluster(gpus_per_node=min(8, count))
        cells, beside = [f"{count:,}"], [f"{count:,}"]
        for transformer in (False, True):
            fits = fitting(settings(path, length, transformer), count, cluster)
            found = fastest(fits, cluster, 1)
            swapped = fastest(fits, cluster, 1, "all_to_all")
            if not swapped:
                beside += ["nothing fits", ""] + [""] * (1 if transformer else 2)
            else:
                time = swapped[0].duration
                beside += [layout(swapped[0]), f"{time.total:.2f}", f"{time.tokens_per_second / count:,.0f}"]
                beside += [] if transformer else [f"{time.total / found[0].duration.total:.2f}"]
            if not found:
                cells += ["nothing fits", "", "", ""] + ([] if transformer else [""])
                cells += [""] if transformer else []
                continue
            best = found[0]
            time, rate = best.duration, best.duration.tokens_per_second / count
            cells += [layout(best), f"{best.memory.total / 2**30:.0f}", f"{time.total:.2f}", f"{rate:,.0f}"]
            if transformer:
                cells.append(f"{rate * time.total / (time.total - time.context / (1 - time.bubble)):,.0f}")
            else:
                cells.append(f"{time.mfu:.0%}")
        lines.append("| " + " | ".join(cells) + " |")
        other.append("| " + " | ".join(beside) + " |")
        print(lines[-1], other[-1], sep="\n", file=sys.stderr)
    return lines, other


def bytes_table(path: str, ranks: int) -> list[str]:
    """MB that the busiest rank sends for one layer and row, forward, by length of the row."""
    model = load_config(ROOT / "configs" / path).model
    lines = [
        "| tokens a row | S, window 2,048 | M | F, ring | S or F, all-to-all | M, all-to-all |",
        "|---|---|---|---|---|---|",
    ]
    for length in (4096, 16384, 65536, 131072, 1048576):
        ours = [COSTS[kind].context_bytes(model, length, 2048, 2, ranks) for kind in "SMF"]
        theirs = [all_to_all_bytes(model, kind, length, 2, ranks) for kind in "SM"]
        lines.append(f"| {length:,} | " + " | ".join(f"{value / 1e6:.1f}" for value in [*ours, *theirs]) + " |")
    return lines


def blocks(only_bytes: bool = False) -> dict[str, list[str]]:
    """Name of a block of the page -> its lines."""
    found = {f"bytes {name}": bytes_table(path, 8) for name, path in MODELS.items()}
    if not only_bytes:
        for name, path in MODELS.items():
            for length in LENGTHS:
                tables = scaling_tables(path, length)
                found[f"scaling {name} {length}"], found[f"all-to-all {name} {length}"] = tables
        found["parameters"] = parameters()
        found["measured"], found["measured on two"] = measured(), measured_on_two()
    return found


def parameters() -> list[str]:
    """The sizes of what is compared."""
    said = []
    for name, path in MODELS.items():
        ours, theirs = (param_count(settings(path, LENGTHS[0], each).model) / 1e9 for each in (False, True))
        said.append(f"{name}: SWAX {ours:.2f} billion, the Transformer {theirs:.2f}")
    return ["Parameters, " + "; ".join(said) + "."]


def measured() -> list[str]:
    """The plan's step on one GPU over the measured one: layers of a model, rows an update, window. The last measurement counts."""
    lines = ["| model | layers | rows a step | window | measured, s a step | planned | planned / measured |", "|" + "---|" * 7]
    found: dict[tuple[str, str, int, int], float] = {}
    for line in map(json.loads, TRAINED.read_text(encoding="utf-8").splitlines()):
        if line.get("side") == "ours" and not line["fp8"] and line["shape"] == "1x16384":
            name = "7B" if line["case"].endswith("7b") else "1.4B"
            pattern = re.search(r"model\.pattern=(\S+)", line["command"])
            found[name, pattern[1] if pattern else "", line["micro-batches"], line["window"]] = line["seconds"]
    for (name, pattern, rows, window), seconds in found.items():
        raw = to_dict(load_config(ROOT / "configs" / MODELS[name]))
        raw["parallel"] = {}
        raw["model"]["pattern"] = pattern or raw["model"]["pattern"]
        raw["train"] |= {"micro_batch_size": 1, "global_batch_size": rows}
        raw["window"] |= {"schedule": "fixed", "windows": [window], "probabilities": None, "anneal_fraction": 0.0}
        config = from_dict(raw)
        planned, layers = duration(Layout.of(config, 1, "triton"), Cluster(gpus_per_node=1)).total, len(parse_pattern(config.model.pattern))
        lines.append(f"| {name} | {layers} | {rows} | {window:,} | {seconds:.3f} | {planned:.3f} | {planned / seconds:.2f} |")
    return lines


def measured_on_two() -> list[str]:
    """The same on two H200 and one of them; the first measurement of a layout counts."""
    lines = ["| layout | rows a micro-batch | measured, s a step | planned | planned / measured |", "|---|---|---|---|---|"]
    told = set()
    for line in map(json.loads, SEVERAL.read_text(encoding="utf-8").splitlines()):
        if line.get("layout") not in MEASURED or "seconds" not in line or "window" not in line or line["layout"] in told:
            continue
        told.add(line["layout"])
        sections = MEASURED[line["layout"]]
        rows = 2 if "two rows" in line["layout"] else 1
        raw = to_dict(load_config(ROOT / "configs" / MODELS["1.4B"]))
        raw["parallel"] = sections.get("parallel", {})
        raw["optimizer"] |= sections.get("optimizer", {})
        raw["train"] |= {"micro_batch_size": rows, "global_batch_size": line["rows"]}
        raw["window"] |= {"schedule": "fixed", "windows": [line["window"]], "probabilities": None, "anneal_fraction": 0.0}
        size, seconds = line["processes"], line["seconds"]
        planned = duration(Layout.of(from_dict(raw), size, "triton"), Cluster(gpus_per_node=size)).total
        lines.append(f"| {line['layout']} | {rows} | {seconds:.3f} | {planned:.3f} | {planned / seconds:.2f} |")
    return lines


def fill(text: str, found: dict[str, list[str]]) -> str:
    """The page with the blocks between their marks replaced."""
    for name, lines in found.items():
        mark = re.compile(rf"(<!-- {re.escape(name)} -->\n).*?(<!-- end -->)", re.DOTALL)
        if not mark.search(text):
            raise ValueError(f"{PAGE} has no block '<!-- {name} -->'")
        text = mark.sub(lambda match, lines=lines: match[1] + "\n" + "\n".join(lines) + "\n\n" + match[2], text)
    return text


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    PAGE.write_text(fill(PAGE.read_text(encoding="utf-8"), blocks()), encoding="utf-8")
    print(f"wrote {PAGE}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
