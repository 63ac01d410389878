"""Text to token ids and back."""

from collections.abc import Iterable
from typing import Protocol

import numpy as np


class Tokenizer(Protocol):
    """What a corpus and a sampling loop ask of a tokenizer.

    ``boundary`` is the id that stands between two documents; no text may encode to it.
    """

    @property
    def vocab_size(self) -> int: ...

    @property
    def boundary(self) -> int: ...

    def encode(self, text: str | bytes) -> list[int]: ...

    def encode_array(self, text: str | bytes) -> np.ndarray:
        """As ``encode``, as a 1-D integer array: a list costs eight bytes or more for each token."""
        ...

    def decode(self, ids: Iterable[int]) -> str: ...


class ByteTokenizer:
    """One token a byte of UTF-8; id 0, which occurs in no text, is the document boundary."""

    vocab_size: int = 256
    boundary: int = 0

    def encode(self, text: str | bytes) -> list[int]:
        """Token ids of ``text``, each in [0, 256)."""
        return list(_bytes(text))

    def encode_array(self, text: str | bytes) -> np.ndarray:
        """Token ids of ``text`` as uint8 ``[tokens]``, a read-only view of its bytes."""
        return np.frombuffer(_bytes(text), dtype=np.uint8)

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ``ids``; bytes that are no UTF-8 become U+FFFD, so every list of ids has a text.

        Raises ValueError for an id outside [0, 256).
        """
        return bytes(int(token) for token in ids).decode("utf-8", errors="replace")


def _bytes(text: str | bytes) -> bytes:
    return text.encode("utf-8") if isinstance(text, str) else text
