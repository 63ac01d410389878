"""Which window of the tokens is which sample: a pure function of the seed and the sample's number.

No rank, batch size or earlier sample enters, so a run on two ranks, on one, and after a resume reads the
same samples in the same order.
"""

from typing import TYPE_CHECKING, Any

import numpy as np

from flashtrain.errors import UserError

# Preparing data takes no torch, and its worker processes should not wait for the import.
if TYPE_CHECKING:
    from torch import Tensor


class Windows:
    """Shuffled windows of ``length`` tokens, each with the token that follows it.

    An epoch holds ``count`` windows, which cut a stretch of the tokens without overlap; sample ``index``
    is window ``permutation(index % count)`` of epoch ``index // count``. The stretch starts at an offset
    drawn for each epoch, so that epochs see different cuts; at the most ``2 * length`` tokens at both
    ends together sit an epoch out. ``tokens`` is a 1-D integer array, kept by reference, or what gives one
    for every slice.

    Raises UserError if there are not ``length + 1`` tokens, or if seed or length is out of range.
    """

    def __init__(self, tokens: Any, length: int, seed: int) -> None:
        _check(tokens, length)
        if not 0 <= seed < 2**64:
            raise UserError(f"data seed {seed} is out of range: give a whole number from 0 to 2**64 - 1")
        self.tokens, self.length, self.seed = tokens, length, seed
        # One length is left over for the offset, unless the tokens hold only a single window.
        self.count = max(1, (len(tokens) - length) // length)
        self._offsets = min(length, len(tokens) - self.count * length)
        self._epochs: dict[int, tuple[int, np.ndarray]] = {}

    def __len__(self) -> int:
        """Windows in an epoch."""
        return self.count

    def start(self, index: int) -> int:
        """Position in ``tokens`` of the first token of sample ``index``."""
        if index < 0:
            raise ValueError(f"sample index must not be negative: {index}")
        offset, order = self._epoch(index // self.count)
        return offset + int(order[index % self.count]) * self.length

    def read(self, index: int) -> np.ndarray:
        """Sample ``index``, counted over all ranks and epochs: int64 ``[length + 1]``."""
        return _cut(self.tokens, [self.start(index)], self.length)[0]

    def sample(self, index: int) -> "Tensor":
        """As ``read``, as a tensor ``[length + 1]``."""
        import torch

        return torch.from_numpy(self.read(index))

    def batch(self, first_index: int, count: int) -> tuple["Tensor", "Tensor"]:
        """Samples ``first_index`` to ``first_index + count`` as (inputs, targets), int64 ``[count, length]``.

        Targets are the inputs moved on by one token. Both are contiguous.
        """
        starts = [self.start(first_index + i) for i in range(count)]
        return inputs_and_targets(_cut(self.tokens, starts, self.length))

    def _epoch(self, epoch: int) -> tuple[int, np.ndarray]:
        """Offset and permutation of an epoch, from Philox keyed by seed and epoch.

        Only raw words are used: NumPy promises their stream for ever, that of ``permutation`` it may change.
        """
        if epoch not in self._epochs:
            # A batch may straddle two epochs; older ones are not asked for again.
            while len(self._epochs) >= 2:
                del self._epochs[min(self._epochs)]
            words = np.random.Philox(key=np.array([self.seed, epoch], dtype=np.uint64)).random_raw(
                self.count + 1
            )
            order = np.argsort(words[1:], kind="stable")
            self._epochs[epoch] = (int(words[0]) % self._offsets, order)
        return self._epochs[epoch]


def evaluation_windows(tokens: Any, length: int, count: int) -> tuple["Tensor", "Tensor"]:
    """Fixed, evenly spaced windows as (inputs, targets), int64 ``[windows, length]``.

    Targets are the inputs moved on by one token. The windows never overlap, so there are fewer than
    ``count`` if the tokens do not hold that many; none is counted twice in a held-out loss. Raises
    UserError if there are not ``length + 1`` tokens.
    """
    _check(tokens, length)
    if count < 1:
        raise UserError(f"an evaluation needs at least 1 window, not {count}")
    count = min(count, (len(tokens) - 1) // length)
    last = len(tokens) - length - 1
    starts = [last * i // (count - 1) if count > 1 else 0 for i in range(count)]
    return inputs_and_targets(_cut(tokens, starts, length))


def _check(tokens: Any, length: int) -> None:
    if tokens.ndim != 1 or not np.issubdtype(tokens.dtype, np.integer):
        raise ValueError(f"tokens must be a 1-D integer array, not {tokens.dtype} {list(tokens.shape)}")
    if length < 1:
        raise UserError(f"sequence length must be at least 1, not {length}")
    if len(tokens) <= length:
        raise UserError(
            f"the split holds {len(tokens)} tokens, but one window takes {length} + 1: "
            "give more text or a shorter sequence"
        )


def _cut(tokens: Any, starts: list[int], length: int) -> np.ndarray:
    windows = np.empty((len(starts), length + 1), dtype=np.int64)
    for row, start in enumerate(starts):
        windows[row] = tokens[start : start + length + 1]
    return windows


def inputs_and_targets(windows: np.ndarray) -> tuple["Tensor", "Tensor"]:
    """Windows ``[count, length + 1]`` as two contiguous tensors ``[count, length]``, one token apart."""
    import torch

    both = torch.from_numpy(windows)
    return both[:, :-1].contiguous(), both[:, 1:].contiguous()
