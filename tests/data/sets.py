"""Small inputs, tokenizers and prepared sets."""

import json
from collections.abc import Sequence
from pathlib import Path

from flashtrain.data.vocabulary import train_tokenizer
from tests.train.runs import hash_word


def texts(count: int, first: int = 0) -> list[str]:
    """Documents of a few lines that are the same everywhere, some with characters of several bytes."""
    return [
        "\n".join(f"{hash_word(n * 31 + line)} é {n}: {hash_word(n)}" for line in range(n % 7 + 1)) + "\n"
        for n in range(first, first + count)
    ]


def write_jsonl(path: Path, documents: Sequence[str]) -> Path:
    """One document a line."""
    path.write_text("".join(json.dumps({"id": n, "text": t}) + "\n" for n, t in enumerate(documents)))
    return path


def make_tokenizer(folder: Path, vocab_size: int = 400) -> Path:
    """A trained tokenizer in ``folder / "tokenizer"``."""
    source = write_jsonl(folder / "for_tokenizer.jsonl", texts(200))
    train_tokenizer([str(source)], folder / "tokenizer", vocab_size)
    return folder / "tokenizer"
