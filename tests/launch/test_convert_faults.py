"""``flashtrain convert`` on damaged input, a full disk and a kill: one line, and nothing half-written."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from flashtrain.train import convert, snapshot
from tests.checkpoint.faults import in_child
from tests.launch.conversion import INDEX, command, copy, merge, save_source


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_source(tmp_path_factory.mktemp("source") / "llama")


def edit(file: Path, change: Callable[[dict], None]) -> None:
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-7])


def first(folder: Path) -> Path:
    return min(folder.glob("*.safetensors"))


def place(name: str) -> Callable[[Path], None]:
    return lambda f: edit(f / INDEX, lambda c: c["weight_map"].update({"model.norm.weight": name}))


NORM = "model.norm.weight"
DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "a file is missing": (lambda f: first(f).unlink(), "00001-of-"),
    "a file is cut off": (lambda f: truncate(first(f)), "is damaged or cannot be read"),
    "a file is empty": (lambda f: first(f).write_bytes(b""), "is damaged or cannot be read"),
    "a file is no safetensors": (lambda f: first(f).write_bytes(b"x" * 5000), "is damaged or cannot be read"),
    "a path leads out": (place("../evil.safetensors"), "'../evil.safetensors', which is no safetensors file"),
    "an absolute path": (place("/etc/passwd.safetensors"), "which is no safetensors file of this folder"),
    "a path is no text": (place(7), "places model.norm.weight in 7"),  # type: ignore[arg-type]
    "the index names another file": (place("model-00001-of-00099.safetensors"), "is missing, though"),
    "the index is no JSON": (lambda f: (f / INDEX).write_text("{"), f"{INDEX} is not JSON"),
    "the index is empty": (lambda f: edit(f / INDEX, lambda c: c.pop("weight_map")), "has no weight_map"),
    "the index lacks a tensor": (
        lambda f: edit(f / INDEX, lambda c: c["weight_map"].pop(NORM)),
        f"holds {NORM}, but",
    ),
    "the index names a tensor too many": (
        lambda f: edit(f / INDEX, lambda c: c["weight_map"].update({"x": first(f).name})),
        "lacks x, which",
    ),
    "no weights": (lambda f: [t.unlink() for t in f.glob("model*")], "holds neither model.safetensors nor"),
    "pickled weights": (
        lambda f: [t.unlink() for t in f.glob("model*")] + [(f / "pytorch_model.bin").touch()],
        "pytorch_model.bin is a pickle, which is not read",
    ),
    "a tensor is missing": (lambda f: merge(f, lambda t: t.pop(NORM)), f"lacks {NORM}"),
    "a tensor too many": (
        lambda f: merge(f, lambda t: t.update(extra=torch.ones(1))),
        "extra is not a tensor of the model",
    ),
    "a wrong shape": (
        lambda f: merge(f, lambda t: t.update({NORM: torch.ones(65)})),
        f"{NORM} has shape [65]; config.json asks for [64]",
    ),
    "mixed dtypes": (
        lambda f: merge(f, lambda t: t.update({NORM: torch.ones(64, dtype=torch.bfloat16)})),
        "choose one with --dtype",
    ),
    "a dtype of no weights": (
        lambda f: merge(f, lambda t: t.update({NORM: torch.ones(64, dtype=torch.int8)})),
        f"{NORM} has dtype I8",
    ),
    "tied, with another projection": (
        lambda f: edit(f / "config.json", lambda c: c.update(tie_word_embeddings=True)),
        "lm_head.weight is not model.embed_tokens.weight",
    ),
    "no config": (lambda f: (f / "config.json").unlink(), "config.json: No such file"),
    "a config that is no object": (lambda f: (f / "config.json").write_text("[]"), "is not a JSON object"),
    "another architecture": (
        lambda f: edit(f / "config.json", lambda c: c.update(model_type="gemma2")),
        "config.json: model_type is 'gemma2'",
    ),
    "another size": (
        lambda f: edit(f / "config.json", lambda c: c.update(num_hidden_layers=3)),
        "lacks model.layers.2.",
    ),
}


def assert_refused(words: list[object], message: str, out: Path, err: Callable[[], tuple[str, str]]) -> None:
    """Exit code 2, one line with ``message``, and nothing in ``out`` or beside it."""
    before = sorted(out.parent.iterdir())
    assert command(*words) == 2
    line = err()[1]
    assert line.count("\n") == 1, line
    assert line.startswith("flashtrain: error: ")
    assert message in line
    assert sorted(out.parent.iterdir()) == before


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_source_is_one_line_and_leaves_nothing(
    damage: str, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil, message = DAMAGES[damage]
    spoil(copy(source, tmp_path / "hf"))
    out = tmp_path / "out"
    assert_refused(["hf2ft", tmp_path / "hf", out], message, out, capsys.readouterr)


def test_a_damaged_checkpoint_is_one_line_and_leaves_nothing(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ft, out = tmp_path / "ft", tmp_path / "out"
    assert command("hf2ft", source, ft) == 0
    capsys.readouterr()
    refused = [
        (["ft2hf", tmp_path / "nothing", out], "there is no checkpoint in"),
        (["ft2hf", ft, out, "--tokenizer", tmp_path / "none.json"], "none.json"),
        (["ft2hf", ft, out, "--tokenizer", ft / "model"], "holds no tokenizer"),
        (["ft2hf", ft, out, "--tokenizer", next((ft / "model").iterdir())], "is no tokenizer.json"),
        (["hf2ft", source, out, "--tokenizer", source], "--tokenizer is for ft2hf"),
        (["ft2hf", ft, out, "--file-size", "2 apples"], "--file-size is 2 apples; expected a size"),
        (["ft2hf", ft, ft], "exists already"),
        (["hf2ft", tmp_path / "nothing", out], "there is no folder"),
    ]
    for words, message in refused:
        assert_refused(words, message, out, capsys.readouterr)
    weights = ft / "model/model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert_refused(["ft2hf", ft, out], "its sha256 is", out, capsys.readouterr)
    (ft / "manifest.json").write_text("{}")
    assert_refused(["ft2hf", ft, out], "is not a valid manifest", out, capsys.readouterr)


def test_links_in_a_checkpoint_are_not_followed_into_the_export(source: Path, tmp_path: Path) -> None:
    assert command("hf2ft", source, tmp_path / "ft") == 0
    (tmp_path / "secret").write_text("secret")
    (tmp_path / "ft/hf/tokenizer.json").unlink()
    (tmp_path / "ft/hf/tokenizer.json").symlink_to(tmp_path / "secret")
    assert command("ft2hf", tmp_path / "ft", tmp_path / "out") == 0
    assert not (tmp_path / "out/tokenizer.json").exists()


@pytest.mark.parametrize("direction", ["hf2ft", "ft2hf"])
def test_a_full_disk_is_one_line_and_leaves_nothing(direction: str, source: Path, tmp_path: Path) -> None:
    given = source
    if direction == "ft2hf":
        given = tmp_path / "ft"
        assert command("hf2ft", source, given) == 0
    code = (
        "import resource, signal, sys; from flashtrain.launch import main\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (120_000, 120_000))\n"
        "sys.exit(main.main(sys.argv[1:]))"
    )
    before = sorted(tmp_path.iterdir())
    ended = subprocess.run(
        [sys.executable, "-c", code, "convert", direction, given, tmp_path / "out", "--file-size", "100KB"],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert "00001-of-" in ended.stdout, "the first file fits"
    assert ended.returncode == 2, ended.stderr
    assert ended.stderr.startswith("flashtrain: error: cannot write "), ended.stderr
    assert ended.stderr.count("\n") == 1
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("how", ["interrupt", "kill"])
def test_a_conversion_that_is_stopped_leaves_no_folder_of_the_name(
    how: str, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    if how == "interrupt":

        def stop(name: str) -> None:
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            convert.from_hf(source, out, file_bytes=100_000, on_file=stop)
        assert list(tmp_path.iterdir()) == []
        return
    ended = in_child(
        lambda: convert.from_hf(
            source, out, file_bytes=100_000, on_file=lambda _: os.kill(os.getpid(), signal.SIGKILL)
        )
    )
    assert ended == -signal.SIGKILL
    assert not out.exists()
    assert all(entry.name.startswith(".tmp-out-") for entry in tmp_path.iterdir())
    convert.from_hf(source, out)
    assert snapshot.load_model(out)
