"""Layers that begin to share attention heads one after the other (EPAS, arXiv 2601.19089, Algorithm 1)."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from flashtrain.errors import UserError
from flashtrain.methods.callback import Callback, Run
from flashtrain.models.decoder import Decoder

log = logging.getLogger("flashtrain.train")


class ProgressiveSharing(Callback):
    """Before each step, lets as many layers share as the schedule says. On every rank alike.

    With ``share`` QK this is EPAS, with KV our reconstruction of the gradual conversion of ECHO-LLaMA (arXiv
    2505.17331). Which layers, and from where, is ``Decoder.Config.sharing``. How many depends on the step
    alone, so a run that goes on from a checkpoint goes on with the right ones. What a switch does to weights
    (``Sharing.init``) comes right before its step: checkpoints from that step on have it, and no other.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Every ``interval`` steps after ``start_step`` ``growth`` more layers share, up to all targets."""

        interval: int = 100
        growth: int = 1
        start_step: int = 0

        def validate(self, targets: int) -> None:
            """Raise UserError for a value out of range, or a growth that does not divide ``targets``."""
            for name, least in (("interval", 1), ("growth", 1), ("start_step", 0)):
                if getattr(self, name) < least:
                    raise UserError(f"sharing.{name} is {getattr(self, name)}; it must be at least {least}")
            if targets < 1:
                raise UserError("sharing needs layers that may share: set model.sharing")
            if targets % self.growth:
                raise UserError(
                    f"{targets} layers may share; sharing.growth {self.growth} must divide their number"
                )

        def shared_at(self, step: int, targets: int) -> int:
            """How many of ``targets`` layers share in ``step``, counted from 1."""
            begun = max(0, step - self.start_step - 1)
            return min(begun // self.interval * self.growth, targets)

    def __init__(
        self, config: Config, model: Decoder, set_to_means: Callable[[Mapping[str, Sequence[str]]], None]
    ) -> None:
        """``set_to_means`` sets parameters of ``model`` to means of others, and masters with them."""
        self.config, self.model, self._set_to_means = config, model, set_to_means
        assert model.config.sharing is not None
        self.targets = len(model.config.sharing.targets_of(model.config.layers))
        self.shared = -1
        self._stored: int | None = None

    def on_start(self, run: Run) -> None:
        """Raises UserError if another schedule would take means twice, or leave one out."""
        done = run.first_step - 1
        sharing, count = self.model.config.sharing, self.config.shared_at(done, self.targets)
        if done and sharing is not None and sharing.init == "mean" and self._stored != count:
            raise UserError(
                f"after step {done} {count} layers share by this schedule, {self._stored or 0} in the "
                "checkpoint: with model.sharing.init mean, keep the schedule that the run began with"
            )
        # As the weights were trained: a switch before the next step is still to come. A run that had ended is
        # only evaluated.
        self._share(min(done, run.steps))

    def before_step(self, step: int) -> None:
        before = self.shared
        if self._share(step) != before:
            log.info("step %d: %d of %d layers share", step, self.shared, self.targets)

    def waits_for(self, step: int) -> bool:
        # What a step's metrics say of its FLOPs is asked when they are read.
        return self.config.shared_at(step + 1, self.targets) != self.shared

    def _share(self, step: int) -> int:
        count = self.config.shared_at(step, self.targets)
        if count != self.shared:
            if self.shared >= 0 and (means := self.model.shared_means(self.shared, count)):
                self._set_to_means(means)
            self.model.share(count)
            self.shared = count
        return count

    def state_dict(self) -> dict[str, Any]:
        return {"shared": self.shared}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Keep it to compare: the step says it all. It tells others how the model was trained."""
        self._stored = state.get("shared")
