"""The Hugging Face model against an fp64 model written from the training formulas, and its use with transformers."""

import pytest
import torch
import torch.nn.functional as F
from transformers import DynamicCache

from swax_megatron.hf.cell_swax import mlstm_chunkwise, mlstm_step
from swax_megatron.hf.configuration_swax import SwaxConfig
from swax_megatron.hf.masks_swax import CACHE
from swax_megatron.hf.modeling_swax import SwaxForCausalLM
from swax_megatron.kernels.mlstm import mlstm
from tests.unit.hf_reference import reference_logits, tiny, tokens, training_weights

# --------------------------------------------------------------------------------------------------------- mathematics


@pytest.mark.parametrize(
    "kinds, changes",
    [
        ("MSMS", {}),
        ("M", {}),
        ("S", {"sliding_window": 1}),
        ("FMS", {"rope_layer_types": ["sliding_attention"], "logit_cap": None}),
        ("MF", {"tie_word_embeddings": True, "gate_cap": 5.0, "num_key_value_heads": 4}),
    ],
)
def test_logits_equal_the_training_formulas(kinds, changes, monkeypatch):
    """In fp32 to rounding, and with every fp32 cast of the model made an fp64 one, to the fp32 rotary exponents."""
    model = tiny(kinds, **changes)
    ids = tokens(2, 23)
    weights = training_weights(model, kinds)
    want = torch.stack([reference_logits(model.config, weights, kinds, row_ids) for row_ids in ids])
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits.double(), want, atol=5e-4, rtol=0)
        monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
        torch.testing.assert_close(model.double()(ids).logits, want, atol=5e-6 if "S" in kinds or "F" in kinds else 1e-11, rtol=0)


@pytest.mark.parametrize("igate_mean", [-10.0, -4.0, 0.0, 8.0])
@pytest.mark.parametrize("chunk", [1, 3, 16, 64])
def test_chunkwise_is_the_recurrence(igate_mean, chunk):
    """fp64, states included, in the regimes where the normaliser is clamped, mixed and free; with a state handed in."""
    torch.manual_seed(0)
    b, h, t, k, v = 2, 3, 37, 5, 7
    q, key, value = (torch.randn(b, h, t, size, dtype=torch.float64) for size in (k, k, v))
    igate = igate_mean + torch.randn(b, h, t, dtype=torch.float64)
    log_f = F.logsigmoid(4 * torch.randn(b, h, t, dtype=torch.float64))
    start = (torch.randn(b, h, k, v).double(), torch.randn(b, h, k).double(), torch.randn(b, h).double())
    state, steps = start, []
    for i in range(t):
        out, state = mlstm_step(q[:, :, i], key[:, :, i], value[:, :, i], igate[..., i], log_f[..., i], state, 1e-6)
        steps.append(out)
    got, got_state = mlstm_chunkwise(q, key, value, igate, log_f, start, chunk, 1e-6)
    torch.testing.assert_close(got, torch.stack(steps, 2), atol=1e-10, rtol=1e-9)
    for a, e in zip(got_state, state, strict=True):
        torch.testing.assert_close(a, e, atol=1e-10, rtol=1e-9)


def test_chunkwise_gradient_equals_the_recurrent_one():
    torch.manual_seed(0)
    b, h, t, k, v = 1, 2, 19, 4, 6
    leaves = [torch.randn(b, h, t, n, dtype=torch.float64, requires_grad=True) for n in (k, k, v)]
    leaves += [torch.randn(b, h, t, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    zero = (torch.zeros(b, h, k, v).double(), torch.zeros(b, h, k).double(), torch.zeros(b, h).double())
    weight = torch.randn(b, h, t, v, dtype=torch.float64)

    def recurrent(q, key, value, igate, fgate):
        state, out = zero, []
        for i in range(t):
            gates = (igate[..., i], F.logsigmoid(fgate)[..., i])
            h_bhv, state = mlstm_step(q[:, :, i], key[:, :, i], value[:, :, i], *gates, state, 1e-6)
            out.append(h_bhv)
        return torch.stack(out, 2)

    def chunkwise(q, key, value, igate, fgate):
        return mlstm_chunkwise(q, key, value, igate, F.logsigmoid(fgate), zero, 4, 1e-6)[0]

    want = torch.autograd.grad((recurrent(*leaves) * weight).sum(), leaves)
    got = torch.autograd.grad((chunkwise(*leaves) * weight).sum(), leaves)
    for a, e in zip(got, want, strict=True):
        torch.testing.assert_close(a, e, atol=1e-10, rtol=1e-8)


def test_extreme_gates_stay_finite():
    b, h, t = 1, 1, 3000
    q = k = v = torch.ones(b, h, t, 4)
    zero = (torch.zeros(b, h, 4, 4), torch.zeros(b, h, 4), torch.zeros(b, h))
    for igate in (-15.0, 15.0):
        for fgate in (-15.0, 15.0):
            gates = torch.full((b, h, t), igate), F.logsigmoid(torch.full((b, h, t), fgate))
            out, state = mlstm_chunkwise(q, k, v, *gates, zero, 64, 1e-6)
            assert out.isfinite().all() and all(s.isfinite().all() for s in state), (igate, fgate)


@pytest.fixture
def no_compilation():
    """flex_attention without the minutes of compiling it for CPU."""
    torch.compiler.set_stance("force_eager")
    yield
    torch.compiler.set_stance("default")


@pytest.mark.parametrize("backend, length", [("eager", 7), ("sdpa", 7), ("flex_attention", 7), ("eager", 600), ("sdpa", 600)])
def test_window_is_w_keys_with_the_query_itself(backend, length, no_compilation):
    """Gradients of the last query reach exactly the last w positions; 600 runs in bands, 7 through the dense mask."""
    model = tiny("S", sliding_window=4)
    model.set_attn_implementation(backend)
    embeds = torch.randn(1, length, 32, requires_grad=backend != "flex_attention")
    if backend == "flex_attention":  # no backward on CPU: change an input instead
        with torch.no_grad():
            base = model(inputs_embeds=embeds).logits[0, -1]
            moved = []
            for i in range(length):
                other = embeds.clone()
                other[0, i] += 1.0
                moved.append(bool((model(inputs_embeds=other).logits[0, -1] - base).abs().max() > 1e-6))
    else:
        model(inputs_embeds=embeds).logits[0, -1].sum().backward()
        moved = (embeds.grad[0].abs().sum(-1) > 0).tolist()
    assert moved == [False] * (length - 4) + [True] * 4


def test_backends_agree(no_compilation):
    model, ids = tiny("MSFS"), tokens(2, 19)
    mask = torch.ones_like(ids)
    mask[0, :6] = 0
    with torch.no_grad():
        want = model(ids, attention_mask=mask).logits
        for backend in ("eager", "flex_attention"):
            model.set_attn_implementation(backend)
            torch.testing.assert_close(model(ids, attention_mask=mask).logits[mask.bool()], want[mask.bool()], atol=2e-5, rtol=0)


@pytest.mark.parametrize("length", [40, 800], ids=["mask", "bands"])
def test_the_window_may_change_after_loading(length: int) -> None:
    model, ids = tiny("MS", sliding_window=16), tokens(2, length)
    wide = model(ids).logits
    model.config.sliding_window = 5
    other = tiny("MS", sliding_window=5)
    other.load_state_dict(model.state_dict())
    narrow = model(ids).logits
    assert torch.equal(narrow, other(ids).logits)
    assert not torch.equal(narrow, wide)


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
@pytest.mark.parametrize("window", [3, 530])
def test_bands_equal_the_dense_mask(backend, window, monkeypatch):
    """Sequences above 512 tokens: with and without padding, and continued from a cache."""
    model, ids = tiny("MS", sliding_window=window), tokens(2, 800)
    model.set_attn_implementation(backend)
    mask = torch.ones_like(ids)
    mask[0, :80] = 0
    with torch.no_grad():
        banded, padded = model(ids).logits, model(ids, attention_mask=mask).logits
        first = model(ids[:, :250], attention_mask=mask[:, :250])
        second = model(ids[:, 250:], attention_mask=mask, past_key_values=first.past_key_values).logits
        monkeypatch.setattr("swax_megatron.hf.masks_swax.BAND_BLOCK", 1 << 20)
        torch.testing.assert_close(banded, model(ids).logits, atol=2e-5, rtol=0)
        dense = model(ids, attention_mask=mask).logits
    torch.testing.assert_close(padded[mask.bool()], dense[mask.bool()], atol=2e-5, rtol=0)
    torch.testing.assert_close(second[mask[:, 250:].bool()], dense[:, 250:][mask[:, 250:].bool()], atol=2e-5, rtol=0)


# ---------------------------------------------------------------------------------------------------- cache and padding


@pytest.mark.parametrize("kinds", ["MSMS", "MM", "MSF", "SF", "FM"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_gives_the_unpadded_logits(kinds, side):
    model, ids = tiny(kinds), tokens(1, 13)
    pad = torch.full((1, 6), 2)
    other = tokens(1, 19, seed=5)
    row = torch.cat((pad, ids) if side == "left" else (ids, pad), 1)
    mask = (row != 2).long()
    batch, mask = torch.cat((row, other)), torch.cat((mask, torch.ones_like(other)))
    with torch.no_grad():
        want, want_other = model(ids).logits[0], model(other).logits[0]
        got = model(batch, attention_mask=mask).logits
    torch.testing.assert_close(got[0, 6:] if side == "left" else got[0, :13], want, atol=1e-5, rtol=0)
    torch.testing.assert_close(got[1], want_other, atol=1e-5, rtol=0)


def test_padding_between_tokens_leaves_the_memory_alone():
    """A right-padded prompt that goes on: padding must neither write to the memory nor let it fade."""
    model, ids = tiny("MM"), tokens(1, 15)
    row = torch.cat((ids[:, :6], torch.full((1, 9), 2), ids[:, 6:]), 1)
    mask = torch.ones_like(row)
    mask[:, 6:15] = 0
    with torch.no_grad():
        want, got = model(ids).logits, model(row, attention_mask=mask).logits
    torch.testing.assert_close(got[mask.bool()], want[0], atol=1e-5, rtol=0)


@pytest.mark.parametrize("kinds", ["MSMS", "MM", "MSF", "SF"])
@pytest.mark.parametrize("cuts", [(1,), (9,), (3, 4, 5, 11), tuple(range(1, 21))])
def test_prefill_in_pieces_equals_one(kinds, cuts):
    model, ids = tiny(kinds), tokens(2, 21)
    mask = torch.ones_like(ids)
    mask[1, :7] = 0
    with torch.no_grad():
        want = model(ids, attention_mask=mask, use_cache=False).logits
        cache, got = None, []
        for start, stop in zip((0, *cuts), (*cuts, 21), strict=True):
            out = model(ids[:, start:stop], attention_mask=mask[:, :stop], past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            got.append(out.logits)
    torch.testing.assert_close(torch.cat(got, 1)[mask.bool()], want[mask.bool()], atol=1e-5, rtol=0)


def test_cache_is_constant_in_the_length():
    model = tiny("MS")
    sizes = []
    for length in (20, 90):
        with torch.no_grad():
            layers = model(tokens(1, length)).past_key_values.layers
        sizes.append(sum(s.numel() for s in layers[0].recurrent_states.values()) + layers[1].keys.numel() + layers[1].values.numel())
    assert sizes[0] == sizes[1]
    assert layers[1].keys.shape[2] == 4  # w - 1 keys: the query brings its own


def generate(model, ids, **options):
    return model.generate(ids, max_new_tokens=15, eos_token_id=None, pad_token_id=2, **{"do_sample": False, **options})


@pytest.mark.parametrize("kinds", ["MS", "MM", "MSF"])
def test_generate(kinds):
    model, ids = tiny(kinds), tokens(3, 11)
    want = generate(model, ids, use_cache=False)
    assert torch.equal(generate(model, ids), want)
    with torch.no_grad():
        assert torch.equal(model(want).logits[:, 10:-1].argmax(-1), want[:, 11:])
    padded = torch.cat((torch.full((3, 4), 2), ids), 1)
    assert torch.equal(generate(model, padded, attention_mask=(padded != 2).long())[:, 4:], want)
    assert torch.equal(generate(model, ids, prefill_chunk_size=4), want)
    beams = generate(model, ids, num_beams=3)
    assert torch.equal(beams, generate(model, ids, num_beams=3, use_cache=False))
    torch.manual_seed(3)
    sampled = generate(model, ids, do_sample=True, top_k=20)
    torch.manual_seed(3)
    assert torch.equal(sampled, generate(model, ids, do_sample=True, top_k=20, use_cache=False))


@pytest.mark.parametrize("kinds", ["MSMS", "MSF"])
def test_static_cache(kinds):
    model, ids = tiny(kinds), tokens(2, 11)
    static = {"cache_implementation": "static", "disable_compile": True}
    assert torch.equal(generate(model, ids, **static), generate(model, ids))
    padded = torch.cat((torch.full((2, 4), 2), ids), 1)
    mask = (padded != 2).long()
    assert torch.equal(generate(model, padded, attention_mask=mask, **static)[:, 4:], generate(model, ids))


def test_a_cache_without_room_for_states_is_refused():
    model = tiny("MS")
    with pytest.raises(ValueError, match="DynamicCache\\(config=model.config\\)"):
        model(tokens(1, 4), past_key_values=DynamicCache())
    with pytest.raises(ValueError, match="mLSTM"):
        model(tokens(1, 4), attention_mask=torch.ones(1, 1, 4, 4))
    with pytest.raises(ValueError, match="static"):
        generate(tiny("MM"), tokens(1, 4), cache_implementation="static")


def test_bf16_keeps_state_and_gates_in_fp32(tmp_path):
    model = tiny("MS")
    model.save_pretrained(tmp_path)
    model = SwaxForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16).eval()
    assert model.model.layers[0].mixer.q_proj.weight.dtype == torch.bfloat16
    assert model.model.layers[0].mixer.fgate_proj.weight.dtype == torch.float32
    with torch.no_grad():
        out = model(tokens(1, 9))
        out = model(tokens(1, 1), past_key_values=out.past_key_values)
    assert {s.dtype for s in out.past_key_values.layers[0].recurrent_states.values()} == {torch.float32}
    assert out.past_key_values.layers[1].keys.dtype == torch.bfloat16
    assert out.logits.dtype == torch.float32
    ids = tokens(2, 40)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = tiny("M")(ids)
    assert mixed.past_key_values.layers[0].recurrent_states[0].dtype == torch.float32


# ------------------------------------------------------------------------------------------------ outputs and training


def test_outputs():
    model, ids = tiny("MS"), tokens(2, 9)
    with torch.no_grad():
        full = model(ids, labels=ids, output_hidden_states=True)
        assert len(full.hidden_states) == 3 and full.hidden_states[-1].shape == (2, 9, 32)
        torch.testing.assert_close(full.hidden_states[0], model.model.embed_tokens(ids))
        torch.testing.assert_close(model(ids, logits_to_keep=2).logits, full.logits[:, -2:])
        torch.testing.assert_close(model(ids, logits_to_keep=torch.tensor([0, 5])).logits, full.logits[:, [0, 5]])
        want = F.cross_entropy(full.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        torch.testing.assert_close(full.loss, want)
        assert isinstance(model(ids, return_dict=False), tuple)
    assert model.train()(ids).past_key_values is None


def test_training_with_checkpointed_layers():
    ids = tokens(4, 24)

    def run(checkpointed):
        model = tiny("MSF").train()
        if checkpointed:
            model.gradient_checkpointing_enable()
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        losses = []
        for _ in range(6):
            loss = model(ids, labels=ids).loss
            optimizer.zero_grad()
            loss.backward()
            assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
            optimizer.step()
            losses.append(loss.item())
        return losses

    plain, checkpointed = run(False), run(True)
    assert plain[-1] < plain[0] - 0.5
    assert plain == pytest.approx(checkpointed, abs=1e-5)


def test_gradient_through_a_cache():
    """Two segments: the gradient of the second reaches the first through the state, as in one run."""
    model = tiny("MS").train()
    embeds = torch.randn(1, 12, 32, requires_grad=True)
    out = model(inputs_embeds=embeds[:, :7], use_cache=True)
    out = model(inputs_embeds=embeds[:, 7:], past_key_values=out.past_key_values)
    (split,) = torch.autograd.grad(out.logits.square().sum(), embeds)
    (whole,) = torch.autograd.grad(model(inputs_embeds=embeds).logits[:, 7:].square().sum(), embeds)
    assert split[:, :7].abs().max() > 1e-3
    torch.testing.assert_close(split, whole, atol=1e-3, rtol=1e-3)


def test_fresh_weights_follow_the_training_initialisation():
    config = tiny("MS").config
    torch.manual_seed(0)
    mixer = SwaxForCausalLM(config).model.layers[0].mixer
    assert not mixer.igate_proj.weight.any() and not mixer.ogate_proj.weight.any()
    assert mixer.igate_proj.bias.tolist() == [-10.0, -10.0]
    assert mixer.fgate_proj.bias.tolist() == [3.0, 6.0]
    assert 0 < mixer.out_proj.weight.std() < 0.015 < mixer.q_proj.weight.std()


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"layer_types": ["linear_attention"]}, "num_hidden_layers=24"),
        ({"layer_types": ["mamba"] * 24}, "mamba"),
        ({"num_key_value_heads": 3}, "num_key_value_heads=3"),
        ({"sliding_window": 0}, "sliding_window=0"),
        ({"mlstm_chunk_size": 0}, "mlstm_chunk_size=0"),
    ],
)
def test_impossible_configurations_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        SwaxConfig(**fields)


@pytest.mark.parametrize("igate_mean", [-10.0, 2.0])
def test_cell_equals_the_training_kernel(igate_mean):
    torch.manual_seed(0)
    b, t, h, k, v = 2, 70, 3, 8, 12
    q, key, value = (torch.randn(b, t, h, size) for size in (k, k, v))
    igate, fgate = igate_mean + torch.randn(b, t, h), 3 + 3 * torch.randn(b, t, h)
    want = mlstm(q, key, value, igate, fgate, backend="reference")
    zero = (torch.zeros(b, h, k, v), torch.zeros(b, h, k), torch.zeros(b, h))
    gates = (15 * torch.tanh(igate / 15)).transpose(1, 2), F.logsigmoid(15 * torch.tanh(fgate / 15)).transpose(1, 2)
    got, _ = mlstm_chunkwise((q * k**-0.5).transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), *gates, zero, 16, 1e-6)
    torch.testing.assert_close(got.transpose(1, 2), want, atol=2e-5, rtol=1e-4)


def test_both_names_of_the_cache():
    """transformers renamed past_key_values to cache: either is understood, whichever version runs."""
    model, ids = tiny("MS"), tokens(1, 12)
    with torch.no_grad():
        whole = model(ids, use_cache=False).logits[:, 8:]
        for name in ("cache", "past_key_values"):
            found = model(ids[:, 8:], **{name: model(ids[:, :8])[CACHE]}).logits
            torch.testing.assert_close(found, whole, rtol=1e-4, atol=1e-5)
        with pytest.raises(ValueError, match="two names of one argument"):
            model(ids, cache=model(ids)[CACHE], past_key_values=model(ids)[CACHE])
