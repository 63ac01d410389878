"""The texts of an input, one after the other in bounded memory. Damage is an item of its own."""

import codecs
import io
import json
import re
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO

from flashtrain.data.extra import require
from flashtrain.data.inputs import COMPRESSED, Piece
from flashtrain.errors import UserError

MAX_LINE = 256 << 20  # bytes; a longer line is damage, since a line must fit into memory
_BLOCK = 1 << 20
_CUT = re.compile(r"(?<=\S\n)(?=\S)")


@dataclass(frozen=True, slots=True)
class Text:
    """Text of the document in line or row ``line`` (from 1 in the piece); ``ends`` it, or goes on."""

    line: int
    text: str
    ends: bool = True


@dataclass(frozen=True, slots=True)
class Damage:
    """Line or row ``line`` cannot be used; what came of the same document before it is void."""

    line: int
    reason: str


class Reader:
    """Iterates over the items of one piece.

    ``lines`` counts the lines or rows that it began. ``field`` names the text in JSON objects and Parquet.
    Raises UserError for a file that vanished or cannot be read.
    """

    def __init__(self, piece: Piece, field: str) -> None:
        self.piece, self.field, self.lines = piece, field, 0
        self._position: Callable[[], int] = lambda: 0

    def consumed(self) -> int:
        """Bytes of input read so far, at most the piece's size."""
        return min(self.piece.size, self._position())

    def __iter__(self) -> Iterator[Text | Damage]:
        read = {"text": self._text, "jsonl": self._json_lines, "parquet": self._parquet}[self.piece.kind]
        try:
            yield from read()
        except OSError as error:
            raise UserError(f"input {self.piece.path} cannot be read: {error.strerror or error}") from None

    def _open(self) -> BinaryIO:
        raw = open(self.piece.path, "rb", buffering=_BLOCK)  # noqa: SIM115  closed with what is returned
        raw.seek(self.piece.first)
        self._position = lambda: 0 if raw.closed else raw.tell() - self.piece.first
        if self.piece.path.endswith(".gz"):
            return io.BufferedReader(_Stream(raw, _gzip_member), _BLOCK)
        if self.piece.path.endswith(".zst"):
            frame = require("zstandard").ZstdDecompressor().decompressobj
            return io.BufferedReader(_Stream(raw, frame), _BLOCK)
        return raw

    def _text(self) -> Iterator[Text | Damage]:
        """The file as one document, in texts of about a mebibyte."""
        decoder, rest, self.lines = codecs.getincrementaldecoder("utf-8")(), "", 1
        with self._open() as stream:
            while True:
                try:
                    block = stream.read(_BLOCK)
                    rest += decoder.decode(block, final=not block)
                except UnicodeDecodeError as error:
                    before = rest.count("\n") + error.object[: error.start].count(b"\n")
                    yield Damage(self.lines + before, "invalid UTF-8")
                    return
                except _Broken as error:
                    yield Damage(self.lines + rest.count("\n"), str(error))
                    return
                cut = _cut(rest) if block else len(rest)
                if cut or not block:
                    yield Text(1, rest[:cut], ends=not block)
                    self.lines += rest.count("\n", 0, cut)
                    rest = rest[cut:]
                if not block:
                    return

    def _json_lines(self) -> Iterator[Text | Damage]:
        with self._open() as stream:
            if self.piece.first:  # the line that holds the byte before belongs to the piece before
                stream.seek(self.piece.first - 1)
                self._skip_line(stream)
            # Positions in a compressed stream are those of its text, and the piece is the whole file.
            last = None if self.piece.path.endswith(COMPRESSED) else self.piece.last
            while last is None or stream.tell() < last:
                try:
                    line = stream.readline(MAX_LINE)
                    if not line:
                        return
                    self.lines += 1
                    if len(line) == MAX_LINE and not line.endswith(b"\n"):
                        self._skip_line(stream)
                        yield Damage(self.lines, f"the line is longer than {MAX_LINE >> 20} MiB")
                        continue
                except _Broken as error:
                    self.lines += 1
                    yield Damage(self.lines, str(error))
                    return
                if line.strip():
                    yield self._record(line)

    @staticmethod
    def _skip_line(stream: BinaryIO) -> None:
        while (part := stream.readline(_BLOCK)) and not part.endswith(b"\n"):
            pass

    def _record(self, line: bytes) -> Text | Damage:
        try:
            record = json.loads(line.decode("utf-8"))
        except UnicodeDecodeError:
            return Damage(self.lines, "invalid UTF-8")
        except (ValueError, RecursionError) as error:
            return Damage(self.lines, f"not valid JSON: {error}")
        if not isinstance(record, dict):
            return Damage(self.lines, "no JSON object")
        return self._checked(record.get(self.field, _MISSING))

    def _checked(self, text: Any) -> Text | Damage:
        if text is _MISSING:
            return Damage(self.lines, f"no field {self.field!r}")
        try:
            if isinstance(text, bytes):
                text = text.decode("utf-8")
            if isinstance(text, str):
                text.encode("utf-8")
        except UnicodeDecodeError:
            return Damage(self.lines, "invalid UTF-8")
        except UnicodeEncodeError:
            return Damage(self.lines, f"field {self.field!r} holds half of a surrogate pair")
        if not isinstance(text, str):
            return Damage(self.lines, f"field {self.field!r} is no text but {type(text).__name__}")
        return Text(self.lines, text)

    def _parquet(self) -> Iterator[Text | Damage]:
        parquet, arrow = require("pyarrow.parquet"), require("pyarrow")
        broken = (OSError, arrow.ArrowException)
        with open(self.piece.path, "rb") as raw:
            try:
                file = parquet.ParquetFile(raw, page_checksum_verification=True)
                names = file.schema_arrow.names
            except broken as error:
                yield Damage(1, f"no readable Parquet file: {_line(error)}")
                return
            if self.field not in names:
                yield Damage(1, f"no column {self.field!r}; it has {', '.join(names)}")
                return
            rows = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
            for group in range(self.piece.first, self.piece.last):
                end = self.lines + rows[group]
                try:
                    for batch in file.iter_batches(256, row_groups=[group], columns=[self.field]):
                        for text in _values(batch.column(0), arrow):
                            self.lines += 1
                            yield self._checked(text)
                        self._position = self._share(self.lines, rows)
                except broken as error:
                    lost = end - self.lines
                    yield Damage(
                        self.lines + 1, f"row group {group} is damaged, {lost} rows lost: {_line(error)}"
                    )
                self.lines = end

    def _share(self, row: int, rows: list[int]) -> Callable[[], int]:
        mine = max(1, sum(rows[self.piece.first : self.piece.last]))
        return lambda: self.piece.size * row // mine


def line_before(piece: Piece) -> int:
    """Lines or rows of the file that come before those of ``piece``. Reads the file up to it."""
    if piece.first == 0:
        return 0
    if piece.kind == "parquet":
        metadata = require("pyarrow.parquet").read_metadata(piece.path)
        return sum(metadata.row_group(group).num_rows for group in range(piece.first))
    count, left = 0, piece.first - 1
    with open(piece.path, "rb") as stream:
        while left > 0 and (block := stream.read(min(_BLOCK, left))):
            count, left = count + block.count(b"\n"), left - len(block)
    return count + 1


_MISSING = object()


class _Broken(ValueError):
    """A compressed stream is damaged or ends too early."""


class _Stream(io.RawIOBase):
    """Decompresses members or frames one after the other.

    The stream readers of zstandard take an early end of the file for the end of the data.
    """

    def __init__(self, raw: BinaryIO, member: Callable[[], Any]) -> None:
        self._raw, self._member = raw, member
        self._current: Any = None
        self._text, self._offset = b"", 0

    def readable(self) -> bool:
        return True

    def close(self) -> None:
        self._raw.close()
        super().close()

    def readinto(self, buffer: Any) -> int:
        while self._offset == len(self._text):
            if not self._more():
                return 0
        part = self._text[self._offset : self._offset + len(buffer)]
        buffer[: len(part)] = part
        self._offset += len(part)
        return len(part)

    def _more(self) -> bool:
        """Decompress the next block; False at the end.

        A block is small, since its text may be a thousand times as long.
        """
        if self._current is not None and self._current.eof:
            # gzip pads with zeros, and neither kind of member begins with one.
            block, self._current = self._current.unused_data.lstrip(b"\0"), None
            block = block or self._raw.read(1 << 14)
        else:
            block = self._raw.read(1 << 14)
        if not block:
            if self._current is not None:
                raise _Broken("the compressed file is truncated")
            return False
        self._current = self._current or self._member()
        try:
            self._text, self._offset = self._current.decompress(block), 0
        except Exception as error:  # zlib.error, and ZstdError of a package that may be missing
            raise _Broken(f"the compressed file is damaged: {_line(error)}") from None
        return True


def _gzip_member() -> Any:
    return zlib.decompressobj(wbits=zlib.MAX_WBITS | 16)


def _cut(text: str) -> int:
    """Where to cut off the start of a long text so that the cut changes no token; 0: not yet.

    That is between a line end and a character that is not white space: the usual patterns that split text
    before BPE split there as well. A text without such a place is cut anywhere.
    """
    for found in _CUT.finditer(text, max(0, len(text) - (_BLOCK >> 2))):
        return found.start()
    return len(text) if len(text) >= 4 * _BLOCK else 0


def _values(column: Any, arrow: Any) -> list[Any]:
    """The column's values; text as bytes, since Parquet writers do not check that it is UTF-8."""
    if arrow.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if arrow.types.is_string(column.type):
        column = column.cast(arrow.binary())
    elif arrow.types.is_large_string(column.type):
        column = column.cast(arrow.large_binary())
    return column.to_pylist()


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())
