"""Callbacks that keep what a run measured in files: JSON lines, TensorBoard, a plot of the loss."""

import importlib.util
import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TextIO

from flashtrain.errors import UserError
from flashtrain.methods.callback import Callback, Run
from flashtrain.metrics import events
from flashtrain.metrics.events import Event
from flashtrain.metrics.history import EVALUATIONS, METRICS
from flashtrain.metrics.report import StepMetrics, from_json, to_json

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

_log = logging.getLogger(__name__)


class JsonLines(Callback):
    """Writes metrics.jsonl, one object a step, evaluations.jsonl and events.jsonl, flushed at every line.

    At the start of a run, steps and evaluations of ``first_step`` and later are dropped: an interrupted run
    wrote them after the checkpoint that this run continues. A fresh run therefore starts both files anew.
    Events stay: they are the history of all attempts.
    """

    def __init__(self) -> None:
        self._out: Path | None = None
        self._metrics: TextIO | None = None
        self._evaluations: TextIO | None = None

    def on_start(self, run: Run) -> None:
        run.out.mkdir(parents=True, exist_ok=True)
        self._out = run.out
        for name in (METRICS, EVALUATIONS):
            _drop_from(run.out / name, run.first_step)
        self._metrics = (run.out / METRICS).open("a", encoding="utf-8")
        self._evaluations = (run.out / EVALUATIONS).open("a", encoding="utf-8")

    def on_step(self, metrics: StepMetrics) -> None:
        _append(self._metrics, metrics.as_json())

    def on_evaluate(self, step: int, loss: float) -> None:
        _append(self._evaluations, json.dumps({"step": step, "loss": to_json(loss)}))

    def on_event(self, event: Event) -> None:
        if self._out is not None:
            events.record(self._out, event)

    def on_end(self, run: Run) -> None:
        for file in (self._metrics, self._evaluations):
            if file is not None:
                file.close()
        self._metrics = self._evaluations = self._out = None


class TensorBoard(Callback):
    """Writes scalars and the config to out/tensorboard.

    On a resume, what an interrupted run wrote from ``first_step`` on is purged from the view.
    """

    TAGS: ClassVar[dict[str, str]] = {
        "loss": "loss/train",
        "grad_norm": "optimizer/grad_norm",
        "learning_rate": "optimizer/learning_rate",
        "tokens": "progress/tokens",
        "tokens_per_s": "speed/tokens_per_s",
        "tflops_per_s": "speed/tflops_per_s",
        "mfu": "speed/mfu",
        "step_s": "speed/step_s",
        "overhead": "speed/overhead",
        "overlap": "communication/hidden",
        "exposed_s": "communication/exposed_s",
        "memory_bytes": "memory/peak_bytes",
    }

    def __init__(self) -> None:
        self._writer: SummaryWriter | None = None

    def on_start(self, run: Run) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise UserError("TensorBoard needs tensorboard: pip install tensorboard") from error
        # Step 0 is an evaluation before training, which only a fresh run repeats.
        purge = run.first_step if run.first_step > 1 else 0
        self._writer = SummaryWriter(str(run.out / "tensorboard"), purge_step=purge, flush_secs=10)
        # Markdown shows a line that starts with four spaces as it is.
        text = "\n".join("    " + line for line in run.config_text.splitlines())
        self._writer.add_text("config", text, global_step=purge)

    def on_step(self, metrics: StepMetrics) -> None:
        for name, tag in self.TAGS.items():
            self._add(tag, getattr(metrics, name), metrics.step)

    def on_evaluate(self, step: int, loss: float) -> None:
        self._add("loss/held_out", loss, step)

    def on_event(self, event: Event) -> None:
        if self._writer is not None:
            self._writer.add_text("events", event.describe(), global_step=event.step)

    def on_end(self, run: Run) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def _add(self, tag: str, value: float | None, step: int) -> None:
        if self._writer is not None and value is not None:
            self._writer.add_scalar(tag, value, global_step=step)


class LossPlot(Callback):
    """Draws out/loss.png at the end of a run from the files of ``JsonLines``, which must run too.

    Shows the training loss of each step (faint) and its running mean, the held-out losses, and, where
    ``unigram_entropy`` is given in nats per token, what a model without context would reach.
    """

    def __init__(self, unigram_entropy: float | None = None) -> None:
        self.unigram_entropy = unigram_entropy

    def on_start(self, run: Run) -> None:
        if importlib.util.find_spec("matplotlib") is None:
            raise UserError("LossPlot needs matplotlib: pip install matplotlib")

    def on_end(self, run: Run) -> None:
        steps = _losses(run.out / METRICS)
        if not steps:
            _log.warning("no loss.png: %s holds no step; LossPlot needs JsonLines", run.out / METRICS)
            return
        from flashtrain.train.loss_figure import draw

        target = run.out / "loss.png"
        draw(target, steps, _losses(run.out / EVALUATIONS), self.unigram_entropy, run.description)
        _log.info("wrote %s", target)


def _append(file: TextIO | None, line: str) -> None:
    if file is None:
        raise RuntimeError("JsonLines was given a step before on_start or after on_end")
    file.write(line + "\n")
    file.flush()


def _lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Lines of ``path`` with the objects they hold, of a missing file none.

    Leaves out a torn last line. Raises UserError for a torn line before the last.
    """
    if not path.exists():
        return
    torn: int | None = None
    with path.open(encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file, start=1):
            if torn is not None:
                raise UserError(
                    f"{path} line {torn} is not the record of a step: mend it or move the file away"
                )
            try:
                record = json.loads(line)
            except ValueError:
                torn = number
                continue
            if isinstance(record, dict) and record.keys() >= {"step", "loss"}:
                yield line.rstrip("\n") + "\n", record
            else:
                torn = number


def _losses(path: Path) -> dict[int, float]:
    """Loss by step; of a step that was written twice the later one."""
    return {record["step"]: from_json(record["loss"]) for _, record in _lines(path)}


def _drop_from(path: Path, first_step: int) -> None:
    """Keep of ``path`` the lines of steps before ``first_step``, or none if that is the first step of all.

    The file is replaced in one move, so that an interruption loses nothing.
    """
    if not path.exists():
        return
    before = path.stat().st_size
    if first_step > 1:
        for _ in _lines(path):  # refuse a damaged file before anything is written
            pass
    kept = path.with_name(path.name + ".kept")
    with kept.open("w", encoding="utf-8") as file:
        if first_step > 1:
            file.writelines(line for line, record in _lines(path) if record["step"] < first_step)
        file.flush()
        os.fsync(file.fileno())
    if (after := kept.stat().st_size) != before:
        _log.info("dropped %d bytes of step %d and later from %s", before - after, first_step, path)
    os.replace(kept, path)
