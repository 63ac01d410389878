"""Which stretches of which files are read by one worker: a pure function of the inputs."""

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from flashtrain.data.corpus import TEXT_SUFFIXES
from flashtrain.data.extra import require
from flashtrain.errors import UserError

Kind = Literal["text", "jsonl", "parquet"]

COMPRESSED = (".gz", ".zst")
_JSON_LINES = frozenset({".jsonl", ".ndjson", ".json"})
# Bytes of input that make one part: what a kill may cost a worker, and what one worker takes at a time.
SHARD_BYTES = 32 << 20


@dataclass(frozen=True)
class Piece:
    """A stretch of one file. ``size`` is its bytes of input, compressed or not.

    Of text and compressed files it is always the whole file. Of plain JSON lines ``first`` and ``last``
    are bytes: the lines that begin in ``[first, last)``. Of Parquet they are row groups; both are 0 if the
    file's footer cannot be read. ``stamp`` is the file's size and time of change.
    """

    path: str
    kind: Kind
    first: int
    last: int
    size: int
    stamp: tuple[int, int]


@dataclass(frozen=True)
class Shard:
    """Pieces that are read one after the other by one worker and make one part."""

    pieces: tuple[Piece, ...]

    @property
    def size(self) -> int:
        """Bytes of input."""
        return sum(piece.size for piece in self.pieces)

    def key(self, settings: str) -> str:
        """A name that changes with the input files and with ``settings``, all else that decides the part."""
        said = json.dumps([[asdict(piece) for piece in self.pieces], settings])
        return hashlib.sha256(said.encode("utf-8", errors="surrogateescape")).hexdigest()[:24]


def find(inputs: Sequence[str]) -> list[Path]:
    """The files that ``inputs`` mean, in the order given; a folder gives the known ones below it, sorted.

    Raises UserError for an input that is missing or of no known kind, and for a folder without any.
    """
    found: list[Path] = []
    for name in inputs:
        path = Path(name)
        if path.is_dir():
            below = sorted(_below(path))
            if not below:
                raise UserError(f"{name} holds no file to read: they end in {_endings()}")
            found += below
        elif not path.exists():
            raise UserError(f"input {name} does not exist: give files or folders")
        elif _kind(path) is None:
            raise UserError(f"input {name} is of no known kind: files to read end in {_endings()}")
        else:
            found.append(path)
    return found


def shards(files: Sequence[Path], size: int = SHARD_BYTES) -> list[Shard]:
    """The files cut into shards of about ``size`` bytes, in order.

    A text file is one document and a compressed file is one stream, so neither is cut. Raises UserError
    for a file that cannot be read.
    """
    made: list[Shard] = []
    waiting: list[Piece] = []
    for file in files:
        for piece in _pieces(file, size):
            if waiting and sum(p.size for p in waiting) + piece.size > size:
                made.append(Shard(tuple(waiting)))
                waiting = []
            waiting.append(piece)
    return [*made, Shard(tuple(waiting))] if waiting else made


def _pieces(file: Path, size: int) -> Iterator[Piece]:
    kind = _kind(file)
    assert kind is not None
    try:
        status = file.stat()
        with file.open("rb"):
            pass
    except OSError as error:
        raise UserError(f"input {file} cannot be read: {error.strerror}") from None
    # Not resolved: a link, as in a cache of downloads, may have the ending that its target lacks.
    path, stamp = str(file.absolute()), (status.st_size, status.st_mtime_ns)
    if kind == "parquet":
        yield from _row_groups(path, stamp, size)
    elif kind == "text" or file.suffix in COMPRESSED:
        yield Piece(path, kind, 0, status.st_size, status.st_size, stamp)
    else:
        for first in range(0, status.st_size, size):
            last = min(first + size, status.st_size)
            yield Piece(path, kind, first, last, last - first, stamp)


def _row_groups(path: str, stamp: tuple[int, int], size: int) -> Iterator[Piece]:
    parquet, arrow = require("pyarrow.parquet"), require("pyarrow")
    try:
        with parquet.ParquetFile(path) as file:
            sizes = [file.metadata.row_group(group).total_byte_size for group in range(file.num_row_groups)]
    except (OSError, arrow.ArrowException):
        yield Piece(path, "parquet", 0, 0, stamp[0], stamp)  # its reader meets the damage again and names it
        return
    first, whole = 0, max(1, sum(sizes))
    for group in range(len(sizes)):
        taken = sum(sizes[first : group + 1])
        if taken >= size or group + 1 == len(sizes):
            yield Piece(path, "parquet", first, group + 1, stamp[0] * taken // whole, stamp)
            first = group + 1


def _below(folder: Path) -> Iterator[Path]:
    for place, names, files in os.walk(folder, onerror=_refuse):
        names[:] = [name for name in names if not name.startswith(".")]
        # A plain .json file that nobody named is more often a table of settings than JSON lines.
        wanted = (name for name in files if not name.startswith(".") and not name.endswith(".json"))
        yield from (Path(place, name) for name in wanted if _kind(Path(name)))


def _refuse(error: OSError) -> None:
    raise UserError(f"input folder {error.filename} cannot be read: {error.strerror}")


def _kind(path: Path) -> Kind | None:
    suffix = path.with_suffix("").suffix if path.suffix in COMPRESSED else path.suffix
    if path.suffix == ".parquet":
        return "parquet"
    if suffix in _JSON_LINES:
        return "jsonl"
    return "text" if suffix in TEXT_SUFFIXES else None


def _endings() -> str:
    return ".jsonl, .json (both JSON lines), .txt and other text, each also .gz or .zst, or .parquet"
