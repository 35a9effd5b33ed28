"""Bytes that one rank sends for one layer under context parallelism, forward and backward, by length of the row.

Real processes exchange what a layer's forward and backward pass exchange, at the sizes of a shipped model (bfloat16 keys, values and
queries, fp32 memories): the window halo of an S layer, the memory scan of an M layer, and the whole row's keys and values of an F
layer. Only the exchanges run: nothing else of a layer leaves its rank. Counted at the transfers (`ContextRanks.bytes_sent`); the
busiest rank is told. One JSON line a layer and length; a summary on stderr.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import queue
import sys
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing

LENGTHS = (4096, 8192, 16384, 32768, 65536, 131072)


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.context_bytes",
        description=__doc__,
        epilog="example:\n  python -m benchmarks.context_bytes --ranks 4 > benchmarks/results/context_bytes.jsonl",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", default="configs/swax_1p4b.yaml", help="whose layers' sizes (default: %(default)s)")
    parser.add_argument("--ranks", type=int, default=4, help="processes that share a row (default: %(default)s)")
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS, help="tokens of a row (default: 4k to 131k)")
    options = parser.parse_args()
    if options.ranks < 2:
        print(f"error: --ranks {options.ranks}: one rank alone sends nothing; use 2 or more", file=sys.stderr)
        return 2
    if any(length < 1 or length % options.ranks for length in options.lengths):
        print(f"error: --lengths {options.lengths}: each must be a multiple of --ranks {options.ranks}", file=sys.stderr)
        return 2
    context = multiprocessing.get_context("spawn")
    lines = context.Queue()
    port = _free_port()
    workers = [
        context.Process(target=_measure, args=(rank, options.ranks, port, options.config, tuple(options.lengths), lines), daemon=True)
        for rank in range(options.ranks)
    ]
    for worker in workers:
        worker.start()
    while True:
        try:
            line = lines.get(timeout=1)
        except queue.Empty:
            if any(worker.exitcode for worker in workers):
                print("error: a process failed; its message stands above", file=sys.stderr)
                return 1
            continue
        if line is None:
            break
        print(json.dumps(line), flush=True)
        print(f"{line['layer']:12} T = {line['length']:7,}: {line['bytes']:>13,} bytes sent by the busiest rank", file=sys.stderr)
    for worker in workers:
        worker.join()
    return 0


def _free_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _measure(rank: int, size: int, port: int, path: str, lengths: tuple[int, ...], lines: Any) -> None:
    """One rank: every layer at every length; rank 0 reports."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), GLOO_SOCKET_IFNAME="lo")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=size)
    from swax_megatron.config import load_config
    from swax_megatron.parallel.context_exchange.ranks import ContextRanks

    config = load_config(path)
    ranks = ContextRanks(dist.group.WORLD)
    layers = {"M": None, **{f"S w={window}": window for window in config.window.windows}, "F": 0}
    for name, window in layers.items():
        for length in lengths:
            ranks.bytes_sent.clear()
            if window is None:
                _memory(config.model, ranks, length // size)
            else:
                _halo(config.model, ranks, length // size, window or length)
            everyone: list[Any] = [None] * size
            dist.all_gather_object(everyone, dict(ranks.bytes_sent))
            if rank == 0:
                busiest = max(everyone, key=lambda sent: sum(sent.values()))
                line = {"layer": name, "length": length, "ranks": size, "rows": 1, "bytes": sum(busiest.values()), "by_kind": busiest}
                line |= {"config": path, "torch": torch.__version__, "device": f"CPU, {platform.machine()}, gloo"}
                lines.put(line)
    if rank == 0:
        lines.put(None)
    dist.barrier()
    dist.destroy_process_group()


def _halo(model: Any, ranks: Any, piece: int, window: int) -> None:
    from swax_megatron.parallel.context_exchange.halo import with_past

    shape = (1, piece, model.attention_kv_heads, model.attention_head_dim)
    k, v = (torch.ones(shape, dtype=torch.bfloat16, requires_grad=True) for _ in range(2))
    both = with_past(k, v, window - 1, ranks)
    torch.autograd.backward(both, [torch.ones_like(x) for x in both])


def _memory(model: Any, ranks: Any, piece: int) -> None:
    from swax_megatron.kernels.mlstm.summary import mlstm_summary
    from swax_megatron.parallel.context_exchange.memory import incoming_memory

    shape = (1, piece, model.mlstm_heads)
    random = torch.Generator().manual_seed(ranks.rank)
    k, v = (torch.randn(*shape, d, generator=random).bfloat16().requires_grad_() for d in (model.mlstm_qk_dim, model.mlstm_v_dim))
    gates = [torch.full(shape, mean, requires_grad=True) for mean in (-10.0, 4.5)]
    one_document = torch.tensor([-ranks.rank * piece])  # which began with the row
    summary = mlstm_summary(k, v, *gates, one_document, gate_cap=model.gate_cap)
    memory = incoming_memory(summary, one_document < 0, ranks)
    (memory.c_bhkv.sum() + memory.n_bhk.sum()).backward()


if __name__ == "__main__":
    sys.exit(main())
