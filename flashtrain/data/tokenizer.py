"""Text to token ids and back."""

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from flashtrain.data import durable
from flashtrain.data.extra import require
from flashtrain.errors import UserError

BYTES = "bytes"
TOKENIZER, TOKENIZER_CONFIG = "tokenizer.json", "tokenizer_config.json"
# What published vocabularies call the end of a document; used where no tokenizer_config.json says it.
_BOUNDARIES = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>")


class Tokenizer(Protocol):
    """What a corpus and a sampling loop ask of a tokenizer.

    ``boundary`` is the id that stands between two documents; no text may encode to it. ``identity``
    differs between two tokenizers that may give different ids.
    """

    @property
    def vocab_size(self) -> int: ...

    @property
    def boundary(self) -> int: ...

    @property
    def identity(self) -> str: ...

    def encode(self, text: str | bytes) -> list[int]: ...

    def encode_array(self, text: str | bytes) -> np.ndarray:
        """As ``encode``, as a 1-D integer array: a list costs eight bytes or more for each token."""
        ...

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """``encode_array`` of each text, in one call."""
        ...

    def decode(self, ids: Iterable[int]) -> str: ...

    def save(self, folder: Path) -> None:
        """Write into ``folder`` what ``load_tokenizer(folder)`` needs; of ByteTokenizer that is nothing."""
        ...


class ByteTokenizer:
    """One token a byte of UTF-8; id 0, which occurs in no text, is the document boundary."""

    vocab_size: int = 256
    boundary: int = 0
    identity: str = BYTES

    def encode(self, text: str | bytes) -> list[int]:
        """Token ids of ``text``, each in [0, 256)."""
        return list(_bytes(text))

    def encode_array(self, text: str | bytes) -> np.ndarray:
        """Token ids of ``text`` as uint8 ``[tokens]``, a read-only view of its bytes."""
        return np.frombuffer(_bytes(text), dtype=np.uint8)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Token ids of each text as uint8 ``[tokens]``."""
        return [self.encode_array(text) for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ``ids``; bytes that are no UTF-8 become U+FFFD, so every list of ids has a text.

        Raises ValueError for an id outside [0, 256).
        """
        return bytes(int(token) for token in ids).decode("utf-8", errors="replace")

    def save(self, folder: Path) -> None:
        """Nothing: bytes need no vocabulary."""


class JsonTokenizer:
    """A tokenizer.json of the ``tokenizers`` library, such as Hugging Face models carry.

    ``place`` is the file, or a folder that holds it. Special tokens are not added to a text, and their
    names inside a text are text: only ``boundary`` separates documents. Truncation and padding that the
    file asks for are off. The boundary is the token called ``boundary``, else the ``eos_token`` of a
    tokenizer_config.json beside the file, else the one well-known name that the vocabulary has.

    Raises UserError for a missing or damaged file, and for a boundary that is missing, ambiguous, or
    that text could encode to.
    """

    def __init__(self, place: Path, boundary: str | None = None) -> None:
        tokenizers = require("tokenizers")
        self.path = place / TOKENIZER if place.is_dir() else place
        self._text = _read(self.path)
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(self._text)
        except Exception as error:  # the library raises nothing narrower
            reason = " ".join(str(error).split())
            raise UserError(f"{self.path} is no tokenizer.json: {reason}") from None
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = True
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        if not vocabulary:
            raise UserError(f"{self.path} has no tokens: give another {TOKENIZER}")
        self.vocab_size = max(vocabulary.values()) + 1  # ids may have gaps
        self._config = self._read_config()
        self.boundary_name = boundary or _eos(self._config) or self._well_known(vocabulary)
        if self.boundary_name not in vocabulary:
            raise UserError(
                f"{self.path} has no token {self.boundary_name!r} to end documents with: name one of its own"
            )
        self.boundary = int(vocabulary[self.boundary_name])
        if self.boundary in self.encode(self.boundary_name):
            raise UserError(
                f"{self.path}: text can encode to {self.boundary_name!r}, so it cannot end documents: name a "
                "special token"
            )

    @property
    def identity(self) -> str:
        digest = hashlib.sha256(self._text.encode("utf-8")).hexdigest()
        return f"{digest} {self.boundary_name}"

    def encode(self, text: str | bytes) -> list[int]:
        """Token ids of ``text``, without special tokens. Raises UnicodeDecodeError if it is no UTF-8."""
        text = text.decode("utf-8") if isinstance(text, bytes) else text
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def encode_array(self, text: str | bytes) -> np.ndarray:
        """Token ids of ``text`` as int32 ``[tokens]``."""
        return np.array(self.encode(text), dtype=np.int32)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Token ids of each text as int32 ``[tokens]``; on as many threads as the library is allowed."""
        encoded = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(encoding.ids, dtype=np.int32) for encoding in encoded]

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ``ids``; special tokens and ids outside the vocabulary have none."""
        return self._tokenizer.decode([int(token) for token in ids], skip_special_tokens=True)

    def save(self, folder: Path) -> None:
        """Write tokenizer.json as it was read, and tokenizer_config.json with the boundary as eos_token.

        transformers loads such a folder with ``AutoTokenizer``.
        """
        config = {"tokenizer_class": "PreTrainedTokenizerFast", **self._config}
        if _eos(config) != self.boundary_name:
            config["eos_token"] = self.boundary_name
        durable.write(folder / TOKENIZER_CONFIG, json.dumps(config, indent=2) + "\n")
        durable.write(folder / TOKENIZER, self._text)

    def _read_config(self) -> dict[str, Any]:
        path = self.path.with_name(TOKENIZER_CONFIG)
        if not path.is_file():
            return {}
        try:
            config = json.loads(_read(path))
        except ValueError as error:
            raise UserError(f"{path} is not valid JSON: {error}") from None
        if not isinstance(config, dict):
            raise UserError(f"{path} holds no JSON object: mend or remove it")
        return config

    def _well_known(self, vocabulary: dict[str, int]) -> str:
        found = [name for name in _BOUNDARIES if name in vocabulary]
        if len(found) != 1:
            what = f"has {' and '.join(found)}" if found else f"has none of {', '.join(_BOUNDARIES)}"
            raise UserError(
                f"{self.path} {what}, and no {TOKENIZER_CONFIG} beside it names an eos_token: say which "
                "token ends documents (flashtrain data prepare --boundary TOKEN)"
            )
        return found[0]


def load_tokenizer(name: str | Path, boundary: str | None = None) -> Tokenizer:
    """The tokenizer that ``name`` means: "bytes", or the path of a tokenizer.json or of its folder.

    Raises UserError as JsonTokenizer does, and for a ``boundary`` beside "bytes", whose boundary is 0.
    """
    if str(name) != BYTES:
        return JsonTokenizer(Path(name), boundary)
    if boundary is not None:
        raise UserError(f"the tokenizer {BYTES} ends documents with byte 0: leave out {boundary!r}")
    return ByteTokenizer()


def keep_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Save ``tokenizer`` into the folder of a run, unless it is there.

    Raises UserError if the folder holds another one: its checkpoints mean other words by the same ids.
    """
    held = load_tokenizer(folder if (folder / TOKENIZER).is_file() else BYTES)
    if held.identity == tokenizer.identity:
        return
    if held.identity != BYTES:
        raise UserError(f"{folder / TOKENIZER} is not the tokenizer of the data: choose another folder")
    tokenizer.save(folder)


def _eos(config: dict[str, Any]) -> str | None:
    """The eos_token of a tokenizer_config.json, which writes it as a string or as an object."""
    token = config.get("eos_token")
    token = token.get("content") if isinstance(token, dict) else token
    return token if isinstance(token, str) else None


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"tokenizer {path} cannot be read: {error.strerror}: give a {TOKENIZER}") from None
    except UnicodeDecodeError:
        raise UserError(f"tokenizer {path} is no text: give a {TOKENIZER}") from None


def _bytes(text: str | bytes) -> bytes:
    return text.encode("utf-8") if isinstance(text, str) else text
