"""Checkpoints of several ranks: resharding between meshes, uneven shards, and errors on all ranks alike."""

import errno
import os
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import _StridedShard

from flashtrain.checkpoint import CheckpointStore
from flashtrain.errors import UserError
from tests.checkpoint.faults import kill_at, watch
from tests.distributed import run_distributed

# Placement over the tensor-parallel mesh, and shape: rows that split unevenly and rows fewer than ranks.
PARAMETERS: dict[str, tuple[Placement, tuple[int, ...]]] = {
    "column": (Shard(0), (7, 6)),
    "row": (Shard(1), (5, 6)),
    "norm": (Replicate(), (6,)),
    "bias": (Shard(0), (3,)),
    "single": (Shard(0), (1, 4)),
}
Tensors = dict[str, dict[str, Tensor]]


def new_model(seed: int) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    model = nn.Module()
    for name, (_, shape) in PARAMETERS.items():
        model.register_parameter(name, nn.Parameter(torch.randn(shape, generator=generator)))
    return model


def trained(model: nn.Module) -> Tensors:
    """The model after one step of AdamW, which works element by element, and the optimizer's state."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, foreach=False)
    for parameter in model.parameters():
        parameter.grad = parameter.detach().clone()
    optimizer.step()
    state = {
        f"{name}.{key}": value
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state[parameter].items()
    }
    return {"model": dict(model.named_parameters()), "optimizer": state}


def on_mesh(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    """Tensor parallelism, then FSDP2 over what it left, as in training."""
    for name, (placement, _) in PARAMETERS.items():
        whole = model.get_parameter(name)
        model.register_parameter(name, nn.Parameter(distribute_tensor(whole, mesh["tp"], [placement])))
    return fully_shard(model, mesh=mesh["dp"])


def piece(tensor: Tensor, parts: int, index: int, dim: int) -> Tensor:
    pieces = tensor.chunk(parts, dim)
    return pieces[index] if index < len(pieces) else tensor.narrow(dim, 0, 0)


def assert_is_part_of(tensors: Tensors, expected: Tensors, mesh: DeviceMesh) -> int:
    """Compare this rank's memory with what it must hold, without DTensor's help; return the empty shards."""
    dp, tp = mesh["dp"], mesh["tp"]
    empty = 0
    for set_name, named in expected.items():
        for name, whole in named.items():
            found = tensors[set_name][name]
            if isinstance(found, DTensor):
                placement, _ = PARAMETERS[name.partition(".")[0]]
                if isinstance(placement, Shard):
                    whole = piece(whole, tp.size(), tp.get_local_rank(), placement.dim)
                whole = piece(whole, dp.size(), dp.get_local_rank(), 0)
                found = found.to_local()
            empty += found.numel() == 0
            assert found.shape == whole.shape, name
            assert torch.equal(found, whole), name
    return empty


def reshard(rank: int, world: int, folder: Path, tp: int, dp: int, expected: Tensors, first: bool) -> int:
    mesh = init_device_mesh("cpu", (dp, tp), mesh_dim_names=("dp", "tp"))
    store = CheckpointStore(folder)
    if first:
        tensors = trained(on_mesh(new_model(seed=1), mesh))
        step = 1
    else:
        tensors = trained(on_mesh(new_model(seed=2), mesh))
        path = store.latest()
        assert path is not None
        step = store.load(path, tensors).step + 1
    empty = assert_is_part_of(tensors, expected, mesh)
    manifest = store.read_manifest(store.save(step, tensors, {}, rank_meta={"rank": rank}))
    assert manifest.rank_meta == [{"rank": index} for index in range(world)]
    assert manifest.tensors["model"]["column"].shape == (7, 6)
    assert manifest.tensors["optimizer"]["column.step"].shape == ()
    return empty


def test_weights_and_optimizer_move_between_meshes_bit_for_bit(tmp_path: Path) -> None:
    expected = {
        set_name: {name: tensor.detach() for name, tensor in named.items()}
        for set_name, named in trained(new_model(seed=1)).items()
    }
    # On (tp 2, dp 3) DTensor's own rule would place the last of the 7 rows on another rank than FSDP2.
    meshes = [(2, 1), (1, 2), (2, 2), (2, 3), (1, 1)]
    for index, (tp, dp) in enumerate(meshes):
        empty = run_distributed(reshard, tp * dp, tmp_path, tp, dp, expected, index == 0)
        assert any(empty) == (tp * dp > 1)
    alone = trained(new_model(seed=3))
    store = CheckpointStore(tmp_path)
    path = store.latest()
    assert path is not None
    assert store.load(path, alone).step == len(meshes)
    for set_name, named in expected.items():
        assert all(torch.equal(alone[set_name][name], tensor) for name, tensor in named.items())
    store.save(len(meshes) + 1, alone, {})
    run_distributed(reshard, 4, tmp_path, 2, 2, expected, False)


def round_trips(rank: int, world: int, folder: Path) -> None:
    line = init_device_mesh("cpu", (4,), mesh_dim_names=("all",))
    square = init_device_mesh("cpu", (2, 2), mesh_dim_names=("a", "b"))
    cases: dict[str, tuple[DeviceMesh, list[Placement], Tensor]] = {
        "fewer rows than ranks": (line, [Shard(0)], torch.arange(6.0).reshape(2, 3)),
        "one row": (line, [Shard(0)], torch.ones(1, 5, dtype=torch.bfloat16)),
        "no rows": (line, [Shard(0)], torch.zeros(0, 5)),
        "columns": (line, [Shard(1)], torch.arange(10).reshape(2, 5)),
        "last dimension": (line, [Shard(-1)], torch.arange(10).reshape(2, 5)),
        "replicated": (line, [Replicate()], torch.arange(7, dtype=torch.uint8)),
        "replicated scalar": (line, [Replicate()], torch.tensor(3.5)),
        "replicas of shards": (square, [Replicate(), Shard(0)], torch.arange(3.0)),
        "blocks": (square, [Shard(0), Shard(1)], torch.arange(15).reshape(3, 5)),
        "rows cut twice": (square, [Shard(0), Shard(0)], torch.arange(5)),
        "rows cut from the right": (square, [_StridedShard(0, split_factor=2), Shard(0)], torch.arange(8)),
    }
    saved = {name: distribute_tensor(whole, mesh, where) for name, (mesh, where, whole) in cases.items()}
    saved["plain"] = torch.arange(4.0)
    saved["plain scalar"] = torch.tensor(9)
    store = CheckpointStore(folder)
    path = store.save(1, {"model": saved}, {})
    for changed in (False, True):
        loaded: dict[str, Tensor] = {"plain": torch.zeros(4), "plain scalar": torch.tensor(0)}
        for name, (mesh, where, whole) in cases.items():
            # Loading into other placements than those that saved.
            other = [Replicate()] * mesh.ndim if changed else where
            loaded[name] = distribute_tensor(torch.zeros_like(whole), mesh, other)
        store.load(path, {"model": loaded})
        for name, (_, _, whole) in cases.items():
            found = loaded[name]
            assert isinstance(found, DTensor)
            assert torch.equal(found.full_tensor(), whole), name
            assert found.dtype == whole.dtype
            if not changed:
                assert torch.equal(found.to_local(), saved[name].to_local())
        assert torch.equal(loaded["plain"], saved["plain"])
        assert torch.equal(loaded["plain scalar"], saved["plain scalar"])


def test_empty_shards_replicas_and_blocks(tmp_path: Path) -> None:
    run_distributed(round_trips, 4, tmp_path)
    store = CheckpointStore(tmp_path)
    whole = torch.zeros(3, 5, dtype=torch.int64)
    path = store.latest()
    assert path is not None
    stored = [tensor for file in (path / "model").iterdir() for tensor in load_file(file).values()]
    assert all(tensor.numel() for tensor in stored)
    assert store.read_manifest(path).tensors["model"]["no rows"].shape == (0, 5)
    with pytest.raises(UserError, match=r"does not exist here"):
        store.load(path, {"model": {"blocks": whole}})


def stages(rank: int, world: int, folder: Path) -> list[str]:
    """Pipeline stages hold different names; the load is by other stages than the save."""
    store = CheckpointStore(folder)
    mine = {f"layers.{rank}": torch.full((3,), rank + 1.0), "shared": torch.ones(2)}
    path = store.save(1, {"model": mine}, {})
    other = {f"layers.{(rank + 1) % world}": torch.zeros(3), "shared": torch.zeros(2)}
    store.load(path, {"model": other})
    assert other[f"layers.{(rank + 1) % world}"].eq((rank + 1) % world + 1).all()
    return list(store.read_manifest(path).tensors["model"])


def test_ranks_with_different_names(tmp_path: Path) -> None:
    for found in run_distributed(stages, 2, tmp_path):
        assert found == ["layers.0", "shared", "layers.1"]


def in_group(rank: int, world: int, folder: Path) -> None:
    group = dist.new_group([1, 2])
    if rank:
        store = CheckpointStore(folder, group=group)
        path = store.save(1, {"model": {"a": torch.arange(3)}}, {}, rank_meta=rank)
        assert store.latest() == path
        loaded = torch.zeros(3, dtype=torch.int64)
        assert store.load(path, {"model": {"a": loaded}}).rank_meta == [1, 2]
        assert loaded.tolist() == [0, 1, 2]


def test_a_group_without_the_first_rank(tmp_path: Path) -> None:
    run_distributed(in_group, 3, tmp_path)


def message_of(action: Any, kind: type[Exception] = UserError) -> str:
    with pytest.raises(kind) as caught:
        action()
    assert type(caught.value) is kind
    assert "\n" not in str(caught.value)
    return str(caught.value)


def failures(rank: int, world: int, folder: Path) -> dict[str, str]:
    """Each failure strikes one rank alone; all must report it, and none may be left waiting."""
    mesh = init_device_mesh("cpu", (world,))
    store = CheckpointStore(folder)

    def tensors(value: float) -> dict[str, dict[str, Tensor]]:
        return {"model": {"w": distribute_tensor(torch.full((5, 3), value), mesh, [Shard(0)])}}

    store.save(1, tensors(1.0), {})
    path = store.save(2, tensors(2.0), {})
    said = {}
    alone = rank == 1

    meta = {"x": {1, 2}} if alone else {}
    said["meta"] = message_of(lambda: store.save(3, tensors(3.0), meta))
    wrong = {"model": {"w": torch.zeros(2 if alone else 3)}}
    said["shapes"] = message_of(lambda: store.save(3, wrong, {}))
    other = {"model": {"v": torch.zeros(1)}} if alone else {"model": {"w": torch.zeros(5, 3)}}
    said["names"] = message_of(lambda: store.load(path, other))
    partial = {"model": {"w": DTensor.from_local(torch.ones(2), mesh, [Partial()])}}
    said["partial"] = message_of(lambda: store.save(3, partial, {}))
    # Rows that are cut from the right once more than there are cuts: not one block on each rank.
    strided = {"model": {"w": DTensor.from_local(torch.ones(2), mesh, [_StridedShard(0, split_factor=2)])}}
    said["strided"] = message_of(lambda: store.save(3, strided, {}))
    uneven = DTensor.from_local(
        torch.ones(3 - rank), mesh, [Shard(0)], run_check=False, shape=(5,), stride=(1,)
    )
    said["uneven"] = "fine" if store.save(1, {"model": {"w": uneven}}, {}) else ""
    odd = DTensor.from_local(torch.ones(1 + rank), mesh, [Shard(0)], run_check=False, shape=(3,), stride=(1,))
    said["odd"] = message_of(lambda: store.save(3, {"model": {"w": odd}}, {}))
    path = store.save(2, tensors(2.0), {})

    third = tensors(3.0)
    with mock.patch.object(Path, "is_dir", return_value=False) if alone else nullcontext():
        said["not shared"] = message_of(lambda: store.save(3, third, {}))

    broken = mock.patch("flashtrain.checkpoint.store.sync_and_hash", side_effect=ValueError("a bug"))
    if alone:
        with broken:
            said["bug"] = message_of(lambda: store.save(3, third, {}), ValueError)
    else:
        said["bug"] = message_of(lambda: store.save(3, third, {}), RuntimeError)

    dist.barrier()
    damaged = sorted((path / "model").iterdir())[1]
    if rank == 0:
        content = bytearray(damaged.read_bytes())
        content[-1] ^= 1
        damaged.write_bytes(content)
    dist.barrier()
    loaded = tensors(0.0)
    said["damaged"] = message_of(lambda: store.load(path, loaded))
    weight = loaded["model"]["w"]
    assert isinstance(weight, DTensor)
    assert weight.to_local().eq(0).all()
    dist.barrier()
    if rank == 0:
        damaged.unlink()
    dist.barrier()
    said["missing"] = message_of(lambda: store.load(path, loaded))

    if alone:
        # Last, since it cannot be undone: this rank's disk is full from here on.
        def full(operation: str, file: str) -> None:
            if operation == "open":
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), file)

        watch(folder, full)
    said["full"] = message_of(lambda: store.save(3, third, {}))
    dist.barrier()
    assert not list(folder.glob(".tmp-*"))
    return said


def test_every_error_is_raised_on_all_ranks_alike(tmp_path: Path) -> None:
    first, second = run_distributed(failures, 2, tmp_path)
    assert first.pop("bug") == "rank 1: ValueError: a bug"
    assert second.pop("bug") == "a bug"
    assert first == second
    expected = {
        "meta": "meta.x is a set, which JSON cannot hold",
        "shapes": "model/w is float32 [3] on one rank and float32 [2] on rank 1: make it a DTensor",
        "names": "model/v does not exist there and is float32 [1] here",
        "partial": "model/w has placement P(sum): reduce it before",
        "strided": "whose rows are not one block on each rank",
        "uneven": "fine",
        "odd": "model/w with placements (Shard(dim=0),) on mesh (2,) holds [1] on rank coordinate [0]",
        "not shared": "rank 1 does not see ",
        "damaged": "shard-00002-model-00001-of-00001.safetensors is damaged: its sha256 is ",
        "missing": "shard-00002-model-00001-of-00001.safetensors is missing; delete ",
        "full": "(earlier checkpoints are unchanged): No space left on device",
    }
    assert first.keys() == expected.keys()
    for name, part in expected.items():
        assert part in first[name], name


def killed(rank: int, world: int, folder: Path, victim: int, number: int) -> None:
    mesh = init_device_mesh("cpu", (world,))
    store = CheckpointStore(folder, keep=1)
    whole = torch.arange(10.0)
    store.save(1, {"model": {"w": distribute_tensor(whole, mesh, [Shard(0)])}}, {})
    if rank == victim:
        kill_at(folder, number)
    store.save(2, {"model": {"w": distribute_tensor(whole + 1, mesh, [Shard(0)])}}, {})


@pytest.mark.parametrize(("victim", "number"), [(1, 2), (1, 3), (0, 4), (0, 12)])
def test_a_killed_rank_leaves_a_checkpoint_that_loads(tmp_path: Path, victim: int, number: int) -> None:
    with pytest.raises(AssertionError):
        run_distributed(killed, 2, tmp_path, victim, number, timeout=20)
    store = CheckpointStore(tmp_path, keep=1)
    for step in (None, 3):
        if step is not None:
            store.save(step, {"model": {"w": torch.arange(10.0) + 2}}, {})
        path, loaded = store.latest(), torch.zeros(10)
        assert path is not None
        found = store.load(path, {"model": {"w": loaded}}).step
        assert step in (None, found)
        assert torch.equal(loaded, torch.arange(10.0) + found - 1)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["latest", "step-00000003"]


def unpickled(rank: int, world: int, folder: Path) -> None:
    mesh = init_device_mesh("cpu", (world,))
    store = CheckpointStore(folder)
    whole = torch.arange(10.0)
    refuse = mock.Mock(side_effect=AssertionError("ranks sent each other a pickle"))
    with mock.patch.multiple("pickle", Pickler=refuse, Unpickler=refuse, loads=refuse, dumps=refuse):
        c10d = dist.distributed_c10d
        with mock.patch.multiple(c10d, _pickler=refuse, _unpickler=refuse):
            path = store.save(1, {"model": {"w": distribute_tensor(whole, mesh, [Shard(0)])}}, {}, rank)
            loaded = distribute_tensor(torch.zeros(10), mesh, [Shard(0)])
            assert store.load(path, {"model": {"w": loaded}}).rank_meta == [0, 1]
            assert store.latest() == path
    assert not refuse.called
    assert torch.equal(loaded.full_tensor(), whole)


def test_ranks_send_each_other_no_pickles(tmp_path: Path) -> None:
    run_distributed(unpickled, 2, tmp_path)
