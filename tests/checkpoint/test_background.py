"""Checkpoints written beside training: a copy of the moment, whole or not there, and errors on all ranks."""

import errno
import os
import shutil
import signal
import threading
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from flashtrain.checkpoint import BackgroundSaver, CheckpointStore
from flashtrain.errors import UserError
from tests.checkpoint.faults import in_child, kill_at, watch
from tests.checkpoint.test_kill import MOST_CHANGES, assert_loads, names, tensors_of
from tests.distributed import run_distributed


def hold(store: CheckpointStore, monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Let ``store`` write only when the event that is returned is set."""
    go, write = threading.Event(), store.write

    def wait_and_write(*arguments: object) -> Path:
        assert go.wait(30)
        return write(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(store, "write", wait_and_write)
    return go


def test_what_is_saved_is_the_moment_of_the_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = CheckpointStore(tmp_path)
    store.save(1, tensors_of(1), {})
    saver, go = BackgroundSaver(store), hold(store, monkeypatch)
    tensors, meta = tensors_of(2), {"seen": [2]}
    saver.save(2, tensors, meta)
    for named in tensors.values():
        for tensor in named.values():
            tensor.zero_()
    meta["seen"].append(3)
    assert not saver.done
    assert_loads(store, {1})
    with pytest.raises(RuntimeError, match="a save is under way"):
        saver.save(3, tensors, {})
    go.set()
    saved = saver.finish()
    assert saved is not None
    assert (saved.step, saved.path) == (2, store.latest())
    assert_loads(store, {2})
    assert store.read_manifest(saved.path).meta == {"seen": [2]}
    assert saver.finish() is None
    saver.close()


def test_a_kill_at_every_change_leaves_a_checkpoint_that_loads(tmp_path: Path) -> None:
    template = tmp_path / "template"
    CheckpointStore(template, keep=1).save(1, tensors_of(1), {})
    steps = []
    for number in range(1, MOST_CHANGES):
        folder = tmp_path / f"run{number}"
        shutil.copytree(template, folder)
        store = CheckpointStore(folder, keep=1)

        def save(folder: Path = folder, store: CheckpointStore = store, number: int = number) -> None:
            kill_at(folder, number)
            saver = BackgroundSaver(store)
            saver.save(2, tensors_of(2), {})
            saver.finish()

        status = in_child(save)
        steps.append(assert_loads(store, {1, 2}))
        store.save(3, tensors_of(3), {})
        assert_loads(store, {3})
        assert len(names(folder)) == 2
        shutil.rmtree(folder)
        if status == 0:
            break
        assert status == -signal.SIGKILL
    assert status == 0, "the save never came to its end"
    assert steps == sorted(steps)
    assert (len(steps) > 20, steps[0], steps[-1]) == (True, 1, 2)


def full_on_one_rank(rank: int, world: int, folder: Path) -> list[str]:
    mesh = init_device_mesh("cpu", (world,))
    saver = BackgroundSaver(CheckpointStore(folder, group=dist.new_group(backend="gloo")))
    weight = distribute_tensor(torch.arange(10.0), mesh, [Shard(0)])
    saver.save(1, {"model": {"w": weight}}, {})
    # The messages of training and those of the save run side by side.
    for _ in range(100):
        dist.all_reduce(torch.ones(1))
    first = saver.finish()
    assert first is not None

    def full(operation: str, file: str) -> None:
        if operation == "open":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), file)

    if rank == 1:
        watch(folder, full)
    saver.save(2, {"model": {"w": weight}}, {})
    with pytest.raises(UserError) as caught:
        saver.finish()
    assert not saver.failed
    saver.close()
    loaded = distribute_tensor(torch.zeros(10), mesh, [Shard(0)])
    store = CheckpointStore(folder)
    assert store.latest() == first.path
    store.load(first.path, {"model": {"w": loaded}})
    assert isinstance(loaded, DTensor)
    assert torch.equal(loaded.to_local(), weight.to_local())
    return [str(caught.value)]


def test_a_full_disk_of_one_rank_is_told_on_all(tmp_path: Path) -> None:
    said = run_distributed(full_on_one_rank, 2, tmp_path)
    assert said[0] == said[1]
    assert "cannot save step 2" in said[0][0]
    assert "No space left on device" in said[0][0]
    assert names(tmp_path) == {"latest", "step-00000001"}


def test_a_lost_save_is_logged_when_another_error_ends_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    store = CheckpointStore(tmp_path)

    def fail(*_: object) -> Path:
        raise UserError("the disk is gone")

    monkeypatch.setattr(store, "write", fail)
    saver = BackgroundSaver(store)
    saver.save(1, tensors_of(1), {})
    saver.close()
    assert "the checkpoint under way is lost: the disk is gone" in caplog.text
