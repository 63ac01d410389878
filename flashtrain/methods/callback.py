"""What acts around the steps of a run: the base of callbacks, of methods and of what watches a run."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flashtrain.metrics.events import Event
from flashtrain.metrics.report import StepMetrics


@dataclass(frozen=True)
class Run:
    """What a callback may know of a run. Steps are counted from 1.

    ``first_step`` is the step that comes next: 1 in a fresh run, k + 1 after a resume from the checkpoint
    of step k. ``steps`` is the number of the last step. ``description`` is one line.
    """

    out: Path
    first_step: int
    steps: int
    config_text: str
    description: str


class Callback:
    """Acts around steps, evaluations and events; on rank 0 alone, or on every rank that was given one.

    ``on_end`` closes what ``on_start`` opened, so it also follows a failure; it may come at any step.
    A callback that carries something from step to step returns it from ``state_dict``; it is stored in
    every checkpoint under the name of the class and given back before ``on_start``.
    """

    def on_start(self, run: Run) -> None:
        """Before the first step. Raises UserError for what would make the callback fail later."""

    def before_step(self, step: int) -> None:
        """Before the input of ``step`` is read."""

    def waits_for(self, step: int) -> bool:
        """Whether ``on_step`` of ``step`` has to come before the next step begins; the same on every rank.

        On a GPU it else comes while the next one runs.
        """
        return False

    def on_step(self, metrics: StepMetrics) -> None:
        """After every optimizer step."""

    def on_evaluate(self, step: int, loss: float) -> None:
        """After an evaluation at the end of ``step`` (0: before the first); ``loss`` in nats per token."""

    def on_event(self, event: Event) -> None:
        """Something else happened to the run; see ``flashtrain.metrics.events``."""

    def on_end(self, run: Run) -> None:
        """After the last step, or after the failure that ended the run."""

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state:
            raise ValueError(f"{type(self).__name__} keeps no state, but was given {sorted(state)}")
