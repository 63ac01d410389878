"""Tables of a report, as ``on_gpu.report`` writes it."""

from collections.abc import Mapping, Sequence
from typing import Any

from on_gpu import score
from rich.console import Console
from rich.table import Table

Data = Mapping[str, Any]
SYSTEMS = ("gemm", "collective", "nccl", "torch", "ours")


def show(data: Data, console: Console) -> None:
    """Print what ``data`` holds, and the goals last."""
    parts, shown = data["parts"], {"forward": _forward, "graph": _forward, "host": _host}
    shown |= {"backward": _backward, "dp": _data_parallel}
    for name, part in parts.items():
        if part["rows"]:
            modes = ("graph",) if name == "graph" else ("launch_free", "host_issued")
            for mode in modes if shown[name] in (_forward, _backward) else ("",):
                console.print(shown[name](part["rows"], mode))
        for system, reason in part.get("absent", {}).items():
            console.print(f"{name}: no {system} at {part['at']}: {reason}", markup=False)
        if part["left_out"]:
            console.print(f"{name}: not measured: {', '.join(part['left_out'])}", markup=False)
    absent = {
        (system, reason)
        for part in parts.values()
        for row in part["rows"]
        for system, reason in row.get("absent", {}).items()
    }
    for system, reason in sorted(absent):
        console.print(f"absent: {system}: {reason}", markup=False)
    _verdict(data, console)


def _table(title: str, words: Sequence[str], numbers: Sequence[str]) -> Table:
    table = Table(title=title)
    for heading in words:
        table.add_column(heading, no_wrap=True)
    for heading in numbers:
        table.add_column(heading, justify="right", no_wrap=True)
    return table


def _forward(rows: Sequence[Data], mode: str) -> Table:
    numbers = (
        "R",
        *SYSTEMS,
        "±",
        "bound",
        "G",
        "bound/ours",
        "bound/best peer",
        "nccl/ours",
        "torch/ours",
        "host",
    )
    table = _table(f"forward, {mode.replace('_', '-')}, ms", ("shape",), (*numbers, "error", "error nccl"))
    for row in rows:
        judged, ms = row["judged"][mode], row["ms"][mode]
        over = judged["bound_over"]
        best = max((over[peer] for peer in score.PEERS if peer in over), default=None)
        table.add_row(
            score.title(row),
            f"{judged['R']:.2f}",
            *(_number(ms.get(name, {}).get("median"), 3) for name in SYSTEMS),
            _number(ms["ours"]["iqr"] / 2, 3),
            f"{judged['bound']:.3f}",
            f"{judged['G']['ours']:.2f}",
            f"{over['ours']:.3f}",
            _number(best, 3),
            _factor(judged["over"].get("nccl")),
            _factor(judged["over"].get("torch")),
            _number(ms["ours"]["host"], 3),
            *(_number(row.get("error", {}).get(name), 5) for name in ("ours", "nccl")),
        )
    return table


def _host(rows: Sequence[Data], _: str) -> Table:
    systems = ("nccl", "torch", "ours", "nccl, gradient", "ours, gradient")
    table = _table("host time of one call, ms", ("shape",), systems)
    for row in rows:
        table.add_row(score.title(row), *(_number(row["host_ms"].get(name), 4) for name in systems))
    return table


def _backward(rows: Sequence[Data], mode: str) -> Table:
    names, ratios = ("gemm", "nccl", "ours"), ("over_nccl", "over_nccl_with_autograd")
    title = f"both gradients, {mode.replace('_', '-')}, ms"
    table = _table(title, ("shape",), (*names, "nccl/ours", "with autograd"))
    for row in rows:
        times = (_number(row["ms"][mode][name]["median"], 3) for name in names)
        table.add_row(score.title(row), *times, *(_factor(row[ratio][mode]) for ratio in ratios))
    means = (score.geometric_mean([row[ratio][mode] for row in rows]) for ratio in ratios)
    table.add_row("geometric mean", "", "", "", *(_factor(mean) for mean in means))
    return table


def _data_parallel(rows: Sequence[Data], _: str) -> Table:
    numbers = ("nccl", "ours", "no communication", "exposed nccl", "exposed ours", "nccl/ours", "tokens/s")
    numbers += ("host of a gather + scatter, nccl", "ours, us")
    table = _table("a training step under FSDP2, ms", ("model", "a rank"), numbers)
    for row in rows:
        table.add_row(
            f"{row['model']}, {row['parameters'] / 1e9:.2f}e9",
            f"{row['batch']} x {row['sequence']}",
            *(_number(row["ms"][name]["median"], 2) for name in ("nccl", "ours", "none")),
            *(_number(row["exposed_ms"][name], 2) for name in ("nccl", "ours")),
            _factor(row["over_nccl"]),
            str(row["tokens_per_second"]["ours"]),
            *("{gather:.0f} + {scatter:.0f}".format(**row["host_us"][name]) for name in ("nccl", "ours")),
        )
    return table


def _verdict(data: Data, console: Console) -> None:
    summary = data["summary"]
    for mode, found in summary["scores"].items():
        table = _table(f"score, {mode.replace('_', '-')} (shapes)", ("system",), list(score.CLASSES))
        for system, classes in found.items():
            entries = (classes.get(title) for title in score.CLASSES)
            table.add_row(system, *(f"{e['score']:.3f} ({e['shapes']})" if e else "-" for e in entries))
        console.print(table)
        console.print(
            f"slower than NCCL + cuBLAS, {mode}: {'; '.join(summary['slower_than_nccl'][mode]) or 'nowhere'}"
        )
    table = _table("goals", ("goal",), ("target", "measured", "met", "by", "shapes"))
    for goal in summary["goals"]:
        met = {True: "yes", False: "[bold red]no[/]", None: "-"}[goal["met"]]
        target = f"{'<=' if goal['at_most'] else '>='} {goal['target']:g}"
        by = "-" if goal["by"] is None else f"{goal['by']:+.4g}"
        shapes = f"{goal['measured']} of {goal['of']}"
        table.add_row(goal["what"], target, _number(goal["value"], 4), met, by, shapes)
    console.print(table)
    console.print(f"ended: {data['ended']}", markup=False)


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _factor(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.2f}" if value >= 1 else f"[bold red]{value:.2f}[/]"
