"""The model by itself: initial weights, parameter and FLOP counts, decay groups, caps and padding."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from swax_megatron.config import from_dict
from swax_megatron.model import cost
from tests import runs

PATTERN = {"model": {"pattern": "(MSF)x2"}}


def save_initial(raw: dict[str, Any]) -> None:
    from swax_megatron.build import build_trainer

    with runs.layout(raw) as (config, groups):
        trainer, checkpoints = build_trainer(config, groups)
        checkpoints.save(trainer)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_initial_weights_do_not_depend_on_the_layout(precision: str, corpus: Path, tmp_path: Path, workers: Any) -> None:
    """Exactly equal at TP2, PP2 and TP2 PP2, for both optimizers; another seed gives others."""
    layouts: dict[str, tuple[int, dict[str, Any]]] = {
        "one": (1, {}),
        "tp2": (2, {"parallel": {"tensor": 2}}),
        "pp2": (2, {"parallel": {"pipeline": 2}, "optimizer": {"backend": "megatron"}}),
        "tp2pp2": (4, {"parallel": {"tensor": 2, "pipeline": 2}}),
    }
    found = {}
    for name, (size, sections) in layouts.items():
        workers(size).run(save_initial, runs.small_config(corpus, tmp_path / name, train={"precision": precision}, **sections))
        found[name] = runs.weights(tmp_path / name, 0)
    for name in layouts:
        assert runs.largest_difference(found[name], found["one"], "")[0] == 0.0, name
    workers(1).run(save_initial, runs.small_config(corpus, tmp_path / "other", train={"precision": precision, "model_seed": 2}))
    assert runs.largest_difference(runs.weights(tmp_path / "other", 0), found["one"])[0] > 0.01


def initial_values(raw: dict[str, Any]) -> dict[str, Any]:
    """Every parameter's initial values and decay by global name."""
    from swax_megatron.build import build_trainer
    from swax_megatron.model.parameters import named_global_parameters

    with runs.layout(raw) as (config, groups):
        trainer, _ = build_trainer(config, groups)
        (chunk,) = trainer.backend.chunks
        return {name: (parameter.detach().float().clone(), parameter.decay) for name, parameter in named_global_parameters(chunk)}


def test_initial_values_and_decay(corpus: Path, tmp_path: Path, workers: Any) -> None:
    """xLSTM-7B's gates, residual projections divided by sqrt(2 layers), decay on matrices only."""
    model = {"pattern": "MS", "hidden_size": 128, "ffn_hidden_size": 256, "init_std": 0.02}
    found = workers(1).run(initial_values, runs.small_config(corpus, tmp_path, model=model))[0]
    gates = "decoder.layers.0.self_attention."
    assert (found[gates + "igate_proj.bias"][0] == -10).all()
    assert torch.equal(found[gates + "fgate_proj.bias"][0], torch.linspace(3, 6, 4))
    for name in ("igate_proj.weight", "fgate_proj.weight", "ogate_proj.weight"):
        assert (found[gates + name][0] == 0).all()
    assert (found["decoder.layers.0.input_layernorm.weight"][0] == 1).all()
    assert found["decoder.layers.0.mlp.gate_proj.weight"][0].std().item() == pytest.approx(0.02, rel=0.03)
    assert found["decoder.layers.1.self_attention.out_proj.weight"][0].std().item() == pytest.approx(0.02 / 4**0.5, rel=0.03)
    decayed = {name for name, (_, decay) in found.items() if decay}
    assert decayed == {name for name in found if name.endswith("_proj.weight") and "igate" not in name and "fgate" not in name}


def test_chosen_initial_values(corpus: Path, tmp_path: Path, workers: Any) -> None:
    """The input gates' bias and the embedding's deviation change nothing else; a tied head starts as the embedding."""
    model = {"pattern": "MS", "hidden_size": 128, "ffn_hidden_size": 256, "init_std": 0.02}
    chosen = {**model, "mlstm_igate_bias": 0.5, "embedding_init_std": 0.5}
    usual, found = (workers(1).run(initial_values, runs.small_config(corpus, tmp_path, model=each))[0] for each in (model, chosen))
    table, bias = "embedding.word_embeddings.weight", "decoder.layers.0.self_attention.igate_proj.bias"
    assert {name for name in found if not torch.equal(found[name][0], usual[name][0])} == {table, bias}
    assert (found[bias][0] == 0.5).all()
    torch.testing.assert_close(found[table][0], usual[table][0] * 25)
    tied = runs.small_config(corpus, tmp_path, model={**chosen, "tie_embeddings": True}, parallel={"pipeline": 2})
    for stage in workers(2).run(initial_values, tied):  # the last stage has a copy, by the embedding's name
        assert torch.equal(stage[table][0], found[table][0]) and "output_layer.weight" not in stage


def test_parameter_count(corpus: Path, tmp_path: Path, workers: Any) -> None:
    for tied in (False, True):
        raw = runs.small_config(corpus, tmp_path, model={"pattern": "MMSF", "tie_embeddings": tied})
        found = workers(1).run(initial_values, raw)[0]
        model = from_dict(raw).model
        assert sum(tensor.numel() for tensor, _ in found.values()) == cost.param_count(model, padded=True)
        rows = cost.padded_vocab_size(model.vocab_size) - model.vocab_size
        assert cost.param_count(model, padded=True) - cost.param_count(model) == rows * model.hidden_size * (1 if tied else 2)


@pytest.mark.parametrize(("size", "parameters"), [("1p4b", 1.34e9), ("7b", 6.32e9)])
def test_the_paper_sizes(size: str, parameters: float) -> None:
    """What our choices of widths come to; the paper gives layers and hidden size only and names them 1.4B and 7B."""
    from swax_megatron.config import load_config

    assert cost.param_count(load_config(f"configs/swax_{size}.yaml").model) == pytest.approx(parameters, rel=0.01)


def counted_flops(raw: dict[str, Any], backward: bool = False) -> dict[str, float]:
    """Matrix-product FLOPs of one row's forward (and backward) pass as torch counts them: by module path in the model, and "" for all."""
    from swax_megatron.build import build_trainer
    from swax_megatron.execution import Pass, run_microbatches

    with runs.layout(raw) as (config, groups):
        trainer, _ = build_trainer(config, groups)
        plan, _ = trainer.data.plan(trainer.state.data, 1)
        job = Pass(config, groups, trainer.backend.chunks, trainer.windows.layers(0))
        with torch.set_grad_enabled(backward), FlopCounterMode(display=False) as counter:
            run_microbatches(job, trainer.load_microbatches(plan), backward=backward)
        counts = {path.partition(".")[2]: float(sum(by_operation.values())) for path, by_operation in counter.get_flop_counts().items()}
        return {**counts, "": float(counter.get_total_flops())}


MIXER_PROJECTIONS = {
    "M": {"q_proj", "k_proj", "v_proj", "ogate_proj", "igate_proj", "fgate_proj", "out_proj"},
    "S": {"q_proj", "k_proj", "v_proj", "out_proj"},
    "F": {"q_proj", "k_proj", "v_proj", "out_proj"},
}


def test_flops_of_the_projections_are_exact(corpus: Path, tmp_path: Path, workers: Any) -> None:
    """Module by module: every kind's projections, the feed-forward networks and the head (with its padding rows) come to the
    formula's numbers exactly; what torch counts beyond them is the mixers' cores alone.
    """
    raw = runs.small_config(corpus, tmp_path, model={**PATTERN["model"], "mlstm_qk_dim": 6, "mlstm_v_dim": 10, "attention_head_dim": 12})
    model, tokens, windows = from_dict(raw).model, runs.SEQUENCE_LENGTH, [5] * 6
    counts = workers(1).run(counted_flops, raw)[0]
    linear = 0.0
    for layer, kind in enumerate("MSFMSF"):
        mixer, mlp = f"decoder.layers.{layer}.self_attention.", f"decoder.layers.{layer}.mlp"
        projections = {path.removeprefix(mixer): count for path, count in counts.items() if path.startswith(mixer) and count}
        projections.pop("head_norm", None)
        assert projections.keys() == MIXER_PROJECTIONS[kind]
        assert sum(projections.values()) == cost.COSTS[kind].projection_flops(model) * tokens, f"layer {layer} ({kind})"
        assert counts[mlp] == 2 * 3 * model.hidden_size * model.ffn_hidden_size * tokens
        linear += sum(projections.values()) + counts[mlp]
    padded = cost.padded_vocab_size(model.vocab_size)
    assert counts["output_layer"] == 2 * model.hidden_size * padded * tokens
    linear += counts["output_layer"] * model.vocab_size / padded  # the formula leaves the padding rows out
    cores = sum(cost.COSTS[kind].core_flops(model, tokens, 5) for kind in "MSFMSF") * tokens
    assert cost.forward_flops(model, tokens, windows) * tokens == pytest.approx(linear + cores, rel=1e-12)
    rest = counts[""] - linear - counts["output_layer"] * (1 - model.vocab_size / padded)
    assert cores <= rest, "the reference's cores cannot do less than the recurrent minimum and the visible keys"


def test_flops_of_training_grow_by_the_formula(corpus: Path, tmp_path: Path, workers: Any) -> None:
    """Between two models of other widths but the same heads, whose cores are alike, torch's count of a whole pass, backward included,
    differs by the formula's number exactly (and by the head's padding rows, which the formula leaves out).
    """
    heads = {**PATTERN["model"], "mlstm_qk_dim": 6, "mlstm_v_dim": 10, "attention_head_dim": 12}
    totals, formulas = [], []
    for hidden, width in ((32, 48), (48, 80)):
        sizes = {**heads, "hidden_size": hidden, "ffn_hidden_size": width}
        raw = runs.small_config(corpus, tmp_path, model=sizes, train={"loss_chunk": 0})
        totals.append(workers(1).run(counted_flops, raw, True)[0][""])
        model = from_dict(raw).model
        padding = 3 * 2 * hidden * (cost.padded_vocab_size(model.vocab_size) - model.vocab_size)
        formulas.append((cost.training_flops(model, runs.SEQUENCE_LENGTH, [5] * 6) + padding) * runs.SEQUENCE_LENGTH)
    assert totals[1] - totals[0] == pytest.approx(formulas[1] - formulas[0], rel=1e-12)


def test_visible_keys() -> None:
    from swax_megatron.model.layers.swa.cost import visible_keys

    for length, window in ((7, 1), (7, 3), (7, 7), (7, 50), (1, 1)):
        assert visible_keys(length, window) == pytest.approx(sum(min(t + 1, window) for t in range(length)) / length)


def losses_at_padding(raw: dict[str, Any], multiple: int) -> list[float]:
    """Train with another padding of the vocabulary (a constant of the format; here alone it is changed)."""
    from swax_megatron.model import cost, swax

    real = swax.padded_vocab_size
    swax.padded_vocab_size = lambda size: -(-size // multiple) * multiple
    try:
        assert cost.padded_vocab_size(200) == 256
        return runs.train(raw)["loss/train"]
    finally:
        swax.padded_vocab_size = real


def test_padding_of_the_vocabulary_takes_no_probability(corpus: Path, tmp_path: Path, workers: Any) -> None:
    """With a soft cap a padded logit near 0 would weigh as much as a real one; equal losses show that it weighs nothing."""
    found = []
    for multiple in (8, 128, 512):
        raw = runs.small_config(corpus, tmp_path / str(multiple), model={"logit_cap": 5.0})
        found.append(workers(1).run(losses_at_padding, raw, multiple)[0])
    assert found[1] == pytest.approx(found[0], abs=2e-6) and found[2] == pytest.approx(found[0], abs=2e-6)


def test_z_loss(corpus: Path, tmp_path: Path, workers: Any) -> None:
    """It changes the gradient and not the reported loss, alike at TP2 and by one process."""
    raws = [
        (1, runs.small_config(corpus, tmp_path / "without")),
        (1, runs.small_config(corpus, tmp_path / "with", optimizer={"z_loss": 0.1})),
        (2, runs.small_config(corpus, tmp_path / "tp2", optimizer={"z_loss": 0.1}, parallel={"tensor": 2})),
    ]
    without, with_z, tensor = [workers(size).run(runs.train, raw)[0] for size, raw in raws]
    assert with_z["loss/train"][0] == without["loss/train"][0]
    assert with_z["optim/grad_norm"][0] != pytest.approx(without["optim/grad_norm"][0], rel=1e-3)
    assert tensor["loss/train"] == pytest.approx(with_z["loss/train"], abs=5e-6)
    assert tensor["optim/grad_norm"] == pytest.approx(with_z["optim/grad_norm"], rel=1e-5)


def test_a_document_sees_neither_its_neighbours_nor_its_place(corpus: Path, tmp_path: Path, workers: Any) -> None:
    """Rows of several documents give each document the logits that it has alone; carry does not."""
    for boundary, same in (("reset", True), ("carry", False)):
        raw = runs.small_config(corpus, tmp_path, model={"document_boundary": boundary, **PATTERN["model"]})
        assert workers(1).run(documents_are_independent, raw)[0] is same


def documents_are_independent(raw: dict[str, Any]) -> bool:
    from swax_megatron.build import build_trainer
    from swax_megatron.data.packing import pack
    from swax_megatron.parallel.context import SequenceContext

    with runs.layout(raw) as (config, groups):
        trainer, _ = build_trainer(config, groups)
        (chunk,) = trainer.backend.chunks
        with torch.no_grad():  # at the initial input gate of -10 the memory would hardly speak
            for name, parameter in chunk.named_parameters():
                if name.endswith("igate_proj.bias"):
                    parameter.fill_(0.0)

        def logits(rows: torch.Tensor) -> torch.Tensor:
            batch = pack(rows, None, 2, config.model.document_boundary)
            windows = trainer.windows.expand(23)
            with torch.no_grad():
                context = SequenceContext(windows=windows, cu_seqlens=batch.cu_seqlens, positions_bt=batch.positions_bt)
                return chunk.eval()(batch.inputs_bt, context).transpose(0, 1)[..., :200]

        length = config.data.sequence_length
        tokens = torch.randint(3, 200, (1, length + 1), generator=torch.Generator().manual_seed(1))
        tokens[0, [30, 60]] = 2
        packed = logits(tokens)
        alone = torch.cat([tokens[:, 31:61], torch.full((1, length + 1 - 30), 5)], dim=1)
        return torch.allclose(packed[0, 31:61], logits(alone)[0, :30], atol=1e-5)
