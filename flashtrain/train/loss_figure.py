"""The plot of a run's loss. Importing this module imports matplotlib."""

import math
import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from flashtrain.metrics.smooth import running_mean

_TRAIN, _HELD_OUT, _REFERENCE, _INK = "#2563a8", "#d1495b", "#6b7280", "#374151"


def draw(
    path: Path,
    steps: Mapping[int, float],
    evaluations: Mapping[int, float],
    unigram_entropy: float | None,
    title: str,
) -> None:
    """Write a PNG of training losses by step, held-out losses by step and a reference, in nats per token.

    Losses that are not finite leave a gap and are counted in the legend.
    """
    where = np.array(sorted(steps))
    losses = np.array([steps[step] for step in where], dtype=float)
    finite = np.isfinite(losses)
    figure = Figure(figsize=(9, 5), dpi=160, layout="constrained")
    axes = figure.add_subplot()
    axes.plot(where, np.where(finite, losses, math.nan), color=_TRAIN, alpha=0.25, linewidth=0.8)
    broken = int((~finite).sum())
    label = f"training, running mean ({broken} steps not finite)" if broken else "training, running mean"
    smooth = np.where(finite, running_mean(losses), math.nan)
    axes.plot(where, smooth, color=_TRAIN, linewidth=1.8, label=label, marker="o" if len(where) == 1 else "")
    points = {step: loss for step, loss in sorted(evaluations.items()) if math.isfinite(loss)}
    if points:
        axes.plot(
            list(points),
            list(points.values()),
            color=_HELD_OUT,
            linestyle="-",
            linewidth=0.8,
            marker="o",
            markersize=4.5,
            markeredgecolor="white",
            markeredgewidth=0.6,
            label=f"held out, last {list(points.values())[-1]:.3f}",
        )
    if unigram_entropy is not None:
        reference = f"unigram entropy {unigram_entropy:.3f}"
        axes.axhline(unigram_entropy, color=_REFERENCE, linewidth=1.1, linestyle=(0, (5, 3)), label=reference)
    _style(axes, title)
    unfinished = path.with_name(f".{path.name}")
    figure.savefig(unfinished, format="png")
    os.replace(unfinished, path)


def _style(axes: Axes, title: str) -> None:
    axes.set_title(title, loc="left", fontsize=11, color=_INK, pad=10, wrap=True)
    axes.set_xlabel("step", color=_INK)
    axes.set_ylabel("loss, nats per token", color=_INK)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.margins(x=0.01)
    axes.grid(color="#e5e7eb", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.tick_params(color="#9ca3af", labelcolor=_INK)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color("#9ca3af")
    axes.legend(frameon=False, labelcolor=_INK, fontsize=9)
