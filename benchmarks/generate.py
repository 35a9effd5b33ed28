"""Does generation slow down with the position? Decode time a token and state bytes after a short and a long prompt.

Both prompts are prefilled once (in pieces, so that activations stay small), then single tokens are decoded after each of them
in turn, so that a machine whose speed drifts treats both alike. Prints one JSON line, which --out also appends to a file.
The weights are an export's, or random ones of a configuration: time does not depend on them.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import statistics
import sys
import time
from datetime import date
from pathlib import Path
from typing import Any

import torch
import transformers

from swax_megatron.config import load_config
from swax_megatron.hf.modeling_swax import SwaxForCausalLM
from swax_megatron.hf.targets import swax_config

EPILOG = """examples:
  python -m benchmarks.generate --config configs/swax_1p4b.yaml --out benchmarks/results/generate_h100.jsonl
  python -m benchmarks.generate --config configs/demo.yaml --dtype fp32
  python -m benchmarks.generate --model exports/my-model --lengths 4096 131072
"""
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def build(args: argparse.Namespace) -> SwaxForCausalLM:
    """The model on its device, in evaluation mode."""
    if args.model:
        model = SwaxForCausalLM.from_pretrained(args.model, dtype=DTYPES[args.dtype])
    else:
        torch.manual_seed(0)
        model = SwaxForCausalLM(swax_config(load_config(args.config), bos=1, eos=2))
        for name, parameter in model.named_parameters():  # the gates stay in fp32, as in an export
            if not any(gate in name for gate in model._keep_in_fp32_modules_strict):
                parameter.data = parameter.data.to(DTYPES[args.dtype])
    if args.kernels:
        model.config.kernels = args.kernels
    return model.to(args.device).eval()


def prefill(model: SwaxForCausalLM, ids_bt: torch.Tensor, piece: int) -> tuple[Any, float]:
    """The cache after a prompt, and the seconds that it took."""
    started, cache = now(ids_bt), None
    for start in range(0, ids_bt.shape[1], piece):
        cache = model(ids_bt[:, start : start + piece], past_key_values=cache, use_cache=True, logits_to_keep=1).past_key_values
    return cache, now(ids_bt) - started


def now(on: torch.Tensor) -> float:
    if on.is_cuda:
        torch.cuda.synchronize(on.device)
    return time.perf_counter()


def state_bytes(cache: Any) -> int:
    """Bytes of everything a cache keeps for its rows."""
    total = 0
    for layer in cache.layers:
        tensors = layer.recurrent_states.values() if hasattr(layer, "recurrent_states") else (layer.keys, layer.values)
        total += sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    return total


def decode(model: SwaxForCausalLM, caches: dict[int, Any], steps: int, warmup: int) -> dict[int, list[float]]:
    """Milliseconds of single steps after each prompt, taken in turn."""
    token = torch.full((1, 1), 5, device=model.device)
    times: dict[int, list[float]] = {length: [] for length in caches}
    for step in range(warmup + steps):
        for length in list(caches) if step % 2 else list(caches)[::-1]:
            started = now(token)
            model(token, past_key_values=caches[length], use_cache=True)
            spent = 1e3 * (now(token) - started)
            if step >= warmup:
                times[length].append(spent)
    return times


def measure(args: argparse.Namespace) -> dict[str, Any]:
    model = build(args)
    device = torch.device(args.device)
    ids_bt = torch.randint(3, model.config.vocab_size, (1, max(args.lengths)), device=device)
    with torch.inference_mode():
        caches, speed = {}, {}
        for length in args.lengths:
            caches[length], seconds = prefill(model, ids_bt[:, :length], args.piece)
            speed[length] = round(length / seconds, 1)
            print(f"prefilled {length} tokens, {speed[length]:.0f} tokens/s", file=sys.stderr, flush=True)
        before = {length: state_bytes(cache) for length, cache in caches.items()}
        times = decode(model, caches, args.steps, args.warmup)
        after = {length: state_bytes(cache) for length, cache in caches.items()}
    first, last = args.lengths[0], args.lengths[-1]
    paired = sorted(b / a for a, b in zip(times[first], times[last], strict=True))
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else f"{platform.machine()} CPU",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "model": args.model or args.config,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "dtype": args.dtype,
        "kernels": model.config.kernels,
        "prefill_tokens_per_second": speed,
        "decode_ms_median": {length: round(statistics.median(spent), 4) for length, spent in times.items()},
        "decode_ratio_median_of_pairs": round(statistics.median(paired), 4),
        "steps": args.steps,
        "state_bytes": before,
        "state_bytes_constant": before == after and len(set(before.values())) == 1,
        "peak_bytes": peak,
        "date": date.today().isoformat(),
        "command": "python -m benchmarks.generate " + " ".join(args.argv),
    }


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter)
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--model", metavar="DIR", help="an export")
    which.add_argument("--config", metavar="YAML", help="random weights of this configuration")
    parser.add_argument("--lengths", nargs="+", type=int, default=[4096, 131072], metavar="N", help="prompt lengths (default 4096 131072)")
    parser.add_argument("--steps", type=int, default=200, help="measured tokens after each prompt (default %(default)s)")
    parser.add_argument("--warmup", type=int, default=20, help="tokens before them (default %(default)s)")
    parser.add_argument("--piece", type=int, default=4096, help="tokens of a prompt at once (default %(default)s)")
    parser.add_argument("--dtype", choices=list(DTYPES), default="bf16", help="type of the weights (default %(default)s)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: cuda where there is one")
    parser.add_argument("--kernels", choices=["auto", "off"], help="the project's Triton kernels (default: as the model says)")
    parser.add_argument("--out", metavar="FILE", help="append the JSON line to this file as well")
    return parser


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    args = parser().parse_args(argv)
    args.argv = argv
    try:
        line = json.dumps(measure(args))
    except (ValueError, OSError) as error:
        print("error: " + " ".join(str(error).split()), file=sys.stderr)
        return 2
    print(line)
    if args.out:
        with open(Path(args.out), "a", encoding="utf-8") as file:
            file.write(line + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
