"""One chart: curves of one unit over the steps, with all that a template needs to draw it."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from flashtrain.metrics.history import Curve, finite
from flashtrain.metrics.page.scale import SIZE, Axis, dots, label, number, path, thin, value_axis
from flashtrain.metrics.smooth import running_mean


@dataclass(frozen=True)
class Series:
    """A curve in the unit of its chart. ``colour`` numbers the run, or the curve where there is one run.

    ``smooth`` draws it faint, with its running mean on top.
    """

    name: str
    curve: Curve
    colour: int = 0
    style: Literal["line", "dots"] = "line"
    smooth: bool = False


@dataclass(frozen=True)
class Mark:
    """An event to show in the charts as a vertical line."""

    step: int
    kind: str
    words: str


@dataclass(frozen=True)
class Chart:
    """What is drawn; ``empty`` is shown where no series has a point. ``zero``: the axis begins at 0.

    The axis is logarithmic if all values are above 0 and span a ratio of ``log_from``. ``reference`` is a
    horizontal line with its name. ``wide`` charts take a whole row of the page.
    """

    key: str
    title: str
    unit: str
    series: Sequence[Series]
    empty: str
    zero: bool = True
    log_from: float = math.inf
    wide: bool = False
    reference: tuple[str, float] | None = None

    def view(self, x: Axis, marks: Iterable[Mark] = ()) -> dict[str, Any]:
        """Plain data for the template: places in 0..SIZE, words, and the points that the script reads."""
        shown = [series for series in self.series if finite(series.curve)]
        values = [value for series in shown for value in finite(series.curve).values()]
        if self.reference is not None and shown:
            values.append(self.reference[1])
        y = value_axis(values, self.zero, self.log_from)
        return {
            "key": self.key,
            "title": self.title,
            "unit": self.unit + (", logarithmic" if y.log else ""),
            "wide": self.wide,
            "empty": None if shown else self.empty,
            "described": self._described(shown),
            "low": y.low,
            "high": y.high,
            "y_ticks": [{"at": 100 - y.place(tick) / 10, "text": label(tick)} for tick in y.ticks],
            "x_ticks": [{"at": x.place(tick) / 10, "text": label(tick)} for tick in x.ticks],
            "marks": [{"at": x.inside(mark.step), "kind": mark.kind, "words": mark.words} for mark in marks],
            "reference": self._reference(y) if shown else None,
            "series": [self._series(series, x, y) for series in shown],
            "notes": self._notes(shown, y),
        }

    def _series(self, series: Series, x: Axis, y: Axis) -> dict[str, Any]:
        raw = thin(series.curve)
        mean = thin(_mean(series.curve)) if series.smooth else []
        drawn = [(step, _rounded(value)) for step, value in raw]
        last = next(value for value in reversed(series.curve.values()) if math.isfinite(value))
        return {
            "name": series.name,
            "colour": series.colour,
            "style": series.style,
            "path": path(mean or raw, x, y) if series.style == "line" else dots(raw, x, y),
            "thread": path(raw, x, y) if series.smooth or series.style == "dots" else "",
            "points": drawn,
            "last": number(last),
        }

    def _reference(self, y: Axis) -> dict[str, Any] | None:
        if self.reference is None:
            return None
        name, value = self.reference
        return {"name": name, "text": number(value), "at": SIZE - y.place(value)}

    def _notes(self, shown: Sequence[Series], y: Axis) -> list[str]:
        """What the picture leaves out."""
        notes = []
        for series in shown:
            of = f" of {series.name}" if len(shown) > 1 else ""
            if broken := len(series.curve) - len(finite(series.curve)):
                notes.append(f"{_count(broken, 'value')}{of} not finite: a gap in the line.")
            above = [value for value in finite(series.curve).values() if value > y.high]
            if above:
                count = _count(len(above), "value")
                notes.append(f"{count}{of} above the axis, up to {number(max(above))} {self.unit}.")
        return notes

    def _described(self, shown: Sequence[Series]) -> str:
        """The chart in words, for those who do not see it."""
        parts = []
        for series in shown:
            steps, values = list(series.curve), list(finite(series.curve).values())
            parts.append(
                f"{series.name} from {number(values[0])} at step {steps[0]} to {number(values[-1])} "
                f"at step {steps[-1]}"
            )
        return f"{self.title}, {self.unit}: {'; '.join(parts) or self.empty}"


def scaled(curve: Mapping[int, float], factor: float) -> Curve:
    """``curve`` in another unit."""
    return {step: value * factor for step, value in curve.items()}


def _mean(curve: Curve) -> Curve:
    values = running_mean(np.array(list(curve.values()), dtype=float))
    broken = ~np.isfinite(np.array(list(curve.values()), dtype=float))
    values[broken] = math.nan
    return dict(zip(curve, values.tolist(), strict=True))


def _rounded(value: float) -> float | None:
    """Six digits are more than a reader wants; JSON has no number for what is not finite."""
    return float(f"{value:.6g}") if math.isfinite(value) else None


def _count(count: int, word: str) -> str:
    return f"{count:,} {word}" + ("" if count == 1 else "s")
