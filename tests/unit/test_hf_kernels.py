"""The export on the project's kernels: the seam itself, on the CPU, where the same entry points run their plain-torch references."""

from __future__ import annotations

import pytest
import torch

from swax_megatron.hf import kernels_swax
from tests.unit.hf_reference import tiny, tokens


@pytest.fixture
def on_kernels(monkeypatch):
    """Let the CPU count as a device with kernels; the calls are counted by name."""
    calls: dict[str, int] = {}
    mlstm, swa = kernels_swax.packages()

    class Counted:
        def __init__(self, package):
            self._package = package

        def __getattr__(self, name):
            calls[name] = calls.get(name, 0) + 1
            return getattr(self._package, name)

    monkeypatch.setattr(kernels_swax, "DEVICES", ("cpu",))
    monkeypatch.setattr(kernels_swax, "packages", lambda: (Counted(mlstm), Counted(swa)))
    return calls


def test_the_cpu_and_a_missing_package_run_plain_torch(monkeypatch):
    ids = tokens(1, 9)
    embeds = torch.zeros(1, 9, 32)
    assert kernels_swax.kernel_plan(tiny("MS").config, embeds, None, None) is None
    monkeypatch.setattr(kernels_swax, "DEVICES", ("cpu",))
    assert kernels_swax.kernel_plan(tiny("MS", kernels="off").config, embeds, None, None) is None
    assert kernels_swax.kernel_plan(tiny("MS").config, embeds, None, None) is not None
    kernels_swax.packages.cache_clear()
    monkeypatch.setattr(kernels_swax.importlib, "import_module", lambda name: (_ for _ in ()).throw(ImportError(name)))
    try:
        assert kernels_swax.packages() is None
        assert tiny("MS")(ids).logits.isfinite().all()
    finally:
        kernels_swax.packages.cache_clear()


@pytest.mark.parametrize("padding", [None, "ones", "left", "right"])
def test_the_same_logits(padding, on_kernels, monkeypatch):
    """600 tokens, so that attention runs in bands as well. Right padding has no form there and runs as before."""
    model, ids = tiny("MSFM"), tokens(2, 600)
    mask = None if padding is None else torch.ones_like(ids)
    if padding == "left":
        mask[0, :37] = 0
    if padding == "right":
        mask[0, -37:] = 0
    with torch.no_grad():
        got = model(ids, attention_mask=mask).logits
        used = dict(on_kernels)
        monkeypatch.setattr(kernels_swax, "DEVICES", ())
        want = model(ids, attention_mask=mask).logits
    seen = torch.ones_like(ids).bool() if mask is None else mask.bool()
    torch.testing.assert_close(got[seen], want[seen], atol=3e-5, rtol=0)
    assert got.isfinite().all()
    assert (used.get("mlstm"), used.get("swa")) == ((None, None) if padding == "right" else (2, 1))


def test_generation_from_padded_prompts_in_pieces(on_kernels, monkeypatch):
    """Greedy text, one pass and chunked prefill, the state handed from prompt to single steps."""
    model, ids = tiny("MSM"), tokens(2, 20)
    mask = torch.ones_like(ids)
    mask[1, :6] = 0
    options = {"attention_mask": mask, "max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 2}
    got = model.generate(ids, **options)
    assert on_kernels["mlstm_step"] == 2 * 11
    pieces = model.generate(ids, prefill_chunk_size=7, **options)
    monkeypatch.setattr(kernels_swax, "DEVICES", ())
    want = model.generate(ids, **options)
    assert torch.equal(got, want) and torch.equal(pieces, want)


def test_gradients_are_the_same(on_kernels, monkeypatch):
    ids, grads = tokens(1, 40), []
    for devices in (("cpu",), ()):
        monkeypatch.setattr(kernels_swax, "DEVICES", devices)
        model = tiny("MS").train()
        model(ids, labels=ids).loss.backward()
        grads.append({name: parameter.grad for name, parameter in model.named_parameters()})
    assert on_kernels["mlstm"] == 1
    for name, grad in grads[1].items():
        torch.testing.assert_close(grads[0][name], grad, atol=1e-4 * grad.abs().max().item() + 1e-7, rtol=1e-3)
