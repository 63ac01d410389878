"""From numbers to places on an axis, and to words."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from flashtrain.metrics.history import Curve

# Plots are drawn on a square of this size and stretched to their place on the page.
SIZE = 1000.0
# More points than a screen has columns only make the page heavy.
MOST_POINTS = 1200


@dataclass(frozen=True)
class Axis:
    """From ``low`` to ``high``; ``ticks`` lie between. With ``log``, equal ratios are equal distances."""

    low: float
    high: float
    ticks: tuple[float, ...]
    log: bool = False

    def place(self, value: float) -> float:
        """Where ``value`` lies, 0 at the low end and SIZE at the high one; beyond them outside of that."""
        low, high = self.low, self.high
        if self.log:
            low, high, value = math.log(low), math.log(high), math.log(max(value, 1e-300))
        return (value - low) / (high - low) * SIZE

    def inside(self, value: float) -> float:
        """Where ``value`` lies, or the end of the axis that is nearest to it."""
        return self.place(min(max(value, self.low), self.high))


def steps_axis(steps: Iterable[int]) -> Axis:
    """The axis of all ``steps``, with whole ticks."""
    found = list(steps) or [0]
    low, high = min(found), max(found)
    if low == high:
        low, high = low - 1, high + 1
    return Axis(low, high, _ticks(low, high, 6, whole=True))


def value_axis(values: Sequence[float], zero: bool, log_from: float) -> Axis:
    """An axis for finite ``values``; from 0 with ``zero``, logarithmic if they span a ratio of ``log_from``.

    A few values far above all others do not set its end: the rest would be a flat line.
    """
    if not values:
        return Axis(0.0, 1.0, ())
    low, high = min(values), max(values)
    if low > 0 and high > log_from * low:
        margin = (high / low) ** 0.06
        return Axis(low / margin, high * margin, _log_ticks(low / margin, high * margin), log=True)
    ordered = sorted(values)
    usual = ordered[int(0.98 * (len(ordered) - 1))]
    if high - low > 4 * (usual - low) and usual > low:
        high = low + 1.5 * (usual - low)
    if zero:
        low = min(low, 0.0)
    if low == high:
        low, high = low - (abs(low) or 1.0) * 0.5, high + (abs(high) or 1.0) * 0.5
    margin = 0.06 * (high - low)
    low = low if zero and low == 0.0 else low - margin
    return Axis(low, high + margin, _ticks(low, high + margin, 5))


def _ticks(low: float, high: float, most: int, whole: bool = False) -> tuple[float, ...]:
    from matplotlib.ticker import MaxNLocator

    locator = MaxNLocator(nbins=most, steps=[1, 2, 2.5, 5, 10], integer=whole)
    return tuple(float(tick) for tick in locator.tick_values(low, high) if low <= tick <= high)


def _log_ticks(low: float, high: float) -> tuple[float, ...]:
    from matplotlib.ticker import LogLocator

    span = high / low
    subs = (1.0,) if span > 1000 else (1.0, 2.0, 5.0) if span > 20 else (1.0, 1.5, 2.0, 3.0, 5.0, 7.0)
    ticks = LogLocator(subs=subs, numticks=20).tick_values(low, high)
    return tuple(float(tick) for tick in ticks if low <= tick <= high)


def thin(curve: Curve, most: int = MOST_POINTS) -> list[tuple[int, float]]:
    """At most about ``most`` points of ``curve`` that show the same: the extremes of each stretch stay.

    A stretch that holds a value that is not finite keeps one of them, which leaves a gap.
    """
    points = list(curve.items())
    if len(points) <= most:
        return points
    kept: list[tuple[int, float]] = []
    size = math.ceil(2 * len(points) / most)
    for first in range(0, len(points), size):
        stretch = points[first : first + size]
        drawn = [point for point in stretch if math.isfinite(point[1])]
        chosen = {min(drawn, key=_value), max(drawn, key=_value)} if drawn else set()
        if len(drawn) < len(stretch):
            chosen.add(next(point for point in stretch if not math.isfinite(point[1])))
        kept += sorted(chosen | ({points[-1]} if stretch[-1] == points[-1] else set()), key=_step)
    return kept


def _step(point: tuple[int, float]) -> int:
    return point[0]


def _value(point: tuple[int, float]) -> float:
    return point[1]


def path(points: Sequence[tuple[int, float]], x: Axis, y: Axis) -> str:
    """The points as the ``d`` of an SVG path, with a gap where a value is not finite."""
    words, drawing = [], False
    for index, (step, value) in enumerate(points):
        if not math.isfinite(value):
            drawing = False
            continue
        command = "L" if drawing else "M"
        words.append(f"{command}{x.place(step):.1f} {SIZE - y.place(value):.1f}")
        alone = not drawing and (index + 1 == len(points) or not math.isfinite(points[index + 1][1]))
        if alone:
            words.append("h0")  # a line of no length, whose round ends are a dot
        drawing = True
    return "".join(words)


def dots(points: Sequence[tuple[int, float]], x: Axis, y: Axis) -> str:
    """The points as lines of no length: their round ends stay round where the drawing is stretched."""
    finite = [(step, value) for step, value in points if math.isfinite(value)]
    return "".join(f"M{x.place(step):.1f} {SIZE - y.place(value):.1f}h0" for step, value in finite)


def label(value: float) -> str:
    """A tick's number: 0.25, 1,500, 20k, 3M, 2e-4."""
    for limit, prefix in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= limit:
            return f"{value / (1e3 if prefix == 'k' else limit):.6g}{prefix}"
    if value and abs(value) < 1e-3:
        mantissa, _, exponent = f"{value:.3e}".partition("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    return f"{value:,.6g}" if abs(value) < 1000 else f"{value:,.0f}"


def number(value: float | None, digits: int = 4) -> str:
    """A value for reading, with ``digits`` significant digits: 1.549, 16,590, 2.93e-4; n/a for None."""
    if value is None:
        return "n/a"
    if not math.isfinite(value):
        return str(value)
    if value and abs(value) < 1e-3:
        return f"{value:.{digits - 1}g}"
    decimals = max(0, digits - 1 - (math.floor(math.log10(abs(value))) if value else 0))
    rounded = round(value, digits - 1 - math.floor(math.log10(abs(value)))) if value else 0.0
    return f"{rounded:,.{decimals}f}"
