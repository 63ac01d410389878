"""The chart of where the time of a step goes. Importing this module imports matplotlib."""

import os
from collections.abc import Mapping
from pathlib import Path

from matplotlib.figure import Figure

from flashtrain.metrics.step_time import KINDS

_INK = "#374151"
# Work in blues and greens, what is lost in red and grey.
_COLOURS = ("#1d4e89", "#2a7f9e", "#5aa9a3", "#8fc1a9", "#c9d8b6", "#d1495b", "#d1d5db")


def draw(path: Path, bars: Mapping[str, Mapping[str, float]], title: str) -> None:
    """Write a PNG with one bar for each of ``bars``: seconds of each of ``KINDS``, drawn in milliseconds."""
    figure = Figure(figsize=(9, 1.9 + 0.6 * len(bars)), dpi=160, layout="constrained")
    axes = figure.add_subplot()
    left = dict.fromkeys(bars, 0.0)
    whole = {name: sum(kinds.values()) for name, kinds in bars.items()}
    for kind, colour in zip(KINDS, _COLOURS, strict=True):
        widths = [1e3 * bars[name][kind] for name in bars]
        drawn = axes.barh(list(bars), widths, left=list(left.values()), color=colour, label=kind, height=0.6)
        for name, width, patch in zip(bars, widths, drawn.patches, strict=True):
            left[name] += width
            if whole[name] and width > 40 * whole[name]:  # 4 % of the bar: narrower ones hold no number
                middle = patch.get_x() + width / 2, patch.get_y() + patch.get_height() / 2
                ink = "white" if colour in _COLOURS[:3] or kind == KINDS[5] else _INK
                share = f"{width / (10 * whole[name]):.0f} %"
                axes.annotate(share, middle, ha="center", va="center", fontsize=8, color=ink)
    axes.set_title(title, loc="left", fontsize=11, color=_INK, pad=10, wrap=True)
    axes.set_xlabel("milliseconds of a step on one rank", color=_INK)
    axes.invert_yaxis()
    axes.tick_params(color="#9ca3af", labelcolor=_INK)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color("#9ca3af")
    figure.legend(loc="outside lower center", ncols=4, frameon=False, labelcolor=_INK, fontsize=8)
    unfinished = path.with_name(f".{path.name}")
    figure.savefig(unfinished, format="png")
    os.replace(unfinished, path)
