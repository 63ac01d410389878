"""Token files in Megatron's format: PREFIX.bin holds the tokens, PREFIX.idx says where documents begin.

The index (``_IndexWriter`` of megatron-core's datasets/indexed_dataset.py) is little-endian:

    9 bytes  "MMIDIDX" and two zeros         8  version, 1          1  type of the tokens (``DTYPES``)
    8        number of sequences S           8  number of documents + 1, D
    4 x S    tokens of each sequence         8 x S  byte of PREFIX.bin at which each sequence begins
    8 x D    sequence that each document begins with; the last is S
    1 x S    modes, in multimodal sets alone

What is written here has one sequence a document.
"""

import struct
from bisect import bisect_left
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from flashtrain.data import durable
from flashtrain.errors import UserError

_HEADER = struct.Struct("<9sQBQQ")
_MAGIC, _VERSION = b"MMIDIDX\x00\x00", 1
DTYPES: dict[int, type[np.number]] = {
    1: np.uint8,
    2: np.int8,
    3: np.int16,
    4: np.int32,
    5: np.int64,
    6: np.float64,
    7: np.float32,
    8: np.uint16,
}
MAX_LENGTH = 2**31 - 1  # lengths are int32
_BLOCK = 1 << 20


def token_type(vocab_size: int) -> type[np.number]:
    """The type that Megatron's tools write for a vocabulary (``DType.optimal_dtype``)."""
    return np.uint16 if vocab_size < 65500 else np.int32


def write_index(path: Path, dtype: type[np.number], lengths: list[Path]) -> None:
    """Write ``path``, an index of one sequence a document, and make it durable.

    ``lengths`` are files of int32 lengths, in order; they are read in blocks, so memory stays small.
    """
    codes = {kind: code for code, kind in DTYPES.items()}
    count = sum(file.stat().st_size for file in lengths) // 4
    itemsize = np.dtype(dtype).itemsize
    with path.open("wb") as stream:
        stream.write(_HEADER.pack(_MAGIC, _VERSION, codes[dtype], count, count + 1))
        for block in _blocks(lengths):
            stream.write(block.tobytes())
        position = 0
        for block in _blocks(lengths):
            ends = position + np.cumsum(block, dtype=np.int64) * itemsize
            stream.write((ends - block * np.int64(itemsize)).tobytes())
            position = int(ends[-1])
        for first in range(0, count + 1, _BLOCK):
            stream.write(np.arange(first, min(first + _BLOCK, count + 1), dtype="<i8").tobytes())
        durable.sync(stream)


def _blocks(lengths: list[Path]) -> Iterator[np.ndarray]:
    for file in lengths:
        with file.open("rb") as stream:
            while block := stream.read(4 * _BLOCK):
                yield np.frombuffer(block, dtype="<i4")


class TokenFile:
    """The tokens of a prepared set, memory-mapped, and the documents in them.

    ``prefix`` is the path of both files without ``.bin`` and ``.idx``. Sequences must follow each other in
    the .bin file, as all of Megatron's tools write them.

    Raises UserError if a file is missing, truncated, or no such index. Once it is open, ``check`` does the
    same; it stands before every read, because a process that touches a mapped page beyond the end of a
    file is killed by SIGBUS, without a word.
    """

    def __init__(self, prefix: Path) -> None:
        self.prefix = prefix
        self.bin, self.idx = (prefix.with_name(prefix.name + suffix) for suffix in (".bin", ".idx"))
        sizes = [_size(path) for path in (self.bin, self.idx)]
        self.dtype, sequences, documents = self._header(sizes[1])
        offset = _HEADER.size
        self._lengths = _mapped(self.idx, "<i4", sequences, offset)
        self._pointers = _mapped(self.idx, "<i8", sequences, offset + 4 * sequences)
        self._documents = _mapped(self.idx, "<i8", documents, offset + 12 * sequences)
        self.documents = documents - 1
        self.tokens = sum(
            int(self._lengths[first : first + _BLOCK].sum(dtype=np.int64))
            for first in range(0, sequences, _BLOCK)
        )
        self._check_index(sequences)
        if sizes[0] != self.tokens * self.dtype.itemsize:
            raise UserError(self._torn(self.bin, sizes[0], self.tokens * self.dtype.itemsize))
        if self.tokens == 0:
            raise UserError(f"{self.bin} holds no tokens: prepare the set anew")
        self._data = _mapped(self.bin, self.dtype.str, self.tokens, 0)
        self._identity = {path: _identity(path) for path in (self.bin, self.idx)}

    def _header(self, size: int) -> tuple[np.dtype, int, int]:
        """Type of the tokens, number of sequences, number of documents + 1."""
        with self.idx.open("rb") as stream:
            header = stream.read(_HEADER.size)
        if len(header) < _HEADER.size or not header.startswith(_MAGIC):
            raise UserError(f"{self.idx} is no index of a prepared set: it does not begin with MMIDIDX")
        _, version, code, sequences, documents = _HEADER.unpack(header)
        if version != _VERSION:
            raise UserError(f"{self.idx} has version {version} of its format: only version 1 is known")
        if code not in DTYPES or not np.issubdtype(DTYPES[code], np.integer):
            raise UserError(f"{self.idx} says that tokens have type {code}: only whole numbers are tokens")
        expected = _HEADER.size + 12 * sequences + 8 * documents
        if size not in (expected, expected + sequences) or documents < 1:  # with modes or without
            raise UserError(self._torn(self.idx, size, expected))
        return np.dtype(DTYPES[code]).newbyteorder("<"), sequences, documents

    def _check_index(self, sequences: int) -> None:
        whole = self._documents[0] == 0 and self._documents[-1] == sequences
        if sequences:
            end = int(self._pointers[-1]) + int(self._lengths[-1]) * self.dtype.itemsize
            whole = whole and self._pointers[0] == 0 and end == self.tokens * self.dtype.itemsize
        if not whole:
            raise UserError(f"{self.idx} contradicts itself: prepare the set anew")

    @staticmethod
    def _torn(path: Path, size: int, expected: int) -> str:
        return f"{path} has {size:,} bytes, but its index says {expected:,}: copy or prepare the set anew"

    def check(self) -> None:
        """Raise UserError if a file vanished, was replaced or changed its size since it was opened."""
        for path, known in self._identity.items():
            now = _identity(path)
            if now[2] != known[2]:
                raise UserError(
                    f"{path} went from {known[2]:,} to {now[2]:,} bytes while it was read: restore it and "
                    "start again"
                )
            if now != known:
                raise UserError(f"{path} was replaced while it was read: start again")

    def __len__(self) -> int:
        return self.tokens

    def read(self, first: int, last: int) -> np.ndarray:
        """Tokens ``[last - first]`` from position ``first`` on, a read-only view of the mapped file."""
        self.check()
        return self._data[first:last]

    def start(self, document: int) -> int:
        """Position of the first token of ``document``; of the document after the last: all tokens."""
        sequence = int(self._documents[document])
        if sequence == len(self._pointers):
            return self.tokens
        return int(self._pointers[sequence]) // self.dtype.itemsize

    def document_at(self, position: int) -> int:
        """The first document that begins at ``position`` or after it."""
        # A search that looks at single entries keeps the index of a large set on the disk.
        return bisect_left(range(self.documents), position, key=self.start)

    def document_starts(self, first: int, last: int) -> np.ndarray:
        """Positions in ``[first, last)`` at which a document with tokens begins, int64 ``[documents]``."""
        self.check()
        inside = range(self.document_at(first), self.document_at(last))
        starts = np.array([self.start(document) for document in inside], dtype=np.int64)
        return np.unique(starts)  # an empty document begins where the next one does


def _mapped(path: Path, kind: str, count: int, offset: int) -> np.ndarray:
    if count == 0:  # nothing cannot be mapped
        return np.empty(0, dtype=kind)
    return np.memmap(path, dtype=kind, mode="r", offset=offset, shape=(count,))


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError as error:
        raise UserError(
            f"{path} cannot be read: {error.strerror}: a prepared set has a .bin and an .idx file"
        ) from None


def _identity(path: Path) -> tuple[int, int, int]:
    """Device, file number and size."""
    try:
        now = path.stat()
    except OSError as error:
        raise UserError(
            f"{path} vanished while it was read ({error.strerror}): restore it and start again"
        ) from None
    return now.st_dev, now.st_ino, now.st_size
