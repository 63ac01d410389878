"""Damaged and hostile checkpoints are refused with one line before any tensor changes."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from flashtrain.checkpoint import CheckpointStore, manifest
from flashtrain.errors import UserError


def tensors(value: float) -> dict[str, dict[str, Tensor]]:
    return {"model": {"a": torch.full((8, 4), value), "b": torch.full((3,), value)}}


@pytest.fixture
def store(tmp_path: Path) -> CheckpointStore:
    store = CheckpointStore(tmp_path)
    store.save(1, tensors(1.0), {})
    store.save(2, tensors(2.0), {"lr": 0.25}, rank_meta={"seed": 3})
    return store


def refused(store: CheckpointStore, path: Path) -> str:
    loaded = tensors(0.0)
    with pytest.raises(UserError) as caught:
        store.load(path, loaded)
    assert "\n" not in str(caught.value)
    assert all(tensor.eq(0).all() for tensor in loaded["model"].values())
    return str(caught.value)


def only_file(path: Path) -> Path:
    (file,) = (path / "model").iterdir()
    return file


def test_any_flipped_byte_is_found(store: CheckpointStore, tmp_path: Path) -> None:
    path = tmp_path / "step-00000002"
    file = only_file(path)
    content = file.read_bytes()
    for place in (0, 9, len(content) // 2, len(content) - 1):
        file.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        message = refused(store, path)
        assert message.startswith(f"checkpoint {file} is damaged: its sha256 is ")
        assert message.endswith(f"; delete {path} or resume from {tmp_path / 'step-00000001'}")
    file.write_bytes(content)
    store.load(path, tensors(0.0))


def test_a_truncated_file(store: CheckpointStore, tmp_path: Path) -> None:
    path = tmp_path / "step-00000002"
    file = only_file(path)
    size = file.stat().st_size
    os.truncate(file, size - 1)
    assert f"{file} is damaged: it has {size - 1} bytes, the manifest says {size}; delete " in refused(
        store, path
    )
    assert store.latest() == tmp_path / "step-00000001"


def test_a_missing_file(store: CheckpointStore, tmp_path: Path) -> None:
    path = tmp_path / "step-00000002"
    file = only_file(path)
    file.unlink()
    assert f"{file} is missing; delete {path} or resume from " in refused(store, path)
    shutil.rmtree(path / "model")
    assert f"{file} is missing; delete {path} or resume from " in refused(store, path)
    shutil.rmtree(tmp_path / "step-00000001")
    assert refused(store, path).endswith(
        f"; delete {path} and start anew: no other checkpoint there is complete"
    )


def test_a_file_that_the_manifest_does_not_list(store: CheckpointStore, tmp_path: Path) -> None:
    path = tmp_path / "step-00000002"
    shutil.copy(only_file(path), path / "model" / "extra.safetensors")
    assert "extra.safetensors is not in its manifest" in refused(store, path)


@pytest.mark.parametrize("part", ["file", "folder"])
def test_symbolic_links_are_refused(store: CheckpointStore, tmp_path: Path, part: str) -> None:
    path = tmp_path / "step-00000002"
    target = only_file(path) if part == "file" else path / "model"
    moved = tmp_path / "moved"
    target.rename(moved)
    target.symlink_to(moved)
    assert "is reached through a symbolic link, which is refused" in refused(store, path)


def test_no_checkpoint(store: CheckpointStore, tmp_path: Path) -> None:
    assert "there is no checkpoint" in refused(store, tmp_path / "step-00000007")
    (tmp_path / "step-00000002" / "manifest.json").unlink()
    assert "it has no file manifest.json" in refused(store, tmp_path / "step-00000002")
    (tmp_path / "step-00000002" / "manifest.json").symlink_to(tmp_path / "step-00000001" / "manifest.json")
    assert "it has no file manifest.json" in refused(store, tmp_path / "step-00000002")


def test_any_changed_byte_of_the_manifest_is_found(store: CheckpointStore, tmp_path: Path) -> None:
    path = tmp_path / "step-00000002"
    file = path / "manifest.json"
    content = file.read_bytes()
    for place in range(len(content)):
        if content[place : place + 1].isspace():
            continue
        file.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        message = refused(store, path)
        assert message.startswith(f"{file} is not a valid manifest: ")
        assert message.endswith(f"; delete {path} or resume from another one")
    for length in (0, 1, len(content) // 2, len(content) - 3):
        file.write_bytes(content[:length])
        assert "is not a valid manifest: it is not JSON" in refused(store, path)


def rewrite(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change the manifest and give it the right checksum, as one who wants to do harm would."""
    file = path / "manifest.json"
    body = json.loads(file.read_text())
    del body["checksum"]
    change(body)
    file.write_text(json.dumps({**body, "checksum": manifest._checksum(body)}))


@pytest.mark.parametrize(
    "name",
    [
        "/etc/x.safetensors",
        "../x.safetensors",
        "model/../../x.safetensors",
        "model/../x.safetensors",
        "other/x.safetensors",
        "model/x.pt",
        "x.safetensors",
        "model//x.safetensors",
        "model/.x.safetensors",
        "./model/x.safetensors",
        "model/x\n.safetensors",
        "model\\x.safetensors",
    ],
)
def test_paths_must_stay_inside_the_checkpoint(store: CheckpointStore, tmp_path: Path, name: str) -> None:
    path = tmp_path / "step-00000002"
    (tmp_path / "x.safetensors").write_bytes(only_file(path).read_bytes())

    def change(body: dict[str, Any]) -> None:
        (entry,) = body["files"].values()
        body["files"] = {name: entry}

    rewrite(path, change)
    assert f"it names the file {name!r}, which is not <set>/<name>.safetensors" in refused(store, path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda body: body.update(version=2), r"its version is 2, not 1"),
        (lambda body: body.update(format="zip"), r"its format is 'zip'"),
        (lambda body: body.update(more=1), r"it has the unknown field 'more'"),
        (lambda body: body.pop("step"), r"it lacks step"),
        (lambda body: body.update(step=-1), r"must be whole numbers"),
        (lambda body: body.update(serial=True), r"must be whole numbers"),
        (lambda body: body.update(meta=[]), r"meta is not an object"),
        (lambda body: body.update(rank_meta={}), r"rank_meta is not a list"),
        (lambda body: body.update(tensors=[]), r"tensors is not an object"),
        (lambda body: body.update(files=[]), r"files is not an object"),
        (lambda body: body["tensors"].update({"../x": {}}), r"'\.\./x' is no name for a set"),
        (lambda body: body["tensors"].update(model=[]), r"tensors\.model is not an object"),
        (lambda body: body["tensors"]["model"]["a"].update(shape=[8, -4]), r"model/a has shape \[8, -4\]"),
        (lambda body: body["tensors"]["model"]["a"].update(dtype=1), r"model/a has dtype 1"),
        (lambda body: body["tensors"]["model"]["a"].pop("dtype"), r"model/a lacks dtype"),
        (lambda body: next(iter(body["files"].values())).update(sha256="0"), r"hash or size of model/"),
        (lambda body: next(iter(body["files"].values())).update(bytes=1.0), r"hash or size of model/"),
        (lambda body: next(iter(body["files"].values())).update(more=1), r"has the unknown field 'more'"),
    ],
)
def test_the_schema_is_strict(
    store: CheckpointStore, tmp_path: Path, change: Callable[[dict[str, Any]], None], message: str
) -> None:
    path = tmp_path / "step-00000002"
    rewrite(path, change)
    with pytest.raises(UserError, match=r"is not a valid manifest: .*" + message):
        store.read_manifest(path)


@pytest.mark.parametrize("content", [b"[]", b"3", b"\xff\xfe", b"[" * 100_000, b"{}"])
def test_other_json_is_refused(store: CheckpointStore, tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "step-00000002"
    (path / "manifest.json").write_bytes(content)
    assert "is not a valid manifest: " in refused(store, path)
    assert store.latest() == tmp_path / "step-00000001"


def test_files_that_hold_less_than_the_manifest_says(store: CheckpointStore, tmp_path: Path) -> None:
    path = tmp_path / "step-00000002"

    def change(body: dict[str, Any]) -> None:
        body["tensors"]["model"]["c"] = {"shape": [2], "dtype": "float32"}

    rewrite(path, change)
    with pytest.raises(UserError, match=r"its files do not hold c$"):
        store.load(path, {"model": {**tensors(0.0)["model"], "c": torch.zeros(2)}})

    def shrink(body: dict[str, Any]) -> None:
        del body["tensors"]["model"]["c"]
        body["tensors"]["model"]["a"]["shape"] = [4, 4]

    rewrite(path, shrink)
    with pytest.raises(UserError, match=r"its files hold a with shape \[8, 4\] .* instead of \[4, 4\]"):
        store.load(path, {"model": {"a": torch.zeros(4, 4), "b": torch.zeros(3)}})
