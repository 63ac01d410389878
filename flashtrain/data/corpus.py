"""A text corpus and its split into training and held-out tokens, the same on every machine."""

import hashlib
import os
import sysconfig
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NoReturn

import numpy as np

from flashtrain.data.tokenizer import Tokenizer
from flashtrain.errors import UserError

Split = Literal["train", "held_out"]

_PROSE = (".txt", ".text", ".md", ".rst", ".tex", ".html", ".xml", ".csv", ".tsv")
_DATA = (".json", ".jsonl", ".toml", ".yaml", ".yml", ".ini", ".cfg", ".css", ".sql")
_CODE = (
    ".py",
    ".pyi",
    ".c",
    ".h",
    ".cc",
    ".cpp",
    ".hpp",
    ".cu",
    ".cuh",
    ".rs",
    ".go",
    ".java",
    ".js",
    ".ts",
    ".sh",
)
TEXT_SUFFIXES = frozenset(_PROSE + _DATA + _CODE)

# Test folders are separate packages in some distributions; the rest is not part of the library.
_LIBRARY_SKIPS = frozenset({"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"})
# Written when an interpreter is built or installed, so they differ from one machine to the next.
_GENERATED_PREFIXES = ("_sysconfigdata", "config-", "sitecustomize", "usercustomize")


@dataclass(frozen=True, kw_only=True)
class Inventory:
    """What a corpus holds, in files and bytes; a single file counts in both of its splits."""

    source: str
    train_files: int
    train_bytes: int
    held_out_files: int
    held_out_bytes: int

    @property
    def bytes(self) -> int:
        return self.train_bytes + self.held_out_bytes

    def __str__(self) -> str:
        return (
            f"{self.source}: {self.bytes:,} bytes; train {self.train_bytes:,} in {self.train_files:,} files, "
            f"held out {self.held_out_bytes:,} in {self.held_out_files:,}"
        )


class Corpus:
    """Documents of one source, split by name and joined with the tokenizer's boundary.

    The source "stdlib" is the running interpreter's standard library: its .py files, without tests and
    installed packages. A folder gives all files below it with a text suffix, hidden ones left out. Files
    come in the order of their POSIX path relative to the source, and a file is held out by the SHA-256
    of that path, so neither the place of the folder nor the machine changes a split.

    A single file is cut once: its last ``held_out`` share, from the next line on, is held out. Windows
    of the two splits then share no text, which blocks dealt out at random could not promise.

    Raises UserError for a missing source, a folder without text, an unreadable file and a NUL byte.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """``source``: "stdlib", a text file or a folder. ``held_out``: share not trained on, in [0, 1)."""

        source: str = "stdlib"
        held_out: float = 0.05

    def __init__(self, config: Config, tokenizer: Tokenizer) -> None:
        if not 0.0 <= config.held_out < 1.0:
            raise UserError(f"held_out is {config.held_out}: give the share to hold out, from 0 to below 1")
        self.config, self.tokenizer = config, tokenizer
        self.root, names = _find(config.source)
        self._names: dict[Split, list[str]] = {"train": [], "held_out": []}
        if self.root.is_file():
            self._cut = _tail(_read(self.root), config.held_out)
        else:
            for name in names:
                self._names["held_out" if _held_out(name, config.held_out) else "train"].append(name)

    def split(self, name: Split) -> np.ndarray:
        """Tokens ``[tokens]`` of one split: uint8, uint16 or int32, the smallest that holds the vocabulary.

        Reads and encodes anew at every call. Raises UserError if the split is empty.
        """
        if name not in self._names:
            raise UserError(f"there is no split {name!r}: use 'train' or 'held_out'")
        if self.root.is_file():
            text = _read(self.root)
            documents = [text[: self._cut] if name == "train" else text[self._cut :]]
        else:
            documents = [_read(self.root / path) for path in self._names[name]]
        kind = _smallest(self.tokenizer.vocab_size)
        boundary = np.array([self.tokenizer.boundary], dtype=kind)
        pieces: list[np.ndarray] = []
        for document in documents:
            pieces += [boundary, self.tokenizer.encode_array(document).astype(kind, copy=False)]
        tokens = np.concatenate(pieces[1:]) if pieces else np.empty(0, dtype=kind)
        if len(tokens) == 0:
            raise UserError(
                f"corpus {self.config.source}: the {name} split is empty with held_out = "
                f"{self.config.held_out}: change held_out or give more text"
            )
        return tokens

    def describe(self) -> Inventory:
        """Files and bytes of both splits, boundaries not counted; reads sizes, not texts."""
        if self.root.is_file():
            size = self.root.stat().st_size
            files, held_out_files = int(self._cut > 0), int(self._cut < size)
            train, held_out = self._cut, size - self._cut
        else:
            files, held_out_files = len(self._names["train"]), len(self._names["held_out"])
            train, held_out = (
                sum((self.root / path).stat().st_size for path in self._names[split])
                for split in ("train", "held_out")
            )
        return Inventory(
            source=self.config.source,
            train_files=files,
            train_bytes=train,
            held_out_files=held_out_files,
            held_out_bytes=held_out,
        )


def unigram_entropy(tokens: np.ndarray) -> float:
    """Entropy in nats per token of the token frequencies: the loss of the best model without context.

    Raises UserError for an empty array.
    """
    if len(tokens) == 0:
        raise UserError("the entropy of no tokens is undefined: give a split that holds text")
    counts = np.zeros(int(tokens.max()) + 1, dtype=np.int64)
    # bincount widens its argument to int64, eight times the size of a byte corpus.
    for start in range(0, len(tokens), 1 << 20):
        counts += np.bincount(tokens[start : start + (1 << 20)], minlength=len(counts))
    shares = counts[counts > 0] / len(tokens)
    return max(0.0, float(-(shares * np.log(shares)).sum()))


def _find(source: str) -> tuple[Path, list[str]]:
    """The source's path, and for a folder the relative POSIX paths of its documents in order."""
    library = source == "stdlib"
    if not source:
        raise UserError("corpus: its source is empty: give the path of a text file or folder")
    try:
        root = Path(sysconfig.get_paths()["stdlib"]) if library else Path(source).expanduser()
    except RuntimeError:
        raise UserError(
            f"corpus {source}: there is no such user: give the path of a text file or folder"
        ) from None
    if root.is_file() and not library:
        if root.stat().st_size == 0:
            raise UserError(f"corpus {source}: the file is empty: give one that holds text")
        return root, []
    if not root.is_dir():
        where = f"the standard library is not at {root}" if library else "there is no such file or folder"
        raise UserError(f"corpus {source}: {where}: give the path of a text file or folder")
    names: list[str] = []
    for folder, below, files in os.walk(root, onerror=_refuse):
        below[:] = [name for name in below if not _skipped(name, library)]
        names += [
            (Path(folder) / name).relative_to(root).as_posix()
            for name in files
            if not _skipped(name, library)
            and Path(name).suffix in ({".py"} if library else TEXT_SUFFIXES)
            and (Path(folder) / name).is_file()
        ]
    if not any((root / name).stat().st_size for name in names):
        suffixes = ".py" if library else ".txt, .md, .py and the like"
        raise UserError(f"corpus {source}: no text in {root}: it needs files that end in {suffixes}")
    return root, sorted(names)


def _skipped(name: str, library: bool) -> bool:
    if library:
        return name in _LIBRARY_SKIPS or name.startswith(_GENERATED_PREFIXES)
    return name.startswith(".") or name == "__pycache__"


def _held_out(name: str, share: float) -> bool:
    digest = hashlib.sha256(name.encode("utf-8", errors="surrogateescape")).digest()
    return int.from_bytes(digest[:8], "big") < share * 2**64


def _tail(text: bytes, share: float) -> int:
    """Where the held-out end of a single text begins: after a line end, else between two characters."""
    if share == 0.0:
        return len(text)
    cut = int(len(text) * (1.0 - share))
    line_end = text.find(b"\n", cut) + 1
    if 0 < line_end < len(text):
        return line_end
    while cut < len(text) and text[cut] & 0xC0 == 0x80:  # a continuation byte of UTF-8
        cut += 1
    return cut


def _read(path: Path) -> bytes:
    try:
        text = path.read_bytes()
    except OSError as error:
        _refuse(error)
    if b"\0" in text:
        raise UserError(
            f"corpus file {path} holds NUL bytes, so it is no text: remove it or convert it to UTF-8"
        )
    return text


def _refuse(error: OSError) -> NoReturn:
    raise UserError(
        f"corpus: {error.filename} cannot be read ({error.strerror}): mend its permissions or move it"
    )


def _smallest(vocab_size: int) -> type[np.unsignedinteger | np.signedinteger]:
    return np.uint8 if vocab_size <= 1 << 8 else np.uint16 if vocab_size <= 1 << 16 else np.int32
