"""What a configuration costs on a cluster: memory by part, bytes sent by kind, the bubble and the time of a step; and better layouts."""

from __future__ import annotations

import argparse
import sys
from dataclasses import fields
from typing import Any

from swax_megatron.config import load_config
from swax_megatron.plan.duration import Duration, duration
from swax_megatron.plan.layout import Layout
from swax_megatron.plan.memory import ASIDE, Memory, fullest, memory
from swax_megatron.plan.propose import USABLE, proposals
from swax_megatron.plan.traffic import Cluster, traffic
from swax_megatron.validate import validate

GIB = 2**30
EPILOG = """examples:
  python -m swax_megatron.plan configs/swax_1p4b.yaml --nodes 1 --gpus-per-node 8 --gib 80
  python -m swax_megatron.plan configs/swax_7b.yaml --nodes 16 --link between=25 data.sequence_length=131072
  python -m swax_megatron.plan configs/swax_7b.yaml --nodes 128 --simulate

Nothing is run: the numbers are formulas. Memory is checked against real training steps by the tests; times rest on --efficiency and
--link, which docs/scaling.md explains.
"""


def main(arguments: list[str] | None = None) -> int:
    """Entry point; returns the exit code (1: the configuration does not fit; 2: a mistake in the input)."""
    parser = argparse.ArgumentParser(
        prog="python -m swax_megatron.plan", description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", help="YAML file")
    parser.add_argument("overrides", nargs="*", help="section.field=value")
    parser.add_argument("--nodes", type=int, default=1, help="machines (default: %(default)s)")
    parser.add_argument("--gpus-per-node", type=int, default=8, help="GPUs of one (default: %(default)s)")
    parser.add_argument("--gib", type=float, default=80.0, help="memory of a GPU in GiB (default: %(default)s)")
    parser.add_argument("--peak-tflops", type=float, default=989.0, help="dense bf16 peak of a GPU (default: %(default)s)")
    parser.add_argument("--efficiency", type=float, default=Cluster.efficiency, help="share of it that layers reach (default: %(default)s)")
    parser.add_argument(
        "--link",
        action="append",
        default=[],
        metavar="WHERE=GB/S",
        help="what a GPU sends inside a node (inside=280) and to other nodes (between=40), as reached in practice",
    )
    parser.add_argument("--proposals", type=int, default=5, help="layouts to propose; 0: none (default: %(default)s)")
    parser.add_argument("--simulate", action="store_true", help="also form every rank's groups, layers, rows and boxes, and check")
    options = parser.parse_intermixed_args(arguments)
    try:
        cluster = _cluster(options)
        world_size = options.nodes * options.gpus_per_node
        config = load_config(options.config, options.overrides)
        validate(config, world_size, cuda=True)
        layout = Layout.of(config, world_size, "triton")
        fits = _report(layout, cluster)
        if options.simulate:
            from swax_megatron.plan.simulate import simulate

            print(f"\nsimulated start of {world_size} ranks: {simulate(config, world_size)}")
        if options.proposals:
            _propose(config, world_size, cluster, options.proposals)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0 if fits else 1


def _cluster(options: argparse.Namespace) -> Cluster:
    links: dict[str, Any] = {}
    for text in options.link:
        where, _, value = text.partition("=")
        try:
            links[where] = float(value) * 1e9
        except ValueError:
            links[where] = 0.0
        if where not in ("inside", "between") or not links[where] > 0:
            raise ValueError(f"--link {text}: write inside=GB/S or between=GB/S, e.g. --link between=40")
    for name in ("nodes", "gpus_per_node", "gib", "peak_tflops"):
        if not getattr(options, name) > 0:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(options, name)}: must be more than 0")
    if not 0 < options.efficiency <= 1:
        raise ValueError(f"--efficiency {options.efficiency}: a share of the peak, more than 0 and at most 1")
    return Cluster(options.gpus_per_node, options.gib, options.peak_tflops, options.efficiency, **links)


def _report(layout: Layout, cluster: Cluster) -> bool:
    print(describe(layout))
    print(f"\nGiB on one GPU of each stage (of {cluster.gib:g}, of which {USABLE:.0%} are counted on)")
    names = [item.name for item in fields(Memory) if item.name not in ASIDE] + ["total", *ASIDE]
    print("  (host and snapshot: in host memory, for offload and for checkpoints in the background; resident: between two steps)")
    print("  stage  " + "  ".join(f"{name:>11}" for name in names))
    for stage in range(layout.pipeline):
        need = memory(layout, stage)
        print(f"  {stage:5}  " + "  ".join(f"{getattr(need, name) / GIB:11.2f}" for name in names))
    stage, need = fullest(layout)
    fits = need.total <= USABLE * cluster.gib * GIB
    print(f"  {'fits' if fits else 'DOES NOT FIT'}: stage {stage} needs {need.total / GIB:.1f} GiB")
    print("\nGB that one GPU of the busiest stage sends in a step")
    sent = [traffic(layout, stage) for stage in range(layout.pipeline)]
    for kind in sent[0]:
        print(f"  {kind:9} {max(each[kind] for each in sent) / 1e9:10.3f}")
    print("\nseconds of a step, mean over the run's windows")
    print("  " + summary(duration(layout, cluster)))
    return fits


def describe(layout: Layout) -> str:
    """One line: the layout."""
    config = layout.config
    return (
        f"{layout.world_size} GPUs = tensor {layout.tensor} x pipeline {layout.pipeline} x context {layout.context} x "
        f"data {layout.replicas}; rows of {config.data.sequence_length:,} tokens, "
        f"{layout.microbatches} micro-batches of {config.train.micro_batch_size}, "
        f"recompute {config.train.recompute}, layers of the parts {[len(part) for part in layout.parts]}"
    )


def summary(found: Duration) -> str:
    """One line: the time."""
    return (
        f"{found.total:.3f} = compute {found.compute:.3f}, tensor {found.tensor:.3f}, pipeline {found.pipeline:.3f}, "
        f"context {found.context:.3f}, data {found.data:.3f}, bubble {found.bubble:.1%}; "
        f"{found.tokens_per_second:,.0f} tokens/s, MFU {found.mfu:.1%}"
    )


def _propose(config: Any, world_size: int, cluster: Cluster, count: int) -> None:
    print("\nfastest layouts that fit")
    found = proposals(config, world_size, cluster, count)
    for each in found:
        print(f"  {each.memory.total / GIB:5.1f} GiB  {summary(each.duration)}\n            {' '.join(each.overrides())}")
    if not found:
        print("  none: use more GPUs, shorter rows or a smaller model")


if __name__ == "__main__":
    sys.exit(main())
