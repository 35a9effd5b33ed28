"""131k tokens: what is allocated grows linearly, what is kept does not grow."""

from __future__ import annotations

import json

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.generate import main, state_bytes
from tests.unit.hf_reference import tiny, tokens


class LargestTensor(TorchDispatchMode):
    """The number of elements of the largest tensor that any operator returns."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return result


def long_model():
    return tiny("MS", hidden_size=8, intermediate_size=8, head_dim=4, num_attention_heads=2, mlstm_chunk_size=256, sliding_window=64)


def run(model, length, **options):
    with torch.no_grad(), LargestTensor() as largest:
        cache = model(tokens(1, length), use_cache=True, logits_to_keep=1, **options).past_key_values
    return cache, largest.elements


def test_prefill_of_131k_tokens_is_linear_and_its_state_constant():
    model = long_model()
    cache, _ = run(model, 4096)
    kept = state_bytes(cache)
    cache, largest = run(model, 131_072)
    assert state_bytes(cache) == kept
    width = 2 * 10  # the widest projection of a token: the mLSTM's values
    assert largest <= 131_072 * width < 131_072**2 // 800
    with torch.no_grad(), LargestTensor() as single:
        for _ in range(3):
            cache = model(tokens(1, 1), past_key_values=cache, use_cache=True).past_key_values
    assert state_bytes(cache) == kept
    assert single.elements <= 64 * 128  # nothing of the order of the position: the largest is the window's keys or a state


def test_full_attention_would_be_seen():
    """The measure works: an F layer at eager attention allocates T x T."""
    model = tiny("F", hidden_size=8, intermediate_size=8, head_dim=4, num_attention_heads=2)
    model.set_attn_implementation("eager")
    assert run(model, 1024)[1] >= 1024**2


def test_positions_beyond_100k_are_exact():
    """Rotary angles are fp32 of the position itself: a window's output depends on distances alone, at 0 and at 120,000."""
    model, ids = tiny("S"), tokens(1, 40)
    with torch.no_grad():
        near = model(ids, position_ids=torch.arange(40)[None]).logits
        far = model(ids, position_ids=120_000 + torch.arange(40)[None]).logits
    torch.testing.assert_close(far, near, atol=2e-2, rtol=0)


def test_the_benchmark_runs(tmp_path, capsys):
    options = ["--config", "configs/demo.yaml", "--dtype", "fp32", "--device", "cpu", "--lengths", "300", "700", "--steps", "3"]
    assert main([*options, "--warmup", "1", "--out", str(tmp_path / "lines.jsonl")]) == 0
    line = json.loads(capsys.readouterr().out)
    assert line["state_bytes_constant"] and json.loads((tmp_path / "lines.jsonl").read_text()) == line
    assert main(["--config", str(tmp_path / "absent.yaml")]) == 2
