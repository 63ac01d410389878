"""Round trips, the keep policy and the pointer, on one process."""

import json
import logging
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from flashtrain.checkpoint import CheckpointStore, TensorEntry, sharded
from flashtrain.errors import UserError

DTYPES = [
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.bool,
]


def bits(tensor: Tensor) -> bytes:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def random_bits(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    count = math.prod(shape) * dtype.itemsize
    content = torch.randint(0, 2 if dtype == torch.bool else 256, (count,), dtype=torch.uint8)
    return content.view(dtype).reshape(shape)


def small(step: int) -> dict[str, dict[str, Tensor]]:
    return {"model": {"weight": torch.full((3, 2), float(step))}}


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
def test_every_dtype_and_shape_comes_back_bit_for_bit(tmp_path: Path, dtype: torch.dtype) -> None:
    shapes = [(5, 3), (), (1,), (0,), (0, 4), (3, 0, 2), (2, 1, 3, 2)]
    saved = {"model": {f"t{index}": random_bits(shape, dtype) for index, shape in enumerate(shapes)}}
    store = CheckpointStore(tmp_path)
    path = store.save(3, saved, {})
    loaded = {"model": {name: torch.zeros_like(tensor) for name, tensor in saved["model"].items()}}
    manifest = store.load(path, loaded)
    for name, tensor in saved["model"].items():
        assert bits(loaded["model"][name]) == bits(tensor)
        assert loaded["model"][name].shape == tensor.shape
        dtype_name = str(dtype).removeprefix("torch.")
        assert manifest.tensors["model"][name] == TensorEntry(tuple(tensor.shape), dtype_name)


def test_sets_are_directories_of_plain_safetensors(tmp_path: Path) -> None:
    model = {"a.weight": torch.randn(4, 3), "a.bias": torch.randn(3)}
    moments = {"a.weight": torch.randn(4, 3), "step": torch.tensor(7.0)}
    path = CheckpointStore(tmp_path).save(7, {"model": model, "optimizer": moments}, {})
    assert path == tmp_path / "step-00000007"
    assert names(path) == ["manifest.json", "model", "optimizer"]
    for set_name, expected in (("model", model), ("optimizer", moments)):
        (file,) = (path / set_name).iterdir()
        found = load_file(file)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_loading_fills_the_given_tensors_in_place(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    saved = torch.nn.Linear(3, 2)
    path = store.save(1, {"model": saved.state_dict()}, {})
    linear = torch.nn.Linear(3, 2)
    before = linear.weight.data_ptr()
    parameters = dict(linear.named_parameters())
    store.load(path, {"model": parameters})
    assert torch.equal(linear.weight, saved.weight)
    assert linear.weight.data_ptr() == before
    assert linear.weight.requires_grad


def test_tied_strided_and_partial_views(tmp_path: Path) -> None:
    base = torch.randn(6, 4)
    whole = torch.randn(5, 5)
    saved = {"tied.a": whole, "tied.b": whole, "turned": base.t(), "rows": base[2:4], "columns": base[:, 1]}
    store = CheckpointStore(tmp_path)
    path = store.save(1, {"model": saved}, {})
    target = torch.zeros(6, 4)
    loaded = {
        "tied.a": torch.zeros(5, 5),
        "tied.b": torch.zeros(5, 5),
        "turned": torch.zeros(6, 4).t(),
        "rows": torch.zeros(2, 4),
        "columns": target[:, 2],
    }
    store.load(path, {"model": loaded})
    assert all(torch.equal(loaded[name], saved[name]) for name in saved)
    assert torch.equal(target[:, 2], base[:, 1])
    assert target[:, :2].eq(0).all()


def test_large_sets_are_split_over_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sharded, "FILE_BYTES", 100)
    saved = {f"t{index}": torch.randn(15) for index in range(6)}
    saved["large"] = torch.randn(200)
    store = CheckpointStore(tmp_path)
    path = store.save(1, {"model": saved}, {})
    assert len(names(path / "model")) == 7
    assert len(store.read_manifest(path).files) == 7
    loaded = {name: torch.zeros_like(tensor) for name, tensor in saved.items()}
    store.load(path, {"model": loaded})
    assert all(torch.equal(loaded[name], saved[name]) for name in saved)


def test_meta_comes_back(tmp_path: Path) -> None:
    meta = {
        "config": {"lr": 3e-4, "betas": (0.9, 0.95)},
        "tokens": 2**60,
        "loss": math.inf,
        "note": "ü\n",
        "x": None,
    }
    store = CheckpointStore(tmp_path)
    path = store.save(12, {"model": {}, "optimizer": {}}, meta, rank_meta={"rng": "00ff"})
    manifest = store.read_manifest(path)
    assert manifest.meta == {**meta, "config": {"lr": 3e-4, "betas": [0.9, 0.95]}}
    assert manifest.rank_meta == [{"rng": "00ff"}]
    assert (manifest.step, manifest.version) == (12, 1)
    assert manifest.tensors == {"model": {}, "optimizer": {}}
    assert manifest.files == {}
    assert store.load(path, {"model": {}, "optimizer": {}}) == manifest


@pytest.mark.parametrize(
    ("step", "tensors", "meta", "rank_meta", "message"),
    [
        (-1, {}, {}, None, r"^step must be a whole number of at least 0, not -1$"),
        (1.5, {}, {}, None, r"not 1\.5$"),
        (1, {}, [], None, r"^meta must be a dict, not a list$"),
        (
            1,
            {},
            {"rng": {"cpu": torch.zeros(1)}},
            None,
            r"^meta\.rng\.cpu is a Tensor, which JSON cannot hold",
        ),
        (1, {}, {"a": [{1: 2}]}, None, r"^meta\.a\[0\] has the key 1, which JSON cannot hold"),
        (1, {}, {}, b"x", r"^rank_meta is a bytes, which JSON cannot hold"),
        (1, {"../x": {}}, {}, None, r"^'\.\./x' is no name for a set of tensors"),
        (1, {"model": {"a": 3}}, {}, None, r"^model/a is a int, not a tensor"),
        (
            1,
            {"model": {"a": torch.zeros(2, dtype=torch.complex64)}},
            {},
            None,
            r"^model/a has dtype torch\.complex64",
        ),
        (1, {"model": {"a": torch.zeros(2, device="meta")}}, {}, None, r"^model/a is on the meta device"),
        (
            1,
            {"model": {"a": torch.zeros(2, 2).to_sparse()}},
            {},
            None,
            r"^model/a has layout torch\.sparse_coo",
        ),
        (
            1,
            {"model": {"__metadata__": torch.zeros(2)}},
            {},
            None,
            r"^model/__metadata__: safetensors reserves",
        ),
    ],
)
def test_what_cannot_be_stored_is_named(
    tmp_path: Path, step: Any, tensors: Any, meta: Any, rank_meta: Any, message: str
) -> None:
    store = CheckpointStore(tmp_path / "run")
    with pytest.raises(UserError, match=message):
        store.save(step, tensors, meta, rank_meta)
    assert not (tmp_path / "run").exists()


def test_another_model_is_named_and_nothing_is_changed(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    saved = {"a": torch.ones(4, 8), "b": torch.ones(2)}
    path = store.save(1, {"model": saved}, {})

    def refused(tensors: dict[str, Tensor], message: str, set_name: str = "model") -> None:
        with pytest.raises(UserError, match=message):
            store.load(path, {set_name: tensors})
        assert all(tensor.eq(0).all() for tensor in tensors.values())

    other = r"is of another model: model/"
    refused(
        {"a": torch.zeros(4, 16), "b": torch.zeros(2)},
        other + r"a is float32 \[4, 8\] there and float32 \[4, 16\] here",
    )
    refused(
        {"a": torch.zeros(4, 8), "b": torch.zeros(2, dtype=torch.bfloat16)},
        other + r"b is float32 \[2\] there and bfloat16 \[2\] here",
    )
    refused({"a": torch.zeros(4, 8)}, other + r"b is float32 \[2\] there and does not exist here")
    refused(
        {"a": torch.zeros(4, 8), "b": torch.zeros(2), "c": torch.zeros(1)},
        other + r"c does not exist there and is float32 \[1\] here",
    )
    refused({"a": torch.zeros(4, 8)}, r"has no set 'optimizer', it holds model", "optimizer")


def test_one_set_loads_without_the_others(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    path = store.save(1, {**small(1), "optimizer": {"m": torch.ones(3)}}, {})
    (file,) = (path / "optimizer").iterdir()
    file.write_bytes(b"")
    loaded = small(0)
    store.load(path, loaded)
    assert torch.equal(loaded["model"]["weight"], small(1)["model"]["weight"])


def test_keep_removes_the_oldest_after_the_new_one_is_pointed_to(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep=2)
    assert store.latest() is None
    for step in (10, 20, 30):
        path = store.save(step, small(step), {})
        assert store.latest() == path == tmp_path / f"step-{step:08d}"
        assert (tmp_path / "latest").read_text() == f"step-{step:08d}\n"
    assert names(tmp_path) == ["latest", "step-00000020", "step-00000030"]
    with pytest.raises(UserError, match=r"^keep must be at least 1, not 0"):
        CheckpointStore(tmp_path, keep=0)


def test_a_run_taken_back_to_an_earlier_step_keeps_what_it_saves(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep=3)
    for step in (10, 20, 30):
        store.save(step, small(step), {})
    (tmp_path / "latest").write_text("step-00000010")
    assert store.latest() == tmp_path / "step-00000010"
    CheckpointStore(tmp_path, keep=1).save(15, small(15), {})
    assert names(tmp_path) == ["latest", "step-00000015"]
    assert store.latest() == tmp_path / "step-00000015"


def test_saving_a_step_again_never_touches_the_first(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep=2)
    first = store.save(5, small(1), {})
    second = store.save(5, small(2), {})
    assert names(tmp_path) == ["latest", "step-00000005", "step-00000005-2"]
    assert store.latest() == second
    for path, value in ((first, 1.0), (second, 2.0)):
        loaded = small(0)
        store.load(path, loaded)
        assert loaded["model"]["weight"].eq(value).all()
    assert store.save(5, small(3), {}).name == "step-00000005-3"
    assert names(tmp_path) == ["latest", "step-00000005-2", "step-00000005-3"]


@pytest.mark.parametrize("pointer", [None, "", "step-00000099", "../elsewhere", "step-00000002\n\n", "\xff"])
def test_a_bad_pointer_falls_back_and_says_so(
    tmp_path: Path, pointer: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    store = CheckpointStore(tmp_path / "run")
    store.save(1, small(1), {})
    store.save(2, small(2), {})
    shutil.copytree(tmp_path / "run" / "step-00000001", tmp_path / "elsewhere")
    if pointer is None:
        (tmp_path / "run" / "latest").unlink()
    else:
        (tmp_path / "run" / "latest").write_text(pointer, encoding="latin-1")
    with caplog.at_level(logging.WARNING, logger="flashtrain"):
        assert store.latest() == tmp_path / "run" / "step-00000002"
    assert "taking the newest complete checkpoint" in caplog.text


def test_a_link_is_no_checkpoint_of_the_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    elsewhere = CheckpointStore(tmp_path / "elsewhere").save(7, small(7), {})
    store = CheckpointStore(tmp_path / "run")
    path = store.save(1, small(1), {})
    (tmp_path / "run" / "step-00000002").symlink_to(elsewhere)
    (tmp_path / "run" / "latest").write_text("step-00000002\n")
    assert store.latest() == path
    assert "step-00000002 is a symbolic link, which is refused" in caplog.text
    store.save(3, small(3), {})
    store.save(4, small(4), {})
    assert (elsewhere / "manifest.json").is_file(), "old checkpoints are removed, but not through links"


def test_an_incomplete_checkpoint_is_passed_over_and_left_alone(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = CheckpointStore(tmp_path, keep=1)
    CheckpointStore(tmp_path, keep=2).save(1, small(1), {})
    path = CheckpointStore(tmp_path, keep=2).save(2, small(2), {})
    next((path / "model").iterdir()).unlink()
    with caplog.at_level(logging.WARNING, logger="flashtrain"):
        assert store.latest() == tmp_path / "step-00000001"
    assert "which is not complete" in caplog.text
    store.save(3, small(3), {})
    assert names(tmp_path) == ["latest", "step-00000002", "step-00000003"]
    shutil.rmtree(tmp_path / "step-00000003")
    with pytest.raises(UserError, match=r"no other checkpoint there is complete: restore one, or delete"):
        store.latest()


def test_leftovers_are_never_loaded_and_cleaned_on_the_next_save(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    path = store.save(1, small(1), {})
    outside = tmp_path.parent / f"{tmp_path.name}-outside"
    outside.mkdir()
    (outside / "precious").touch()
    path.rename(tmp_path / ".tmp-save-step-00000001-00112233")
    (tmp_path / "latest").unlink()
    (tmp_path / ".tmp-latest-step-00000001-00112233").write_text("step-00000001")
    (tmp_path / ".tmp-delete-link").symlink_to(outside)
    (tmp_path / ".tmp-notes").mkdir()
    (tmp_path / "notes.txt").touch()
    assert store.latest() is None
    store.save(2, small(2), {})
    assert names(tmp_path) == [".tmp-notes", "latest", "notes.txt", "step-00000002"]
    assert names(outside) == ["precious"]


def test_nothing_is_pickled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("pickle or torch.load was called")

    for function in ("load", "loads", "dump", "dumps", "Pickler", "Unpickler"):
        monkeypatch.setattr(f"pickle.{function}", refuse)
    for function in ("load", "save"):
        monkeypatch.setattr(f"torch.{function}", refuse)
    store = CheckpointStore(tmp_path)
    path = store.save(1, {**small(1), "optimizer": {"step": torch.tensor(1.0)}}, {"a": 1}, [2])
    store.load(path, {**small(0), "optimizer": {"step": torch.tensor(0.0)}})
    suffixes = {file.suffix for file in path.rglob("*") if file.is_file()}
    assert suffixes == {".json", ".safetensors"}
    json.loads((path / "manifest.json").read_text())
