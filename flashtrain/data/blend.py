"""Which sample of a weighted blend is which window of which set: a pure function of seed and number."""

from collections.abc import Sequence
from fractions import Fraction
from typing import TYPE_CHECKING, Any

import numpy as np

from flashtrain.data.sampler import Windows, inputs_and_targets
from flashtrain.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

# In every stretch of so many samples each set has exactly its share, rounded; the order is shuffled.
PERIOD = 1 << 16
# Windows number their epochs from 0, and their Philox keys with them.
_FIRST_PERIOD_KEY = 1 << 63
_GOLDEN = 0x9E3779B97F4A7C15


class Blend:
    """Samples of several sets, each set's windows in an order of its own, all in a shuffled order.

    Set k gets the share ``weights[k]`` of the samples, to within 1 / 65536: of samples ``i * 65536`` to
    ``(i + 1) * 65536`` exactly that part, for every i. A set that is smaller than its share begins a
    new epoch earlier than the others. ``weights`` need not add up to 1.

    No rank, batch size or earlier sample enters, as in Windows; one set alone gives what Windows gives.

    ``tokens`` are what Windows takes, each with ``document_starts`` where that is asked for. Raises
    UserError for a weight that is not positive, or too small to give a set one sample in 65536.
    """

    def __init__(
        self, tokens: Sequence[Any], names: Sequence[str], weights: Sequence[float], length: int, seed: int
    ) -> None:
        # Two sets of one size must not be shuffled alike.
        seeds = [(seed + k * _GOLDEN) % 2**64 for k in range(len(tokens))]
        self.windows = [Windows(one, length, s) for one, s in zip(tokens, seeds, strict=True)]
        self.seed, self.quotas = seed, quotas(weights, names, PERIOD)
        if 0 in self.quotas:
            name = names[self.quotas.index(0)]
            raise UserError(f"the weight of {name} gives it less than one of {PERIOD:,} samples: raise it")
        self._periods: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def where(self, index: int) -> tuple[int, int]:
        """Sample ``index``, counted over all ranks, as (set, number among the samples of that set)."""
        if index < 0:
            raise ValueError(f"sample index must not be negative: {index}")
        if len(self.windows) == 1:
            return 0, index
        period, within = divmod(index, PERIOD)
        sets, ranks = self._period(period)
        chosen = int(sets[within])
        return chosen, period * self.quotas[chosen] + int(ranks[within])

    def batch(self, first_index: int, count: int) -> tuple["Tensor", "Tensor"]:
        """Samples from ``first_index`` on as int64 inputs and targets ``[count, length]``."""
        places = [self.where(first_index + i) for i in range(count)]
        return inputs_and_targets(np.stack([self.windows[chosen].read(number) for chosen, number in places]))

    def document_starts(self, index: int) -> np.ndarray:
        """Where in the ``length + 1`` tokens of sample ``index`` a document begins: int64 ``[documents]``.

        For an attention that stops at documents, and for positions that begin anew in each.
        """
        chosen, number = self.where(index)
        windows = self.windows[chosen]
        start = windows.start(number)
        return windows.tokens.document_starts(start, start + windows.length + 1) - start

    def _period(self, period: int) -> tuple[np.ndarray, np.ndarray]:
        """For each sample of a period its set, and how many samples before it are of that set."""
        if period not in self._periods:
            while len(self._periods) >= 2:  # a batch may straddle two
                del self._periods[min(self._periods)]
            key = np.array([self.seed, _FIRST_PERIOD_KEY + period], dtype=np.uint64)
            order = np.argsort(np.random.Philox(key=key).random_raw(PERIOD), kind="stable")
            sets = np.repeat(np.arange(len(self.quotas)), self.quotas)[order]
            ranks = np.empty(PERIOD, dtype=np.int64)
            for k, quota in enumerate(self.quotas):
                ranks[sets == k] = np.arange(quota)
            self._periods[period] = (sets, ranks)
        return self._periods[period]


def quotas(weights: Sequence[float], names: Sequence[str], count: int) -> list[int]:
    """``count`` shared out by ``weights``, the largest remainders rounded up; exact, so the same everywhere.

    Raises UserError for a weight that is not a positive number.
    """
    for name, weight in zip(names, weights, strict=True):
        if not 0 < weight < float("inf"):
            raise UserError(f"the weight of {name} is {weight}; it must be a positive number")
    total = sum(Fraction(weight) for weight in weights)
    shares = [Fraction(weight) * count / total for weight in weights]
    given = [int(share) for share in shares]
    by_remainder = sorted(range(len(shares)), key=lambda k: (given[k] - shares[k], k))
    for k in by_remainder[: count - sum(given)]:
        given[k] += 1
    return given
