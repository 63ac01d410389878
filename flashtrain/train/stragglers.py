"""Naming the ranks that the others wait for."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from flashtrain.errors import UserError


@dataclass(frozen=True)
class Straggler:
    """``rank`` was late at ``late`` of the last ``steps`` steps, by the median of ``seconds`` of these."""

    rank: int
    late: int
    steps: int
    seconds: float

    def __str__(self) -> str:
        return (
            f"rank {self.rank} was late at {self.late} of the last {self.steps} steps, "
            f"by {self.seconds:.3f} s in the median"
        )


class Stragglers:
    """Compares the time that each rank needs for a step when its waiting for others is taken out.

    A step's wall time says nothing: the others wait for a late rank, and all take equally long.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """A rank is late at a step that takes it ``factor`` times the median rank; 0 for ``window``: off.

        Each ``window`` steps, ranks that were late at half of them or more are named.
        """

        window: int = 50
        factor: float = 1.5

        def validate(self) -> None:
            """Raise UserError for a value out of range."""
            if self.window < 0:
                raise UserError(f"stragglers.window is {self.window}; it must not be negative")
            if not self.factor > 1:
                raise UserError(f"stragglers.factor is {self.factor}; it must be above 1")

    def __init__(self, config: Config) -> None:
        self.config = config
        self._steps = 0
        self._excess: dict[int, list[float]] = {}

    def observe(self, seconds: Sequence[float]) -> list[Straggler]:
        """Take in one step's own time of each rank; at the end of a window, those who were late in it."""
        # The lower median: of two ranks the faster one is the measure.
        usual = statistics.median_low(seconds)
        for rank, own in enumerate(seconds):
            if own > self.config.factor * usual:
                self._excess.setdefault(rank, []).append(own - usual)
        self._steps += 1
        if self._steps != self.config.window:
            return []
        found = [
            Straggler(rank, len(excess), self._steps, statistics.median(excess))
            for rank, excess in sorted(self._excess.items())
            if 2 * len(excess) >= self._steps
        ]
        self._steps, self._excess = 0, {}
        return found
