"""The progress of a run on the terminal."""

import sys
import time
from collections.abc import Iterable
from typing import TYPE_CHECKING, TextIO

from flashtrain.errors import UserError
from flashtrain.methods.callback import Callback, Run
from flashtrain.metrics.events import ROUTINE, Event
from flashtrain.metrics.report import StepMetrics

if TYPE_CHECKING:
    from rich.progress import Progress


class ProgressBar(Callback):
    """Progress on the terminal: a bar with the last step's metrics below it.

    Where ``file`` (default: standard output) is no terminal, one plain line every ``every`` steps and
    one for the last step of the run.
    """

    def __init__(self, every: int = 10, file: TextIO | None = None) -> None:
        if every < 1:
            raise UserError(f"ProgressBar: every must be at least 1 step, not {every}")
        self.every, self._file = every, file
        self._bar: Progress | None = None
        self._unread = False
        self._unshown: StepMetrics | None = None

    def on_start(self, run: Run) -> None:
        self._run, self._out = run, self._file or sys.stdout
        self._started = time.monotonic()
        # The first step compiles and allocates, so the time that remains is told from those after it.
        self._warm: tuple[int, float] | None = None
        self._unshown = None
        self._bar = _live_bar(self._out, run) if self._out.isatty() else None
        if self._bar is not None:
            self._bar.start()
        else:
            self._print(run.description)

    def on_step(self, metrics: StepMetrics) -> None:
        now = time.monotonic()
        if self._warm is None:
            self._warm = (metrics.step, now)
        self._unshown = metrics
        if self._bar is not None:
            self._bar.update(
                self._bar.task_ids[0],
                completed=metrics.step,
                metrics="  ".join(describe(metrics)),
                remaining=self._remaining(metrics.step, now),
            )
        elif metrics.step % self.every == 0 or metrics.step == self._run.steps:
            self._print_step(metrics)

    def on_evaluate(self, step: int, loss: float) -> None:
        self._print(f"step {step}: held-out loss {loss:.4f}")

    def on_event(self, event: Event) -> None:
        if event.kind not in ROUTINE:
            self._print(event.describe())

    def on_end(self, run: Run) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
        elif self._unshown is not None:
            self._print_step(self._unshown)

    def _print(self, line: str) -> None:
        if self._bar is not None:
            self._bar.console.print(line, markup=False, highlight=False)
        elif not self._unread:
            try:
                print(line, file=self._out, flush=True)
            except OSError as error:
                self._unread = True
                raise UserError(
                    f"the run cannot write to its standard output any more ({error.strerror}): send it to a "
                    "file with room; the same command goes on from the last checkpoint"
                ) from None

    def _print_step(self, metrics: StepMetrics) -> None:
        now = time.monotonic()
        head = f"step {metrics.step}/{self._run.steps}"
        times = f"{clock(now - self._started)} elapsed  {self._remaining(metrics.step, now)} remaining"
        self._print("  ".join([head, *describe(metrics), times]))
        self._unshown = None

    def _remaining(self, step: int, now: float) -> str:
        if step >= self._run.steps:
            return clock(0)
        if self._warm is None or step <= self._warm[0]:
            return "-:--"
        seconds_per_step = (now - self._warm[1]) / (step - self._warm[0])
        return clock(seconds_per_step * (self._run.steps - step))


def describe(metrics: StepMetrics) -> list[str]:
    """The metrics of a step in words, rounded for reading."""
    memory = "n/a" if metrics.memory_bytes is None else f"{metrics.memory_bytes / 2**30:.2f} GiB"
    return [
        f"loss {metrics.loss:.4f}",
        f"grad norm {metrics.grad_norm:.3g}",
        f"{magnitude(metrics.tokens_per_s)} tokens/s",
        f"{metrics.tflops_per_s:.3g} TFLOP/s",
        f"MFU {_share(metrics.mfu)}",
        f"hidden {_share(metrics.overlap)}",
        f"memory {memory}",
    ]


def magnitude(value: float) -> str:
    """``value`` with three digits and a unit prefix: 1234567 is 1.23M."""
    for limit, prefix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= limit:
            return f"{value / limit:.3g}{prefix}" if value < 999.5 * limit else f"{value / limit:.0f}{prefix}"
    return f"{value:.3g}"


def clock(seconds: float) -> str:
    """Seconds as h:mm:ss, or m:ss below an hour."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _share(value: float | None) -> str:
    return "n/a" if value is None else f"{value:.1%}"


def _live_bar(file: TextIO, run: Run) -> "Progress | None":
    """A bar for a terminal; None for one that cannot move its cursor."""
    try:
        from rich.console import Console, RenderableType
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
        from rich.text import Text
    except ImportError as error:
        raise UserError("ProgressBar needs rich on a terminal: pip install rich") from error

    class TwoLines(Progress):
        """The bar, and below it the metrics, which then wrap on a narrow terminal instead of being cut."""

        def get_renderables(self) -> Iterable[RenderableType]:
            yield self.make_tasks_table(self.tasks)
            yield Text("  ".join(task.fields["metrics"] for task in self.tasks))

    console = Console(file=file, force_terminal=True)
    if console.is_dumb_terminal:
        return None
    bar = TwoLines(
        TextColumn("step"),
        MofNCompleteColumn(),
        BarColumn(bar_width=None),
        TimeElapsedColumn(),
        TextColumn("{task.fields[remaining]} remaining"),
        console=console,
        expand=True,
    )
    console.print(run.description, markup=False, highlight=False)
    bar.add_task("train", total=run.steps, completed=run.first_step - 1, metrics="", remaining="-:--")
    return bar
