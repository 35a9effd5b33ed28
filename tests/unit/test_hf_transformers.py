"""What users of transformers do with a model, checked as transformers' own ModelTesterMixin and GenerationTesterMixin do.

Those classes come with transformers' source and not with its wheel (docs/huggingface.md says how to run them); these are
the same checks for what concerns a causal language model.
"""

from __future__ import annotations

import copy

import pytest
import torch
from torch.utils.data import Dataset
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from swax_megatron.checkpoint.store import open_checkpoint
from swax_megatron.hf.export import export_model
from swax_megatron.hf.modeling_swax import SwaxForCausalLM
from tests.texts import small_tokenizer
from tests.unit.hf_checkpoints import checkpoint_of, random_weights, raw_config
from tests.unit.hf_reference import VOCAB, tiny, tokens

PATTERNS = pytest.mark.parametrize("kinds", ["MS", "MM", "SF"])
GREEDY = {"do_sample": False, "eos_token_id": None, "pad_token_id": 2}


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported")
    raw = raw_config("MSF")
    checkpoint = open_checkpoint(checkpoint_of(folder / "run", raw, random_weights(raw)))
    return export_model(checkpoint, folder / "out", tokenizer=small_tokenizer(folder), max_shard_bytes=40_000)


# -------------------------------------------------------------------------------------------------------- generation


@PATTERNS
@pytest.mark.parametrize(
    "options",
    [
        {"do_sample": False},
        {"do_sample": False, "num_beams": 3, "num_return_sequences": 2},
        {"do_sample": True, "top_k": 5},
        {"do_sample": True, "num_beams": 2},
    ],
    ids=["greedy", "beams", "sample", "beam sample"],
)
def test_generate_tells_everything(kinds, options):
    """Scores, logits and hidden states of every step have the right number and shape, with the cache and without it."""
    model, ids = tiny(kinds), tokens(2, 7)
    rows = 2 * options.get("num_beams", 1)
    for use_cache in (True, False):
        torch.manual_seed(0)
        out = model.generate(
            ids,
            max_new_tokens=4,
            use_cache=use_cache,
            return_dict_in_generate=True,
            output_scores=True,
            output_logits=True,
            output_hidden_states=True,
            **{**GREEDY, **options},
        )
        assert out.sequences.shape == (2 * options.get("num_return_sequences", 1), 11)
        assert len(out.scores) == len(out.logits) == len(out.hidden_states) == 4
        assert all(step.shape == (rows, VOCAB) for step in out.logits)
        assert [len(step) for step in out.hidden_states] == [3] * 4
        assert out.hidden_states[1][0].shape == (rows, 1 if use_cache else 8, 32)
        assert (out.past_key_values is not None) == use_cache


@PATTERNS
def test_generation_continues_from_a_cache(kinds):
    model, ids = tiny(kinds), tokens(2, 7)
    want = model.generate(ids, max_new_tokens=9, **GREEDY)
    out = model.generate(ids, max_new_tokens=4, return_dict_in_generate=True, **GREEDY)
    again = model.generate(out.sequences, past_key_values=out.past_key_values, max_new_tokens=5, **GREEDY)
    assert torch.equal(again, want)


@PATTERNS
def test_generation_from_embeddings(kinds):
    model, ids = tiny(kinds), tokens(2, 7)
    want = model.generate(ids, max_new_tokens=5, **GREEDY)
    got = model.generate(inputs_embeds=model.get_input_embeddings()(ids), max_new_tokens=5, **GREEDY)
    assert torch.equal(got, want[:, 7:])
    both = model.generate(ids, inputs_embeds=model.get_input_embeddings()(ids), max_new_tokens=5, **GREEDY)
    assert torch.equal(both, want)


@PATTERNS
def test_generation_from_nothing_stops_at_eos(kinds):
    model = tiny(kinds)
    out = model.generate(max_new_tokens=5, do_sample=False, bos_token_id=1, eos_token_id=None, pad_token_id=2)
    assert out.shape == (1, 6) and out[0, 0] == 1
    stop = out[0, 3].item()
    assert model.generate(max_new_tokens=5, do_sample=False, bos_token_id=1, eos_token_id=stop, pad_token_id=2)[0, -1] == stop


@PATTERNS
def test_left_padding_changes_no_text(kinds):
    model, ids = tiny(kinds), tokens(1, 7)
    other = tokens(1, 12, seed=4)
    batch = torch.cat((torch.cat((torch.full((1, 5), 2), ids), 1), other))
    mask = torch.ones_like(batch)
    mask[0, :5] = 0
    together = model.generate(batch, attention_mask=mask, max_new_tokens=8, **GREEDY)
    assert torch.equal(together[0, 12:], model.generate(ids, max_new_tokens=8, **GREEDY)[0, 7:])
    assert torch.equal(together[1], model.generate(other, max_new_tokens=8, **GREEDY)[0])


@pytest.mark.parametrize("kinds", ["MS", "MM"])
def test_assisted_generation_is_refused(kinds):
    with pytest.raises(ValueError, match="stateful"):
        tiny(kinds).generate(tokens(1, 7), assistant_model=tiny(kinds), max_new_tokens=4, **GREEDY)


# ----------------------------------------------------------------------------------------------------------- outputs


@pytest.mark.parametrize("kinds, layers", [("MS", 1), ("SF", 2), ("MSFM", 2)])
def test_attentions_come_from_attention_layers(kinds, layers):
    model, ids = tiny(kinds), tokens(2, 6)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        attentions = model(ids, output_attentions=True).attentions
    assert len(attentions) == layers and all(weights.shape == (2, 4, 6, 6) for weights in attentions)
    torch.testing.assert_close(attentions[0].sum(-1), torch.ones(2, 4, 6))


@PATTERNS
def test_tuples_and_dictionaries_agree(kinds):
    model, ids = tiny(kinds), tokens(2, 6)
    options = {"labels": ids, "output_hidden_states": True}
    with torch.no_grad():
        told, plain = model(ids, **options), model(ids, return_dict=False, **options)
    assert torch.equal(plain[0], told.loss) and torch.equal(plain[1], told.logits)
    model.config.return_dict = False
    with torch.no_grad():
        assert isinstance(model(ids), tuple)


@PATTERNS
def test_a_batch_is_its_rows(kinds):
    model, ids = tiny(kinds), tokens(3, 9)
    with torch.no_grad():
        whole = model(ids, attention_mask=torch.ones_like(ids)).logits
        rows = torch.cat([model(row[None]).logits for row in ids])
        assert torch.equal(whole, model(ids).logits)
    torch.testing.assert_close(whole, rows, atol=1e-5, rtol=0)


# -------------------------------------------------------------------------------------------------- loading and sizes


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("size", [VOCAB + 13, VOCAB - 20])
def test_resized_embeddings(tied, size, tmp_path):
    model, ids = tiny("MS", tie_word_embeddings=tied), tokens(2, 9) % (VOCAB - 20)
    with torch.no_grad():
        want = model(ids).logits
        model.resize_token_embeddings(size)
        out = model(ids, labels=ids)
    kept = min(size, VOCAB)
    assert model.config.vocab_size == size and out.logits.shape[-1] == size and out.loss.isfinite()
    torch.testing.assert_close(out.logits[..., :kept], want[..., :kept])
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    model.save_pretrained(tmp_path)
    again = SwaxForCausalLM.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(again(ids).logits, out.logits)


def test_device_map_and_offload(exported, tmp_path):
    """Layers on the CPU and on disk, as accelerate places them where memory is short."""
    ids = tokens(1, 9)
    with torch.no_grad():
        want = SwaxForCausalLM.from_pretrained(exported).eval()(ids).logits
        places = {"model.embed_tokens": "cpu", "model.layers.0": "disk", "model.layers.1": "cpu", "model.layers.2": "disk"}
        places |= {"model.norm": "cpu", "lm_head": "cpu"}
        for device_map in ("cpu", {"": "cpu"}, places):
            model = AutoModelForCausalLM.from_pretrained(
                exported, trust_remote_code=True, device_map=device_map, offload_folder=str(tmp_path / "offload")
            )
            assert torch.equal(model.eval()(ids).logits, want)
            assert torch.equal(model.generate(ids, max_new_tokens=4, **GREEDY)[:, :9], ids)


def test_every_missing_weight_gets_its_initial_value(tmp_path):
    """A folder of half the tensors loads; the other half starts as a fresh model does, and is named."""
    model = tiny("MS")
    half = {name: tensor for name, tensor in model.state_dict().items() if "layers.0" not in name}
    model.save_pretrained(tmp_path, state_dict=half)
    again, told = SwaxForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert {name for name in told["missing_keys"]} == {name for name in model.state_dict() if "layers.0" in name}
    mixer = again.model.layers[0].mixer
    assert mixer.igate_proj.bias.tolist() == [-10.0, -10.0] and not mixer.ogate_proj.weight.any() and mixer.head_norm.weight.eq(1).all()


# ---------------------------------------------------------------------------------------------------------- training


class Rows(Dataset):
    """Sixteen rows that repeat a few ids, padded on the right."""

    def __len__(self):
        return 16

    def __getitem__(self, index):
        ids = torch.arange(12) % (3 + index % 3) + 3
        mask = (torch.arange(12) < 12 - index % 4).long()
        return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def test_trainer(exported, tmp_path):
    """transformers' Trainer on the exported folder: the loss falls, checkpoints of it resume, the saved model loads."""
    options = dict(
        output_dir=str(tmp_path / "out"),
        max_steps=12,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        learning_rate=1e-2,
        gradient_checkpointing=True,
        logging_steps=1,
        save_steps=6,
        report_to=[],
        use_cpu=True,
        seed=0,
    )
    model = AutoModelForCausalLM.from_pretrained(exported, trust_remote_code=True)
    before = copy.deepcopy(model.state_dict())
    trainer = Trainer(model=model, args=TrainingArguments(**options), train_dataset=Rows())
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.7 * losses[0]
    assert all(not torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    trainer.save_model(str(tmp_path / "final"))
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "final", trust_remote_code=True).eval()
    with torch.no_grad():
        assert torch.equal(again(tokens(1, 9)).logits, model.eval()(tokens(1, 9)).logits)
    fresh = AutoModelForCausalLM.from_pretrained(exported, trust_remote_code=True)
    resumed = Trainer(model=fresh, args=TrainingArguments(**options), train_dataset=Rows())
    resumed.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-6"))
    for name, tensor in fresh.state_dict().items():
        torch.testing.assert_close(tensor, model.state_dict()[name], atol=1e-5, rtol=1e-4)
