import hashlib
import math
import os
import sysconfig
from pathlib import Path

import numpy as np
import pytest

from flashtrain.data import ByteTokenizer, Corpus, unigram_entropy
from flashtrain.errors import UserError

NAMES = [f"package_{i}/module.py" for i in range(30)] + ["zlib_like.py", "a.py"]
NOT_LIBRARY = [
    "site-packages/torch.py",
    "dist-packages/apt.py",
    "test/test_os.py",
    "unittest/tests/case.py",
    "idlelib/idle_test/editor.py",
    "package_1/__pycache__/module.py",
    "_sysconfigdata__linux.py",
    "sitecustomize.py",
    "LICENSE.txt",
]


def write(root: Path, names: list[str]) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(f"# {name}\n")
    return root


def use_as_library(monkeypatch: pytest.MonkeyPatch, root: Path) -> None:
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(root)})


def corpus(source: str | Path = "stdlib", held_out: float = 0.2) -> Corpus:
    return Corpus(Corpus.Config(source=str(source), held_out=held_out), ByteTokenizer())


def documents(tokens: np.ndarray) -> list[str]:
    return ByteTokenizer().decode(tokens).split("\0")


def test_library_split_is_by_relative_path_whatever_the_root(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    splits = []
    # Written in another order and at another depth, as another machine would have it.
    for root, names in (("one", NAMES), ("two/deeper/test/lib", NAMES[::-1])):
        use_as_library(monkeypatch, write(tmp_path / root, names + NOT_LIBRARY))
        splits.append([corpus().split("train").tolist(), corpus().split("held_out").tolist()])
    assert splits[0] == splits[1]

    digest = {name: hashlib.sha256(name.encode()).digest() for name in NAMES}
    held_out = [name for name in sorted(NAMES) if int.from_bytes(digest[name][:8], "big") / 2**64 < 0.2]
    train = [name for name in sorted(NAMES) if name not in held_out]
    assert 0 < len(held_out) < len(train)
    assert documents(np.array(splits[0][0])) == [f"# {name}\n" for name in train]
    assert documents(np.array(splits[0][1])) == [f"# {name}\n" for name in held_out]


def test_raising_the_share_only_adds_to_the_held_out_files(tmp_path: Path) -> None:
    write(tmp_path, NAMES)
    small, large = (set(documents(corpus(tmp_path, share).split("held_out"))) for share in (0.2, 0.6))
    assert small < large


def test_real_library() -> None:
    whole = corpus(held_out=0.05)
    train, held_out = whole.split("train"), whole.split("held_out")
    inventory = whole.describe()
    assert train.dtype == held_out.dtype == np.uint8
    assert len(train) == inventory.train_bytes + inventory.train_files - 1
    assert len(held_out) == inventory.held_out_bytes + inventory.held_out_files - 1
    assert inventory.bytes > 2_000_000
    assert 0.01 < inventory.held_out_bytes / inventory.bytes < 0.12
    assert not any("test" in name.split("/") for name in whole._names["train"])
    assert 2.5 < unigram_entropy(train) < 4.0


def test_folder_takes_text_files_and_leaves_out_hidden_ones(tmp_path: Path) -> None:
    write(tmp_path, ["b.txt", "a/c.md", "tests/d.py", "image.png", ".git/e.txt", ".hidden.txt"])
    tokens = corpus(tmp_path, 0.0).split("train")
    assert documents(tokens) == ["# a/c.md\n", "# b.txt\n", "# tests/d.py\n"]
    assert str(corpus(tmp_path, 0.0).describe()).endswith("30 bytes; train 30 in 3 files, held out 0 in 0")


def test_single_file_is_cut_once_at_a_line_end(tmp_path: Path) -> None:
    path = tmp_path / "book"
    path.write_text("".join(f"line {i:02}\n" for i in range(100)))
    whole = corpus(path, 0.1)
    train, held_out = (ByteTokenizer().decode(whole.split(name)) for name in ("train", "held_out"))
    assert train + held_out == path.read_text()
    assert held_out.startswith("line 9")
    assert train.endswith("\n")
    assert whole.describe().train_bytes == len(train)
    assert whole.describe().held_out_bytes == len(held_out)


def test_single_line_is_cut_between_characters(tmp_path: Path) -> None:
    path = tmp_path / "line.txt"
    for text in ("é" * 51, "é" * 51 + "\n"):
        path.write_text(text)
        whole = corpus(path, 0.25)
        parts = [bytes(whole.split(name)).decode() for name in ("train", "held_out")]
        assert "".join(parts) == text
        assert min(map(len, parts)) > 0


def test_nothing_held_out(tmp_path: Path) -> None:
    path = tmp_path / "book.txt"
    path.write_text("text\n" * 10)
    assert len(corpus(path, 0.0).split("train")) == 50
    with pytest.raises(UserError, match="held_out split is empty"):
        corpus(path, 0.0).split("held_out")


class WideTokenizer:
    boundary = 7

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size

    def encode(self, text: str | bytes) -> list[int]:
        return [byte + self.vocab_size - 256 for byte in bytes(text)]

    def encode_array(self, text: str | bytes) -> np.ndarray:
        return np.array(self.encode(text))

    def decode(self, ids: object) -> str:
        raise NotImplementedError


@pytest.mark.parametrize(("vocab_size", "dtype"), [(256, "u1"), (257, "u2"), (65536, "u2"), (65537, "i4")])
def test_tokens_take_the_smallest_type(tmp_path: Path, vocab_size: int, dtype: str) -> None:
    write(tmp_path, ["a.txt", "b.txt"])
    tokens = Corpus(Corpus.Config(source=str(tmp_path), held_out=0.0), WideTokenizer(vocab_size)).split(
        "train"
    )
    assert tokens.dtype == np.dtype(dtype)
    assert tokens[:3].tolist() == [byte + vocab_size - 256 for byte in b"# a"]
    assert tokens[len(b"# a.txt\n")] == WideTokenizer.boundary


def test_bad_sources_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "only.png").write_text("no")
    (tmp_path / "hollow").mkdir()
    (tmp_path / "hollow" / "empty.txt").touch()
    (tmp_path / "empty.txt").touch()
    (tmp_path / "binary.txt").write_bytes(b"a\0b")
    for source, message in (
        ("missing", "no such file or folder"),
        ("empty", "no text in"),
        ("hollow", "no text in"),
        ("empty.txt", "the file is empty"),
        ("binary.txt", "NUL"),
    ):
        with pytest.raises(UserError, match=message) as caught:
            corpus(tmp_path / source)
        assert str(tmp_path / source) in str(caught.value)
        assert "\n" not in str(caught.value)
    for name, message in (("~nobody-of-this-name/a", "no such user"), ("", "its source is empty")):
        with pytest.raises(UserError, match=message):
            corpus(name)
    with pytest.raises(UserError, match="held_out is 1"):
        corpus(tmp_path, 1.0)
    with pytest.raises(UserError, match="no split 'test'"):
        corpus(write(tmp_path / "fine", ["a.txt"])).split("test")  # type: ignore[arg-type]
    use_as_library(monkeypatch, tmp_path / "zipped.zip")
    with pytest.raises(UserError, match="the standard library is not at"):
        corpus()


def test_binary_in_a_folder_and_unreadable_files_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, ["fine.txt"])
    (tmp_path / "binary.txt").write_bytes(b"\0")
    with pytest.raises(UserError, match=r"binary\.txt holds NUL bytes"):
        corpus(tmp_path, 0.0).split("train")
    (tmp_path / "binary.txt").unlink()

    def refuse(path: Path) -> bytes:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "read_bytes", refuse)  # the superuser of a CI machine may read everything
    with pytest.raises(UserError, match=r"fine\.txt cannot be read \(Permission denied\)"):
        corpus(tmp_path, 0.0).split("train")


def test_folder_links_are_not_followed_into_a_circle(tmp_path: Path) -> None:
    write(tmp_path, ["a.txt"])
    os.symlink(tmp_path, tmp_path / "again")
    assert documents(corpus(tmp_path, 0.0).split("train")) == ["# a.txt\n"]


def test_unigram_entropy() -> None:
    assert unigram_entropy(np.full(10, 3, dtype=np.uint8)) == 0.0
    uniform = np.tile(np.arange(256, dtype=np.uint8), 5000)  # more than one block
    assert unigram_entropy(uniform) == pytest.approx(math.log(256), abs=1e-12)
    assert unigram_entropy(np.array([0, 0, 0, 1], dtype=np.int32)) == pytest.approx(
        -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    )
    with pytest.raises(UserError, match="entropy of no tokens"):
        unigram_entropy(np.empty(0, dtype=np.uint8))
