"""The tokens of one shard, durable on the disk: what a killed preparation has not to do again."""

import json
import os
from array import array
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from flashtrain.data import durable
from flashtrain.data.indexed import MAX_LENGTH, token_type
from flashtrain.data.inputs import Shard
from flashtrain.data.records import Damage, Reader, Text, line_before
from flashtrain.data.tokenizer import Tokenizer
from flashtrain.errors import UserError

Damaged = Literal["skip", "refuse"]

# A batch of texts that goes to the tokenizer in one call.
_BATCH_TEXTS, _BATCH_CHARACTERS = 512, 1 << 20


@dataclass(frozen=True)
class Stretch:
    """What reading one piece gave: its lines or rows, and the damaged ones, counted from 1 in the piece."""

    path: str
    lines: int
    damaged: list[tuple[int, str]]


@dataclass(frozen=True)
class Part:
    """A shard's tokens in ``KEY.bin`` and the int32 lengths of its documents in ``KEY.lengths``.

    ``KEY.json`` holds the rest and is written last: a part without it does not exist. ``empty`` counts
    documents without any token, which are left out.
    """

    documents: int
    tokens: int
    empty: int
    stretches: list[Stretch]


def load(folder: Path, key: str) -> Part | None:
    """The part called ``key``, or None if it is not, or not wholly, there."""
    try:
        said = json.loads((folder / f"{key}.json").read_text(encoding="utf-8"))
        stretches = [
            Stretch(s["path"], s["lines"], [(line, reason) for line, reason in s["damaged"]])
            for s in said.pop("stretches")
        ]
        itemsize = said.pop("itemsize")
        part = Part(**said, stretches=stretches)
        sizes = [(folder / f"{key}{suffix}").stat().st_size for suffix in (".bin", ".lengths")]
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None
    return part if sizes == [part.tokens * itemsize, part.documents * 4] else None


def make(
    shard: Shard,
    key: str,
    folder: Path,
    tokenizer: Tokenizer,
    field: str,
    damaged: Damaged,
    advance: Callable[[int], None],
) -> Part:
    """Tokenize ``shard`` into the part ``key`` of ``folder`` and make it durable.

    ``advance`` is told the bytes of input as they are read. Raises UserError at the first damaged record
    if ``damaged`` is "refuse", and then leaves no part.
    """
    kind = np.dtype(token_type(tokenizer.vocab_size)).newbyteorder("<")
    writer = _Writer(folder / f"{key}.bin", kind, tokenizer)
    stretches = []
    with writer.stream:
        for piece in shard.pieces:
            reader, seen, found = Reader(piece, field), 0, list[tuple[int, str]]()
            for batch in _batches(reader):
                for item in writer.add(batch):
                    if damaged == "refuse":
                        line = line_before(piece) + item.line
                        raise UserError(refusal(f"{piece.path}:{line}: {item.reason}"))
                    found.append((item.line, item.reason))
                advance(reader.consumed() - seen)
                seen = reader.consumed()
            advance(piece.size - seen)
            stretches.append(Stretch(piece.path, reader.lines, found))
        durable.sync(writer.stream)
    part = Part(len(writer.lengths), sum(writer.lengths), writer.empty, stretches)
    with (folder / f"{key}.lengths").open("wb") as stream:
        np.array(writer.lengths, dtype="<i4").tofile(stream)
        durable.sync(stream)
    durable.write(folder / f"{key}.json", json.dumps({**asdict(part), "itemsize": kind.itemsize}))
    return part


def refusal(damage: str) -> str:
    """The message for a damaged record that is not to be skipped."""
    return f"{damage}: mend it, or leave such records out with --damaged skip"


class _Writer:
    """Appends documents to a file of tokens; each ends with the boundary."""

    def __init__(self, path: Path, kind: np.dtype, tokenizer: Tokenizer) -> None:
        self.stream = path.open("wb")
        self.lengths, self.empty = array("i"), 0
        self._kind, self._tokenizer = kind, tokenizer
        self._open, self._void = 0, False  # tokens of an unfinished document; whether its rest is left out

    def add(self, items: list[Text | Damage]) -> Iterator[Damage]:
        """Write texts, and yield damage: what came so, and texts that hold the boundary."""
        texts = [item.text for item in items if isinstance(item, Text)]
        encoded = iter(self._tokenizer.encode_batch(texts))
        for item in items:
            if isinstance(item, Damage):
                self._drop(void=False)
                yield item
                continue
            tokens = next(encoded)
            if self._void:
                self._void = not item.ends
            elif (tokens == self._tokenizer.boundary).any():
                self._drop(void=not item.ends)
                yield Damage(item.line, "the text holds the token that ends documents")
            else:
                self.stream.write(tokens.astype(self._kind).tobytes())
                self._open += len(tokens)
                if item.ends:
                    self._end()

    def _end(self) -> None:
        if self._open == 0:
            self.empty += 1
            return
        self.stream.write(np.array([self._tokenizer.boundary], dtype=self._kind).tobytes())
        if self._open + 1 > MAX_LENGTH:
            raise UserError(f"a document of {self._open:,} tokens is too long for the format: split the file")
        self.lengths.append(self._open + 1)
        self._open = 0

    def _drop(self, void: bool) -> None:
        """Take back what was written of an unfinished document."""
        self._void = void
        if self._open:
            self.stream.seek(-self._open * self._kind.itemsize, os.SEEK_CUR)
            self.stream.truncate()
            self._open = 0


def _batches(items: Iterable[Text | Damage]) -> Iterator[list[Text | Damage]]:
    batch: list[Text | Damage] = []
    characters = 0
    for item in items:
        batch.append(item)
        characters += len(item.text) if isinstance(item, Text) else 0
        if len(batch) == _BATCH_TEXTS or characters >= _BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch
