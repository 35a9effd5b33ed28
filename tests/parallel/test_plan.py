"""The plan's command, its proposals, the bytes it foresees against counted ones, and the start of 1,024 ranks."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from scripts import write_scaling
from swax_megatron.config import from_dict, load_config
from swax_megatron.model.cost import COSTS, param_count
from swax_megatron.model.stages import layer_costs
from swax_megatron.plan.__main__ import main
from swax_megatron.plan.duration import bubble, core_flops, duration
from swax_megatron.plan.layout import Layout
from swax_megatron.plan.memory import fullest
from swax_megatron.plan.propose import USABLE, proposals
from swax_megatron.plan.simulate import check_owned, optimizer_boxes, simulate
from swax_megatron.plan.traffic import Cluster, context_bytes, traffic
from swax_megatron.validate import validate
from tests import runs

ROOT = Path(__file__).parents[2]
CONFIG = str(ROOT / "configs" / "swax_1p4b.yaml")
SEVEN = str(ROOT / "configs" / "swax_7b.yaml")


def layout(path: str, world: int, *overrides: str) -> Layout:
    config = load_config(path, overrides)
    validate(config, world, cuda=True)
    return Layout.of(config, world, "triton")


def test_every_parameter_is_counted_once() -> None:
    """Stages and shards together hold the model (its norms once a tensor-parallel rank)."""
    for path in (CONFIG, SEVEN):
        for overrides in ((), ("parallel.tensor=1", "parallel.pipeline=4"), ("parallel.tensor=4", "parallel.pipeline=2")):
            found = layout(path, 16, *overrides)
            model, tensor = found.config.model, found.tensor
            norms = (2 * sum(map(len, found.parts)) + 1) * model.hidden_size
            held = sum(found.parameters(stage) for stage in range(found.pipeline)) * tensor
            assert held == param_count(model, padded=True) + (tensor - 1) * norms


def test_in_flight_and_bubble() -> None:
    plain = layout(CONFIG, 4, "parallel.tensor=1", "parallel.pipeline=4")
    assert [plain.in_flight(stage) for stage in range(4)] == [[4], [3], [2], [1]] and bubble(plain) == pytest.approx(3 / (64 + 3))
    chunked = layout(CONFIG, 4, "parallel.tensor=1", "parallel.pipeline=4", "parallel.virtual_pipeline=2")
    assert bubble(chunked) == pytest.approx(3 / (2 * 64 + 3)) and [sum(chunked.in_flight(stage)) for stage in range(4)] == [11, 9, 7, 5]


def test_partitioning_and_recomputing_save_what_they_should() -> None:
    base = ("parallel.tensor=1",)
    need = [fullest(layout(CONFIG, 8, *base, f"optimizer.zero_stage={stage}"))[1] for stage in range(4)]
    count = need[0].weights / 2
    assert need[0].optimizer == 12 * count and need[1].optimizer == pytest.approx(12 * count / 8)
    assert need[1].gradients == 4 * count and need[2].gradients == pytest.approx(count / 2) and need[3].weights == pytest.approx(count / 4)
    kept = [fullest(layout(CONFIG, 8, *base, f"train.recompute={how}"))[1].activations for how in ("none", "selective", "full")]
    assert kept[0] > kept[1] > 5 * kept[2]
    cut = ("parallel.tensor=1", "parallel.context=8")
    short, long = (traffic(layout(CONFIG, 8, *cut, f"data.sequence_length={length}"), 0) for length in (16384, 131072))
    assert short["context"] == long["context"] > 0 and short["data"] == long["data"]


def test_proposals_are_valid_fit_and_are_sorted() -> None:
    cluster = Cluster(gpus_per_node=8, gib=40.0)
    config = load_config(CONFIG)
    found = proposals(config, 8, cluster, 20)
    times = [round(each.duration.total, 4) for each in found]  # what lies closer together is sorted by simplicity
    assert len(found) == 20 and times == sorted(times)
    for each in found:
        again = load_config(CONFIG, each.overrides())
        validate(again, 8, cuda=True)
        other = Layout.of(again, 8, "triton")
        assert other.parts == each.layout.parts and duration(other, cluster) == each.duration
        assert fullest(other)[1] == each.memory and each.memory.total <= USABLE * 40 * 2**30
    assert proposals(load_config(SEVEN), 1, Cluster(gib=40.0), 1) == []


@pytest.mark.parametrize("backend", ["zero", "megatron"])
def test_overrides_of_a_proposal_undo_the_layout_of_the_file(backend: str) -> None:
    """From a file with stages, chunks and their layers by hand: what is printed loads, is valid and is what was proposed."""
    base = ["parallel.pipeline=2", "parallel.virtual_pipeline=2", "parallel.pipeline_layers=[5,7,7,5]", f"optimizer.backend={backend}"]
    config = load_config(CONFIG, base)
    validate(config, 8, cuda=True)
    found = proposals(config, 8, Cluster(), 1000)
    assert {each.layout.chunks for each in found} == {1, 2} and {each.layout.config.parallel.sequence for each in found} == {True, False}
    for each in found[::9]:
        again = load_config(CONFIG, [*base, *each.overrides()])
        validate(again, 8, cuda=True)
        assert Layout.of(again, 8, "triton").parts == each.layout.parts and again.parallel.sequence == each.layout.config.parallel.sequence


def test_stages_balance_what_is_recomputed() -> None:
    """The cores of the mixers count once more under selective recomputation, whole layers under full; the head's second logits always."""
    config = load_config(CONFIG)
    cost: dict[str, tuple[list[float], float]] = {}
    for config.train.recompute in ("none", "selective", "full"):
        cost[config.train.recompute] = layer_costs(config, "MS")
    core = COSTS["M"].core_flops(config.model, config.data.sequence_length, 0)
    assert cost["selective"][0][0] - cost["none"][0][0] == pytest.approx(core / 3)
    for index in range(2):
        none, selective, full = (cost[how][0][index] for how in ("none", "selective", "full"))
        assert none < selective < full == pytest.approx(none * 4 / 3)
    assert len({head for _, head in cost.values()}) == 1


def test_an_all_to_all_needs_heads_and_sends_with_the_row() -> None:
    short, long = (layout(CONFIG, 4, "parallel.tensor=1", "parallel.context=4", f"data.sequence_length={t}") for t in (16384, 131072))
    assert context_bytes(long, 0, 2048) == context_bytes(short, 0, 2048)
    assert context_bytes(long, 0, 2048, "all_to_all") == 8 * context_bytes(short, 0, 2048, "all_to_all") > 0
    assert duration(short, Cluster(), "all_to_all").context != duration(short, Cluster()).context
    with pytest.raises(ValueError, match="parallel.tensor=1 x parallel.context=8 ranks need heads .* model.mlstm_heads=4"):
        duration(layout(CONFIG, 8, "parallel.tensor=1", "parallel.context=8"), Cluster(), "all_to_all")
    with pytest.raises(ValueError, match="use 'halo'"):
        duration(short, Cluster(), "ring")


def test_the_last_piece_of_full_attention_sets_the_pace() -> None:
    """(2P - 1) / P of the mean work; the mLSTM's is the same everywhere."""
    config = ["parallel.tensor=1", "model.pattern=(F)x24", "model.vocab_size=200", "data.sequence_length=1048576"]
    whole, pieces = (layout(CONFIG, 8, *config, f"parallel.context={ranks}") for ranks in (1, 8))
    core = COSTS["F"].core_flops(whole.config.model, 1048576, 0)
    assert core_flops(pieces, "F", 2048, "halo") == pytest.approx(15 / 8 * core, rel=1e-5)
    assert core_flops(pieces, "F", 2048, "all_to_all") == core_flops(whole, "F", 2048, "halo") == core
    assert core_flops(pieces, "M", 2048, "halo") == pytest.approx(core_flops(whole, "M", 2048, "halo"))


def test_the_plan_follows_the_measured_step() -> None:
    """What the page prints: planned over measured seconds of the 1.4B model and of slices of the 7B on one H200, and on two."""
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in write_scaling.measured()[2:]]
    ratios = {(model, layers, rows, window): float(ratio) for model, layers, rows, window, *_, ratio in cells}
    kinds = {("1.4B", "24", "1"), ("1.4B", "24", "8"), ("7B", "28", "1"), ("7B", "8", "1"), ("7B", "8", "8")}
    assert {kind[:3] for kind in ratios} == kinds
    assert [ratio for kind, ratio in ratios.items() if kind[0] == "1.4B"] == pytest.approx([1.0] * 4, abs=0.05)
    assert list(ratios.values()) == pytest.approx([1.0] * 10, abs=0.15)
    several = {line.split("|")[1].strip(): float(line.split("|")[-2]) for line in write_scaling.measured_on_two()[2:]}
    slow_hosts = {several.pop("CP"), several.pop("DP ZeRO-3")}  # the plan knows nothing of the host
    assert len(several) == 8 and list(several.values()) == pytest.approx([1.0] * 8, abs=0.05) and max(slow_hosts) < 0.7


def test_command_line(capsys: pytest.CaptureFixture) -> None:
    assert main([CONFIG, "--nodes", "1", "--proposals", "1", "train.recompute=full"]) == 0
    told = capsys.readouterr().out
    for word in ("activations", "optimizer", "sequence", "context", "bubble", "MFU", "optimizer.zero_stage="):
        assert word in told
    assert main([SEVEN, "--gpus-per-node", "8", "--gib", "16", "--proposals", "0"]) == 1 and "DOES NOT FIT" in capsys.readouterr().out
    for wrong, named in (
        (["--nodes", "3", "parallel.tensor=16"], "parallel.tensor"),
        (["--link", "sideways=3"], "--link sideways=3"),
        (["--efficiency", "2"], "--efficiency 2.0"),
        (["--gib", "0"], "--gib 0.0"),
    ):
        assert main([CONFIG, *wrong]) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and named in error


def count_bytes(raw: dict[str, Any]) -> tuple[int, int]:
    """Pipeline stage, and bytes that this rank sent to its context-parallel neighbours in one training step."""
    from swax_megatron.build import build_trainer

    with runs.layout(raw) as (config, groups):
        trainer, _ = build_trainer(config, groups)
        groups.context.bytes_sent.clear()
        trainer.train_step()
        return groups.pipeline_rank, sum(groups.context.bytes_sent.values())


@pytest.mark.parametrize("recompute", ["none", "full"])
def test_bytes_of_context_parallelism_are_those_that_are_sent(recompute: str, corpus: Path, tmp_path: Path, workers: Any) -> None:
    """On two ranks: forward, recomputation and backward of M, S and F layers; the plan tells of the busiest rank, never of less."""
    raw = runs.small_config(
        corpus,
        tmp_path,
        model={"pattern": "MSFS"},
        parallel={"context": 2},
        train={"steps": 1, "recompute": recompute},
        optimizer={"warmup": 0},
        window={"schedule": "fixed", "windows": [23], "probabilities": None, "anneal_fraction": 0.0},
    )
    planned = Layout.of(from_dict(raw), 2, "reference")
    expected = planned.microbatches * context_bytes(planned, 0, 23)
    sent = [each for _, each in workers(2).run(count_bytes, raw)]
    assert max(sent) == pytest.approx(expected, rel=0.1) and max(sent) <= expected


def in_a_process(expression: str) -> str:
    """What an expression prints, in a process without groups."""
    program = f"from tests.parallel.test_plan import *; print({expression})"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, timeout=200)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.splitlines()[-1]


def started() -> list[int]:
    """Every kind of parallelism on 1,024 ranks of the 7B model, and ZeRO-3 on a small one."""
    overrides = ["parallel.tensor=4", "parallel.pipeline=8", "parallel.virtual_pipeline=2", "parallel.context=2"]
    config = load_config(SEVEN, overrides)
    validate(config, 1024, cuda=True)
    large = simulate(config, 1024)
    small = load_config(SEVEN, ["optimizer.zero_stage=3", "parallel.tensor=2", "model.pattern=MSF", "train.global_batch_size=32"])
    validate(small, 64, cuda=True)
    third = simulate(small, 64)
    return [large.ranks, large.layers, large.rows, third.ranks, third.layers, third.rows]


def test_1024_ranks_start_and_own_everything_once() -> None:
    assert in_a_process("started()") == str([1024, 32, 256, 64, 3, 32])


def saved_boxes(raw: dict[str, Any]) -> list[tuple[str, tuple[int, ...], tuple[int, ...]]]:
    """The boxes of optimizer state that this rank of a real job saves."""
    from swax_megatron.build import build_trainer

    with runs.layout(raw) as (config, groups):
        trainer, _ = build_trainer(config, groups)
        found = [each for each in trainer.backend.fragments(saving=True) if each.key.startswith("exp_avg.")]
        boxes = [(each.key.removeprefix("exp_avg."), tuple(each.offsets), tuple(each.tensor.shape)) for each in found]
        trainer.backend.close()
        return sorted(boxes)


def simulated_boxes(path: str, world_size: int) -> list[Any]:
    """In a process without groups: those that simulate() foresees, for every configuration of a file, by rank."""
    found = [optimizer_boxes(from_dict(raw), world_size) for raw in yaml.safe_load(Path(path).read_text(encoding="utf-8"))]
    return [[sorted(tuple(box) for owner, *box in each if owner == rank) for rank in range(world_size)] for each in found]


def test_the_simulated_partition_is_that_of_real_processes(corpus: Path, tmp_path: Path, workers: Any) -> None:
    cases: list[dict[str, Any]] = [
        {},
        {"optimizer": {"zero_stage": 3}},
        {"parallel": {"tensor": 2}},
        {"parallel": {"pipeline": 2}, "model": {"tie_embeddings": True}},
    ]
    raws = [runs.small_config(corpus, tmp_path / "run", **sections) for sections in cases]
    path = tmp_path / "configs.yaml"
    path.write_text(yaml.safe_dump(raws), encoding="utf-8")
    foreseen = ast.literal_eval(in_a_process(f"simulated_boxes({str(path)!r}, 4)"))
    for raw, boxes in zip(raws, foreseen, strict=True):
        assert workers(4).run(saved_boxes, raw) == boxes


def sabotaged() -> list[str]:
    """Who is caught when a layer, a row or an element is lost or held twice."""
    from swax_megatron.plan import simulate as module

    config = load_config(CONFIG, ["parallel.pipeline=4"])
    validate(config, 16, cuda=True)
    real = {name: getattr(module, name) for name in ("_stages", "replica_rows", "_ranges")}
    broken = {
        "_stages": lambda config: [chunks if i else [range(0, len(chunks[0]) - 1)] for i, chunks in enumerate(real["_stages"](config))],
        "replica_rows": lambda plan, replica, replicas: real["replica_rows"](plan, 0, replicas),
        "_ranges": lambda *arguments: [part[1:] if i == 0 else part for i, part in enumerate(real["_ranges"](*arguments))],
    }
    told = []
    for name, function in broken.items():
        setattr(module, name, function)
        try:
            simulate(config, 16)
            told.append("nothing")
        except ValueError as error:
            told.append(str(error).split(":")[0][:20])
        setattr(module, name, real[name])
    return told


def test_what_is_lost_or_held_twice_is_found() -> None:
    assert ast.literal_eval(in_a_process("sabotaged()")) == ["layers", "the replicas' rows a", "nobody holds ['decod"]
    with pytest.raises(ValueError, match="missing \\[2\\], held twice \\[1\\]"):
        check_owned("things", [0, 1, 1], 3)


def test_the_page_holds_the_bytes_of_the_formulas() -> None:
    text = write_scaling.PAGE.read_text(encoding="utf-8")
    assert write_scaling.fill(text, write_scaling.blocks(only_bytes=True)) == text, "docs/scaling.md is stale: run scripts/write_scaling.py"
    model = SimpleNamespace(attention_heads=4, attention_kv_heads=2, attention_head_dim=8, mlstm_heads=4, mlstm_qk_dim=4, mlstm_v_dim=8)
    assert COSTS["S"].context_bytes(model, 64, 5, 2, 4) == 4 * 2 * 2 * 8 * 2 and COSTS["S"].context_bytes(model, 64, 5, 2, 1) == 0
    assert COSTS["S"].context_bytes(model, 64, 40, 2, 4) == 39 * 64 and COSTS["F"].context_bytes(model, 64, 5, 2, 4) == 48 * 64
    assert COSTS["M"].context_bytes(model, 64, 5, 2, 4) == 2 * 4 * 4 * 4 * 9 + 2 * 4 * 4 * 3
