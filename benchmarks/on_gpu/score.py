"""What times mean: the bound, G, the score (geometric mean over shapes of bound / time), the goals.

The bound of a product of W chunks is max(W·t_c, t_c + (W-1)·t_m), with t_c = T_gemm / W of the same run and
mode, and t_m = (M/W)·width·2 bytes at the one-peer rate of the link. A row is a dictionary as in the JSON:
``shape`` (the model), ``name`` (the site), ``style``, ``rows`` and ``judged[mode]`` as ``judge`` returns it.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from on_gpu.settings import ROWS

from flashtrain.comm import simulate

LINK = 390e9  # bytes per second between two H200 of one host, pushed by a copy engine
WORD = 2  # bytes of an element
PEERS = ("nccl", "torch")
Row = Mapping[str, Any]

CLASSES: dict[str, Callable[[Row], bool]] = {
    "all": lambda row: True,
    "AG+GEMM": lambda row: row["style"] == "column",
    "GEMM+RS": lambda row: row["style"] == "row",
    "qkv and o": lambda row: row["name"] in ("qkv", "o"),
    "MLP": lambda row: row["name"] in ("gate_up", "down"),
    "M <= 4096": lambda row: row["rows"] <= 4096,
    "M >= 8192": lambda row: row["rows"] >= 8192,
}


def bound(gemm: float, rows: int, width: int, world: int) -> float:
    """Least milliseconds of an overlapped product whose plain product takes ``gemm``; ``rows`` is M."""
    transfer = rows / world * width * WORD / LINK * 1e3
    return float(simulate.bound(world, gemm / world, transfer))  # type: ignore[arg-type]


def judge(ms: Mapping[str, float], rows: int, width: int, world: int) -> dict[str, Any]:
    """What follows from the median milliseconds of a shape's systems: "gemm", "collective", "nccl", ...

    ``R`` is T_comm / T_gemm at the rate of the link; ``hidden`` the part of what could be gained over NCCL
    and cuBLAS in sequence that was; both as section 7.1 of the specification defines them.
    """
    gemm = ms["gemm"]
    least = bound(gemm, rows, width, world)
    timed = {name: value for name, value in ms.items() if name not in ("gemm", "collective")}
    found: dict[str, Any] = {
        "bound": round(least, 5),
        "R": round((world - 1) / world * rows * width * WORD / LINK * 1e3 / gemm, 4),
        "G": {name: round(gemm / value, 4) for name, value in timed.items()},
        "bound_over": {name: round(least / value, 4) for name, value in timed.items()},
        "over": {peer: round(ms[peer] / ms["ours"], 4) for peer in PEERS if peer in ms and "ours" in ms},
    }
    hideable = ms["nccl"] - max(gemm, ms["collective"])
    if "ours" in ms and hideable > 0:
        found["hidden"] = round((ms["nccl"] - ms["ours"]) / hideable, 4)
    return found


def geometric_mean(values: Sequence[float]) -> float:
    """Of values above 0; at least one."""
    return math.exp(sum(math.log(value) for value in values) / len(values))


def scores(rows: Sequence[Row], mode: str) -> dict[str, dict[str, dict[str, float]]]:
    """``[system][class]``: the score and over how many shapes; "best peer" takes NCCL or torch per shape."""
    found: dict[str, dict[str, dict[str, float]]] = {}
    for name in (*PEERS, "best peer", "ours"):
        for title, belongs in CLASSES.items():
            values = [
                value for row in rows if belongs(row) and (value := _bound_over(row, mode, name)) is not None
            ]
            if values:
                entry = {"score": round(geometric_mean(values), 4), "shapes": len(values)}
                found.setdefault(name, {})[title] = entry
    return found


def _bound_over(row: Row, mode: str, name: str) -> float | None:
    judged = row["judged"].get(mode, {}).get("bound_over", {})
    if name == "best peer":
        return max((judged[peer] for peer in PEERS if peer in judged), default=None)
    return judged.get(name)


def title(row: Row) -> str:
    """How a shape is called in lists: "8B qkv 2048"."""
    return f"{row['shape']} {row['name']} {row['rows']}"


def slower(rows: Sequence[Row], mode: str) -> list[str]:
    """Shapes at which the op takes longer than NCCL and cuBLAS, and how much."""
    factors = {title(row): row["judged"].get(mode, {}).get("over", {}).get("nccl", 1.0) for row in rows}
    return [f"{shape} (x{factor:.3f})" for shape, factor in factors.items() if factor < 1]


@dataclass(frozen=True)
class Goal:
    """``value`` against ``target``; None where nothing was measured. ``by``: how far on the right side."""

    what: str
    target: float
    value: float | None
    measured: int
    of: int
    at_most: bool = False

    def verdict(self) -> dict[str, Any]:
        """As in the JSON."""
        if self.value is None:
            return asdict(self) | {"met": None, "by": None}
        by = self.target - self.value if self.at_most else self.value - self.target
        return asdict(self) | {"met": by >= 0, "by": round(by, 4)}


# (what, class of shapes, score to reach, shapes of Llama-8B and 70B at ``ROWS`` in it), by W.
_SCORES = {
    4: (
        ("score", "all", 0.90, 32),
        ("score, GEMM+RS", "GEMM+RS", 0.88, 16),
        ("score, qkv and o", "qkv and o", 0.85, 16),
        ("score, M <= 4096", "M <= 4096", 0.85, 16),
    ),
    2: (("score, M = 4096 and 8192", "all", 0.95, 16),),
}


def goals(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A verdict for each goal of the benchmark that W has; judged launch-free. ``report`` as in the JSON."""
    world, parts = report["settings"]["world"], report["parts"]
    forward = [row for row in parts.get("forward", {}).get("rows", []) if "launch_free" in row["judged"]]
    listed = [
        row for row in forward if row["shape"] in ("8B", "70B") and row["rows"] in (ROWS.get(world) or ())
    ]
    ours = scores(listed, "launch_free").get("ours", {})
    found = []
    for what, title, target, of in _SCORES.get(world, ()):
        entry = ours.get(title)
        value, measured = (entry["score"], int(entry["shapes"])) if entry else (None, 0)
        found.append(Goal(f"{what}, W = {world}", target, value, measured, of))
    count = len(slower(forward, "launch_free")) if forward else None
    planned = parts.get("forward", {}).get("planned", 0)
    found.append(Goal("shapes slower than NCCL + cuBLAS", 0, count, len(forward), planned, at_most=True))
    host = parts.get("host", {})
    times = [row["host_ms"]["ours"] for row in host.get("rows", [])]
    most = max(times, default=None)
    found.append(
        Goal(
            "host ms of an op, no gradient, slowest site",
            0.06,
            most,
            len(times),
            host.get("planned", 0),
            True,
        )
    )
    backward = parts.get("backward", {})
    factors = [row["over_nccl"]["launch_free"] for row in backward.get("rows", [])]
    mean = round(geometric_mean(factors), 4) if factors else None
    found.append(
        Goal("NCCL + cuBLAS over ours, backward, mean", 1.25, mean, len(factors), backward.get("planned", 0))
    )
    return [goal.verdict() for goal in found]
