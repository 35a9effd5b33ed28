"""Several processes over gloo: save at one layout, load at another; an error on one rank is everybody's."""

import json
import resource

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from swax_megatron.checkpoint.store import Fragment, flat_range_boxes, latest, open_checkpoint, save

# name -> (global shape, dimension split by tensor parallelism)
TENSORS = {"param.up": ((12, 10), 0), "param.down": ((7, 18), 1), "param.norm": ((11,), None), "param.bias": ((6,), 0)}


def whole(name):
    generator = torch.Generator().manual_seed(len(name))
    return torch.randn(TENSORS[name][0], generator=generator)


def fragments_of(rank, world, tp, dp, fill):
    """This rank's share of a tp x dp layout with ZeRO's flat partition; coordinates are dealt to the ranks in turn."""
    coordinates = [(t, d) for t in range(tp) for d in range(dp)]
    for t, d in coordinates[rank::world]:
        shards = []  # (name, local shape, offsets in the global tensor): what this tensor-parallel rank's flat buffer holds
        for name, (shape, dim) in TENSORS.items():
            local, offsets = list(shape), [0] * len(shape)
            if dim is not None:
                local[dim] //= tp
                offsets[dim] = t * local[dim]
            elif t:
                continue  # replicated: tensor-parallel rank 0 owns it
            shards.append((name, local, offsets))
        total = sum(torch.Size(local).numel() for _, local, _ in shards)
        share = -(-total // dp)
        low, high = d * share, min((d + 1) * share, total)
        position = 0
        for name, local, offsets in shards:
            count = torch.Size(local).numel()
            start, stop = max(low - position, 0), min(high - position, count)
            for box in flat_range_boxes(local, start, stop) if start < stop else []:
                block = box.shifted(offsets)
                tensor = whole(name)[block.slices()] if fill else torch.full(block.sizes, float("nan"))
                yield Fragment(name, TENSORS[name][0], block.offsets, tensor)
            position += count


def _start(rank, world, folder, tag):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet_{tag}", rank=rank, world_size=world)


def _two(rank, folder):
    _start(rank, 2, folder, "two")
    root = f"{folder}/checkpoints"
    given = list(fragments_of(rank, 2, tp=2, dp=2, fill=True))
    save(root, 5, given, config={"n": rank}, state={"r": rank}, rank_state={"mine": torch.tensor([rank])} if rank else None)
    checkpoint = open_checkpoint(latest(root))
    assert checkpoint.verify() == [] and checkpoint.state == {"r": 0} and checkpoint.world_size == 2
    assert checkpoint.rank_state(0) is None and checkpoint.rank_state(1)["mine"].item() == 1
    dist.destroy_process_group()


def _three(rank, folder):
    _start(rank, 3, folder, "three")
    root = f"{folder}/checkpoints"
    checkpoint = open_checkpoint(latest(root))
    errors = {}
    for tp, dp in ((1, 3), (3, 2), (2, 1), (1, 7)):
        mine = list(fragments_of(rank, 3, tp, dp, fill=False))
        checkpoint.read_into(mine)
        for fragment in mine:
            assert torch.equal(fragment.tensor, whole(fragment.key)[fragment.box.slices()]), (tp, dp, fragment.key)
    save(root, 6, fragments_of(rank, 3, 1, 3, fill=True), config={}, state={})
    pair = dist.new_group([1, 2])  # a group whose leader is not global rank 0
    if rank:
        save(root, 7, fragments_of(rank - 1, 2, 2, 1, fill=True), config={}, state={}, group=pair)
        assert open_checkpoint(f"{root}/step_7").verify(group=pair) == []

    def attempt(name, function):
        try:
            function()
        except (ValueError, RuntimeError) as error:
            errors[name] = f"{type(error).__name__}: {error}"

    w = Fragment("w", (3, 4), (rank, 0), torch.zeros(1, 4))
    twice = [Fragment("w", (3, 4), (0, 1), torch.zeros(1, 1))] if rank == 2 else []
    attempt("hole", lambda: save(root, 8, [w] if rank != 1 else [], config={}, state={}))
    attempt("overlap", lambda: save(root, 8, [w, *twice], config={}, state={}))
    shape = (3, 5) if rank == 2 else (3, 4)
    attempt("shape", lambda: save(root, 8, [Fragment("w", shape, (rank, 0), torch.zeros(1, shape[1]))], config={}, state={}))
    attempt("json", lambda: save(root, 8, [w], config={}, state={"x": {1}} if rank == 0 else {}))
    big = Fragment("big", (3, 1 << 16), (rank, 0), torch.zeros(1, 1 << 16))
    if rank == 1:  # stands for a full disk: the kernel refuses to write past 100,000 bytes
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
    attempt("disk", lambda: save(root, 8, [big], config={}, state={}))
    if rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    dist.barrier()
    if rank == 2:
        for name in ("rank_00000.safetensors", "rank_00002.safetensors"):
            with open(f"{root}/step_6/{name}", "r+b") as file:
                file.seek(-3, 2)
                file.write(b"\x99")
    dist.barrier()
    attempt("damage", lambda: open_checkpoint(f"{root}/step_6").verify())
    with open(f"{folder}/errors_{rank}.json", "w") as file:
        json.dump(errors, file)
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("ranks")
    mp.spawn(_two, (str(path),), nprocs=2)
    mp.spawn(_three, (str(path),), nprocs=3)
    return path


def test_layouts_are_bit_exact(folder):  # the ranks compared their own parts; here the whole of all three tilings
    for step in (5, 6, 7):
        checkpoint = open_checkpoint(folder / "checkpoints" / f"step_{step}")
        assert set(checkpoint.keys()) == set(TENSORS)
        if step != 6:  # damaged on purpose afterwards
            assert checkpoint.verify(ranks_share=False) == []
            for name in TENSORS:
                assert torch.equal(checkpoint.read_tensor(name), whole(name))


def test_errors_are_everybodys(folder):
    errors = [json.loads((folder / f"errors_{rank}.json").read_text()) for rank in range(3)]
    assert errors[0] == errors[1] == errors[2]
    expected = {
        "hole": ["ValueError", "w: no chunk holds [1:2, 0:4]"],
        "overlap": ["ValueError", "w: chunks", "overlap", "[0:1, 1:2]"],
        "shape": ["ValueError", "w: rank 2 saves F32 [3, 5]"],
        "json": ["ValueError", "state is no JSON"],
        "disk": ["RunError", "step_8 was not saved: rank 1: OSError"],
        "damage": ["ValueError", "rank_00000.safetensors has another sha256", "rank_00002.safetensors has another sha256"],
    }
    assert errors[0].keys() == expected.keys()
    for name, parts in expected.items():
        assert all(part in errors[0][name] for part in parts), errors[0][name]
    assert sorted(p.name for p in (folder / "checkpoints").iterdir()) == ["step_5", "step_6", "step_7"]
