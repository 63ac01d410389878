"""Where a run's samples come from: text that is encoded at the start, or prepared sets on the disk."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

from flashtrain.data.blend import Blend, quotas
from flashtrain.data.corpus import Corpus, unigram_entropy
from flashtrain.data.indexed import TokenFile
from flashtrain.data.prepare import TOKENS, read_summary
from flashtrain.data.sampler import Windows, evaluation_windows
from flashtrain.data.tokenizer import BYTES, ByteTokenizer, Tokenizer, load_tokenizer
from flashtrain.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor


class Samples(Protocol):
    """An endless row of samples, each a pure function of its number."""

    def batch(self, first_index: int, count: int) -> tuple["Tensor", "Tensor"]:
        """Samples from ``first_index`` on as int64 inputs and targets ``[count, length]``."""
        ...


@dataclass(frozen=True)
class HeldOut:
    """What a held-out loss is taken on: windows, int64 ``[windows, length]``, and a yardstick for it."""

    inputs: "Tensor"
    targets: "Tensor"
    unigram_entropy: float


class Source(Protocol):
    """What a run asks of its data. Each call may raise UserError for too little text."""

    @property
    def tokenizer(self) -> Tokenizer: ...

    def samples(self, length: int, seed: int) -> Samples: ...

    def check_boundaries(self) -> None:
        """Raise UserError if documents do not end with the tokenizer's boundary."""
        ...

    def held_out(self, length: int, count: int) -> HeldOut:
        """At most ``count`` windows that are not trained on."""
        ...

    def describe(self) -> str: ...


class TextData:
    """A Corpus of bytes, encoded into memory."""

    def __init__(self, config: Corpus.Config) -> None:
        self.tokenizer: Tokenizer = ByteTokenizer()
        self._corpus = Corpus(config, self.tokenizer)

    def samples(self, length: int, seed: int) -> Windows:
        """Windows of the train split."""
        return Windows(self._corpus.split("train"), length, seed)

    def check_boundaries(self) -> None:
        """The corpus joins its documents with it."""

    def held_out(self, length: int, count: int) -> HeldOut:
        """Windows of the held-out split, and the entropy of all of it."""
        tokens = self._corpus.split("held_out")
        return HeldOut(*evaluation_windows(tokens, length, count), unigram_entropy(tokens))

    def describe(self) -> str:
        """Files and bytes of both splits."""
        return str(self._corpus.describe())


class Tokens:
    """Positions ``first`` to ``last`` of a TokenFile, as an array that is read by slices."""

    ndim = 1

    def __init__(self, file: TokenFile, first: int, last: int, vocab_size: int) -> None:
        self.file, self.first, self.last, self.vocab_size = file, first, last, vocab_size
        self.dtype = file.dtype

    def __len__(self) -> int:
        return self.last - self.first

    def __getitem__(self, where: slice) -> np.ndarray:
        start, stop, _ = where.indices(len(self))
        tokens = self.file.read(self.first + start, self.first + stop)
        # A GPU answers an id outside the embedding with an assertion that names nothing.
        if len(tokens) and not 0 <= tokens.min() <= tokens.max() < self.vocab_size:
            raise UserError(
                f"{self.file.bin} holds token {tokens.max()}, but its tokenizer has {self.vocab_size}: set "
                "data.tokenizer to the one that made it"
            )
        return tokens

    def document_starts(self, first: int, last: int) -> np.ndarray:
        """Positions in ``[first, last)`` at which a document begins, int64 ``[documents]``."""
        return self.file.document_starts(self.first + first, self.first + last) - self.first


class PreparedData:
    """Sets that ``flashtrain data prepare`` or Megatron made, blended by weight and mapped into memory.

    Of each set the documents at its end are held out: the last ``held_out`` share of its tokens, from the
    next document on. Documents are packed: a window takes up where the set's order cuts it, and a boundary
    token stands between two documents (``Blend.document_starts`` says where they begin).

    Raises UserError for a set that is missing or damaged, for sets of different tokenizers, for weights
    that do not fit, and for a set of which nothing is left to train on or to hold out.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """``sets``: folders of prepared sets, or paths of .bin/.idx files without their endings.

        ``weights``: each set's share of the samples, in any unit; none: by its tokens. ``tokenizer``: a
        tokenizer.json, a folder with one, or "bytes"; empty: the sets' own. ``held_out``: share of every
        set that is not trained on, in (0, 1).
        """

        sets: tuple[str, ...]
        weights: tuple[float, ...] = ()
        tokenizer: str = ""
        held_out: float = 0.05

    def __init__(self, config: Config) -> None:
        self.config = config
        if not config.sets:
            raise UserError("data.sets is empty: name a prepared set")
        if not 0.0 < config.held_out < 1.0:
            raise UserError(
                f"data.held_out is {config.held_out}: give the share to hold out, between 0 and 1"
            )
        if config.weights and len(config.weights) != len(config.sets):
            raise UserError(
                f"data.weights holds {len(config.weights)} for {len(config.sets)} data.sets: give one each"
            )
        chosen = _tokenizer_name(config)
        self.tokenizer = load_tokenizer(chosen)
        for name in config.sets:
            own = _own_tokenizer(name)
            if own is not None and load_tokenizer(own).identity != self.tokenizer.identity:
                raise UserError(f"set {name} was made with another tokenizer than {chosen}: prepare it anew")
        self.files = [TokenFile(_prefix(name)) for name in config.sets]
        cuts = [self._cut(file) for file in self.files]
        size = self.tokenizer.vocab_size
        self._train = [Tokens(f, 0, cut, size) for f, cut in zip(self.files, cuts, strict=True)]
        self._held_out = [Tokens(f, cut, len(f), size) for f, cut in zip(self.files, cuts, strict=True)]
        self.weights: Sequence[float] = config.weights or [len(tokens) for tokens in self._train]

    def samples(self, length: int, seed: int) -> Blend:
        """Windows of all sets, blended."""
        return Blend(self._train, self.config.sets, self.weights, length, seed)

    def check_boundaries(self) -> None:
        """Look at the first document of each set: Megatron's tools write the boundary only if asked to."""
        for file in self.files:
            end = file.start(1)
            if end == 0 or file.read(end - 1, end)[0] != self.tokenizer.boundary:
                raise UserError(
                    f"documents of {file.prefix} do not end with the tokenizer's boundary, token "
                    f"{self.tokenizer.boundary}: prepare it with --append-eod, or without train.document_mask"
                )

    def held_out(self, length: int, count: int) -> HeldOut:
        """Windows of all sets' held-out ends, shared out by weight, and the entropy of their tokens."""
        counts = quotas(self.weights, self.config.sets, count)
        parts = [
            evaluation_windows(tokens, length, share)
            for tokens, share in zip(self._held_out, counts, strict=True)
            if share
        ]
        import torch

        inputs, targets = (torch.cat(side) for side in zip(*parts, strict=True))
        return HeldOut(inputs, targets, unigram_entropy(targets.flatten().numpy()))

    def describe(self) -> str:
        """Tokens, documents and share of each set."""
        shares = np.array(self.weights, dtype=np.float64) / sum(self.weights)
        return "; ".join(
            f"{name}: {file.tokens:,} tokens in {file.documents:,} documents, {share:.1%} of the samples"
            for name, file, share in zip(self.config.sets, self.files, shares, strict=True)
        )

    def _cut(self, file: TokenFile) -> int:
        cut = file.start(file.document_at(int(file.tokens * (1.0 - self.config.held_out))))
        if not 0 < cut < file.tokens:
            raise UserError(
                f"{file.prefix} with its {file.documents:,} documents cannot be split at data.held_out "
                f"{self.config.held_out}: change it or prepare more documents"
            )
        return cut


def resolved(config: Corpus.Config | PreparedData.Config) -> Corpus.Config | PreparedData.Config:
    """``config`` with the tokenizer named, so that a checkpoint's config says what its ids mean.

    Raises UserError if the sets do not say it.
    """
    if isinstance(config, Corpus.Config):
        return config
    return replace(config, tokenizer=_tokenizer_name(config))


def open_source(config: Corpus.Config | PreparedData.Config) -> Source:
    """The data that ``config`` means. Raises UserError as Corpus and PreparedData do."""
    return TextData(config) if isinstance(config, Corpus.Config) else PreparedData(config)


def _prefix(name: str) -> Path:
    path = Path(name)
    if not path.is_dir():
        return path
    if read_summary(path) is None:
        raise UserError(f"{name} holds no complete prepared set: run flashtrain data prepare to its end")
    return path / TOKENS


def _tokenizer_name(config: PreparedData.Config) -> str:
    name = config.tokenizer or _own_tokenizer(config.sets[0])
    if name is None:
        TokenFile(_prefix(config.sets[0]))  # a set that is missing or damaged is named first
        raise UserError(
            f"set {config.sets[0]} does not say which tokenizer made it: set data.tokenizer to its "
            f'tokenizer.json or to "{BYTES}"'
        )
    return name


def _own_tokenizer(name: str) -> str | None:
    """The tokenizer that a prepared set says it was made with; Megatron's sets do not say it."""
    path = Path(name)
    summary = read_summary(path) if path.is_dir() else None
    if summary is None:
        return None
    return BYTES if summary.tokenizer == BYTES else str(path)
