"""Whatever moment a save is stopped at, a checkpoint loads and the next save works."""

import os
import resource
import shutil
import signal
import tempfile
from pathlib import Path

import pytest
import torch
from torch import Tensor

from flashtrain.checkpoint import CheckpointStore
from flashtrain.errors import UserError
from tests.checkpoint.faults import fail_at, in_child, kill_at, watch

MOST_CHANGES = 200


def tensors_of(step: int) -> dict[str, dict[str, Tensor]]:
    return {
        "model": {"weight": torch.full((4, 3), float(step)), "bias": torch.arange(5) + step},
        "optimizer": {"step": torch.tensor(float(step))},
    }


def assert_loads(store: CheckpointStore, allowed: set[int]) -> int:
    path = store.latest()
    assert path is not None
    loaded = tensors_of(0)
    step = store.load(path, loaded).step
    assert step in allowed
    for set_name, named in tensors_of(step).items():
        for name, tensor in named.items():
            assert torch.equal(loaded[set_name][name], tensor)
    return step


def names(folder: Path) -> set[str]:
    return {entry.name for entry in folder.iterdir()}


@pytest.mark.parametrize("keep", [1, 2])
def test_kill_at_every_change_leaves_a_checkpoint_that_loads(tmp_path: Path, keep: int) -> None:
    template = tmp_path / "template"
    for step in range(1, keep + 1):
        CheckpointStore(template, keep).save(step, tensors_of(step), {})
    old, new = keep, keep + 1

    steps = []
    for number in range(1, MOST_CHANGES):
        folder = tmp_path / f"run{number}"
        shutil.copytree(template, folder)
        store = CheckpointStore(folder, keep)

        def save(folder: Path = folder, store: CheckpointStore = store, number: int = number) -> None:
            kill_at(folder, number)
            store.save(new, tensors_of(new), {})

        status = in_child(save)
        steps.append(assert_loads(store, {old, new}))
        store.save(new + 1, tensors_of(new + 1), {})
        assert_loads(store, {new + 1})
        assert not [name for name in names(folder) if name.startswith(".tmp")]
        assert len([name for name in names(folder) if name.startswith("step-")]) == keep
        shutil.rmtree(folder)
        if status == 0:
            break
        assert status == -signal.SIGKILL
    else:
        pytest.fail("the save never came to its end")
    # Enough places to have crossed the writing, the publication and the deletion; and no way back.
    assert len(steps) > 25
    assert steps == sorted(steps)
    assert steps[0] == old
    assert steps[-1] == new


def test_kill_at_every_change_of_the_first_save(tmp_path: Path) -> None:
    for number in range(1, MOST_CHANGES):
        folder = tmp_path / f"run{number}"
        store = CheckpointStore(folder)

        def save(folder: Path = folder, store: CheckpointStore = store, number: int = number) -> None:
            kill_at(folder, number)
            store.save(1, tensors_of(1), {})

        status = in_child(save)
        if store.latest() is not None:
            assert_loads(store, {1})
        store.save(2, tensors_of(2), {})
        assert_loads(store, {2})
        if status == 0:
            return
    pytest.fail("the save never came to its end")


def test_kills_one_after_the_other_in_one_directory(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep=1)
    store.save(1, tensors_of(1), {})
    saved = 1
    for number in range(1, MOST_CHANGES):

        def save(number: int = number) -> None:
            kill_at(tmp_path, number)
            store.save(number + 1, tensors_of(number + 1), {})

        status = in_child(save)
        assert_loads(store, {saved, number + 1})
        saved = assert_loads(store, set(range(saved, number + 2)))
        if status == 0:
            assert names(tmp_path) == {"latest", f"step-{number + 1:08d}"}
            return
    pytest.fail("the save never came to its end")


def test_a_full_disk_at_every_change_keeps_the_earlier_checkpoint(tmp_path: Path) -> None:
    template = tmp_path / "template"
    CheckpointStore(template, keep=1).save(1, tensors_of(1), {})
    outcomes = []
    for number in range(1, MOST_CHANGES):
        folder, report = tmp_path / f"run{number}", tmp_path / f"report{number}"
        shutil.copytree(template, folder)

        def save(folder: Path = folder, report: Path = report, number: int = number) -> None:
            store = CheckpointStore(folder, keep=1)
            changes = fail_at(folder, number)
            outcome, message = "saved", ""
            try:
                store.save(2, tensors_of(2), {})
            except UserError as error:
                outcome, message = "failed", str(error)
            if len(changes) < number:
                report.write_text("finished")
                return
            if message:
                assert "\n" not in message
                assert f"cannot save step 2 in {folder} (earlier checkpoints are unchanged): " in message
                assert "No space left on device" in message
                assert "free space" in message
                assert not [name for name in names(folder) if name.startswith(".tmp")]
                assert_loads(store, {1, 2})
            else:
                # What fails after the publication concerns the old checkpoint alone.
                assert_loads(store, {2})
            store.save(3, tensors_of(3), {})
            assert_loads(store, {3})
            report.write_text(outcome)

        assert in_child(save) == 0
        outcomes.append(report.read_text())
        if outcomes[-1] == "finished":
            break
    assert outcomes[-1] == "finished"
    assert outcomes.count("failed") > 15
    assert outcomes.count("saved") > 5


def test_a_file_size_limit_keeps_the_earlier_checkpoint(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    store.save(1, tensors_of(1), {})
    large = {"model": {"weight": torch.zeros(100_000)}}

    def save() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (64_000, 64_000))
        with pytest.raises(UserError, match=r"cannot save step 2 .*File too large"):
            store.save(2, large, {})
        assert names(tmp_path) == {"latest", "step-00000001"}

    assert in_child(save) == 0
    assert_loads(store, {1})


def test_a_directory_that_is_not_writable(tmp_path: Path) -> None:
    # Not below tmp_path: its parents are closed to other users, and root may write everywhere.
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "run"
        store = CheckpointStore(folder)
        store.save(1, tensors_of(1), {})
        Path(place).chmod(0o755)
        folder.chmod(0o555)

        def save() -> None:
            if os.getuid() == 0:
                os.setgroups([])
                os.setgid(65534)
                os.setuid(65534)
            with pytest.raises(UserError, match=r"cannot save step 2 .*Permission denied.*make it writable"):
                store.save(2, tensors_of(2), {})
            assert_loads(store, {1})

        try:
            assert in_child(save) == 0
        finally:
            folder.chmod(0o755)
        assert names(folder) == {"latest", "step-00000001"}


def test_everything_is_on_the_disk_before_it_is_named(tmp_path: Path) -> None:
    """A kill loses nothing that the kernel holds, a power cut does: so the order of fsync counts."""
    folder = tmp_path / "run"
    store = CheckpointStore(folder, keep=1)
    store.save(1, tensors_of(1), {})

    def save() -> None:
        events: list[tuple[str, str, int]] = []

        def on_change(operation: str, path: str) -> None:
            absolute = Path(path) if os.path.isabs(path) else folder / path
            size = absolute.stat().st_size if absolute.is_file() else -1
            events.append((operation, path, size))

        watch(folder, on_change)
        path = store.save(2, tensors_of(2), {})
        manifest = store.read_manifest(path)

        def index(operation: str, ends: str, start: int = 0) -> int:
            found = [
                place
                for place, (what, where, _) in enumerate(events)
                if place >= start and what == operation and (where == ends or where.endswith(ends))
            ]
            assert found, f"no {operation} of {ends} after event {start}: {events}"
            return found[0]

        temporary = next(where for what, where, _ in events if what == "os.mkdir")
        publication = index("os.rename", temporary)
        for name, entry in manifest.files.items():
            synced = [
                size
                for what, where, size in events[:publication]
                if (what, where) == ("fsync", f"{temporary}/{name}")
            ]
            assert entry.bytes in synced, f"{name} was renamed before all of it was synced: {synced}"
        written = index("fsync", f"{temporary}/manifest.json")
        for part in ("/model", "/optimizer", ""):
            assert index("fsync", temporary + part) < publication
        assert written < index("fsync", temporary) < publication
        # On a full disk the pointer's content must fail before the checkpoint gets its name.
        (pointer,) = (where for what, where, _ in events if what == "open" and "/.tmp-latest-" in where)
        assert index("fsync", pointer) < publication
        named = index("fsync", str(folder), publication)
        pointed = next(
            place
            for place, (what, where, _) in enumerate(events)
            if what == "os.rename" and Path(where).name.startswith(".tmp-latest")
        )
        assert named < pointed
        durable = index("fsync", str(folder), pointed)
        assert durable < index("os.rename", "step-00000001")
        assert durable < index("os.remove", "manifest.json")

    assert in_child(save) == 0
