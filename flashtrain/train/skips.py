"""Steps without an update: those whose gradient norm is not finite or far above its history."""

import math
import statistics
import sys
from collections import deque
from dataclasses import dataclass
from typing import Any

from flashtrain.errors import UserError


class SkipRule:
    """Decides from the global gradient norm whether a step updates the parameters.

    The norm is the same bits on every rank, and so are the decisions. A skipped step leaves parameters,
    moments, their bias correction and the RNG states as they were; its samples are not seen again, and
    the learning rate goes on by the number of the step.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """``above`` times the median norm of the last ``window`` steps is too much (0: no norm is).

        A norm that is not finite always skips the step. ``most`` skipped steps in a row end the run.
        """

        above: float = 10.0
        window: int = 64
        most: int = 10

        def validate(self) -> None:
            """Raise UserError for a value out of range."""
            if self.above != 0 and not self.above > 1:
                raise UserError(f"skip.above is {self.above}; it must be above 1, or 0 for no limit")
            for name in ("window", "most"):
                if getattr(self, name) < 1:
                    raise UserError(f"skip.{name} is {getattr(self, name)}; it must be at least 1")

    def __init__(self, config: Config) -> None:
        self.config = config
        self.count = 0
        self.reason: str | None = None
        self._in_a_row = 0
        self._norms: deque[float] = deque(maxlen=config.window)

    @property
    def limit(self) -> float:
        """The largest norm that the next step may have: what is not below or at it is refused."""
        if self.config.above and len(self._norms) == self.config.window:
            return min(sys.float_info.max, self.config.above * statistics.median(self._norms))
        return sys.float_info.max

    def accepts(self, norm: float) -> bool:
        """Whether a step with this gradient norm updates; ``reason`` says why it does not.

        Raises UserError, on all ranks alike, if this is the last of too many skipped steps in a row.
        """
        self.reason = self._objection(norm)
        if math.isfinite(norm):
            # High ones count too: a run whose norms have risen for good is not skipped for ever.
            self._norms.append(norm)
        if self.reason is None:
            self._in_a_row = 0
            return True
        self.count, self._in_a_row = self.count + 1, self._in_a_row + 1
        if self._in_a_row >= self.config.most:
            raise UserError(
                f"{self._in_a_row} steps in a row made no update, the last because the {self.reason}: lower "
                "optimizer.learning_rate, or go on from an earlier checkpoint (skip.most sets the limit)"
            )
        return False

    def _objection(self, norm: float) -> str | None:
        if not math.isfinite(norm):
            return f"gradient norm is {norm}"
        if norm > self.limit:
            usual = statistics.median(self._norms)
            return f"gradient norm {norm:.3g} is {norm / usual:.3g} times its usual {usual:.3g}"
        return None

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps: as JSON, floats to the bit."""
        return {"count": self.count, "in_a_row": self._in_a_row, "norms": list(self._norms)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from ``state``; of its norms the last ``window`` are kept."""
        self.count, self._in_a_row = state["count"], state["in_a_row"]
        self._norms = deque(state["norms"], maxlen=self.config.window)
