"""Training of byte-level BPE tokenizers on the inputs that ``prepare`` reads."""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from flashtrain.data import durable, inputs
from flashtrain.data.extra import require
from flashtrain.data.parts import Damaged, refusal
from flashtrain.data.records import Damage, Reader, line_before
from flashtrain.data.tokenizer import TOKENIZER, TOKENIZER_CONFIG
from flashtrain.errors import UserError

BOUNDARY = "<|endoftext|>"
_SMALLEST = 257  # every byte, and the boundary
_LARGEST = 1 << 24  # the library makes room for all of them before it reads any text


@dataclass
class Trained:
    """Tokens of the vocabulary, and the records left out, each as "file:line: reason"."""

    vocab_size: int = 0
    damaged: list[str] = field(default_factory=list)


def train_tokenizer(
    sources: Sequence[str],
    out: Path,
    vocab_size: int,
    *,
    field: str = "text",
    damaged: Damaged = "refuse",
    advance: Callable[[int, int], None] = lambda done, total: None,
) -> Trained:
    """Train a byte-level BPE of at most ``vocab_size`` tokens and write tokenizer.json into ``out``.

    Token 0 is ``<|endoftext|>``, the boundary of documents. A tokenizer_config.json stands beside it, so
    transformers loads the folder. The same inputs give the same file. Text is read as a stream; memory
    holds its distinct words. ``advance`` is told the bytes of input done and in all.

    Raises UserError for bad inputs, a vocabulary of less than 257, a folder that holds a tokenizer, and a
    damaged record if ``damaged`` is "refuse"; OSError if ``out`` cannot be written.
    """
    if vocab_size < _SMALLEST:
        raise UserError(f"vocab-size is {vocab_size}; {_SMALLEST} is the least: all bytes and a boundary")
    if vocab_size > _LARGEST:
        raise UserError(f"vocab-size is {vocab_size}; {_LARGEST} is the most")
    if (out / TOKENIZER).exists():
        raise UserError(f"{out / TOKENIZER} exists: choose another folder")
    tokenizers = require("tokenizers")
    pieces = [piece for shard in inputs.shards(inputs.find(sources)) for piece in shard.pieces]
    result = Trained()

    def texts() -> Iterator[str]:
        total, before = sum(piece.size for piece in pieces), 0
        for piece in pieces:
            reader = Reader(piece, field)
            for item in reader:
                if isinstance(item, Damage):
                    # Of a file's earlier pieces the lines are counted again: damage is rare.
                    name = f"{piece.path}:{line_before(piece) + item.line}: {item.reason}"
                    if damaged == "refuse":
                        raise UserError(refusal(name))
                    result.damaged.append(name)
                else:
                    yield item.text
                advance(before + reader.consumed(), total)
            before += piece.size

    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = tokenizers.decoders.ByteLevel()
    model.train_from_iterator(
        texts(),
        tokenizers.trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[BOUNDARY],
            initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    result.vocab_size = model.get_vocab_size()
    if result.vocab_size == _SMALLEST:
        raise UserError(f"{', '.join(sources)}: no text to learn a vocabulary from")
    out.mkdir(parents=True, exist_ok=True)
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": BOUNDARY}
    durable.write(out / TOKENIZER_CONFIG, json.dumps(config, indent=2) + "\n")
    durable.write(out / TOKENIZER, model.to_str(pretty=True))
    return result
