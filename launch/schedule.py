"""``flashtrain schedule``: print a schedule step by step and draw what every engine does when."""

import argparse
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flashtrain.errors import UserError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from rich.table import Table

    from flashtrain.comm.schedule import Schedule
    from flashtrain.comm.simulate import Event, Timeline

# Told apart in print and by most colour-blind readers; more owners take their colours from a colour map.
PALETTE = ("#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377", "#ee8866", "#44bb99", "#555555")
LANES = (("compute", "compute"), ("egress", "send"), ("ingress", "receive"))
BLOCK = len(LANES) + 0.7  # height of a rank's lanes and the gap below them


def add_parser(subparsers: Any) -> None:
    """Register the ``schedule`` subcommand."""
    parser = subparsers.add_parser(
        "schedule",
        help="print and draw a schedule",
        description="Print a schedule as a table, replay it in the simulator and draw its timeline.",
    )
    parser.add_argument(
        "--op",
        required=True,
        choices=("all_gather", "reduce_scatter", "all_to_all"),
        help="what the chunks of a product are exchanged by",
    )
    parser.add_argument(
        "--kind",
        default="direct",
        choices=("direct", "ring"),
        help="chunks go straight to their rank, or from neighbour to neighbour (default: direct)",
    )
    parser.add_argument("--world", type=int, metavar="W", help="ranks (default: as many as --rows, or 4)")
    parser.add_argument(
        "--subchunks", type=int, default=1, metavar="m", help="pieces of each chunk (default 1)"
    )
    parser.add_argument(
        "--rows",
        type=int,
        nargs="+",
        metavar="ROWS",
        help="rows of each rank; one number is the total, split evenly (default: equal chunks)",
    )
    parser.add_argument(
        "--ratio",
        default="1/2",
        metavar="R",
        help="transfer time over compute time of a chunk, t_m/t_c, such as 0.5 or 2/3 (default 1/2)",
    )
    parser.add_argument("--out", type=Path, metavar="PNG", help="also draw a timeline to this file")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from rich.console import Console

    from flashtrain.comm.simulate import simulate

    ratio, schedules = _ratio(args.ratio), _schedules(args)
    if args.out is not None and not args.out.absolute().parent.is_dir():
        raise UserError(f"--out {args.out}: there is no folder {args.out.absolute().parent}")
    # One unit of time is the product of a mean chunk, so that a ragged schedule compares with an even one.
    unit = Fraction(max(schedules[0].rows, 1), len(schedules))
    timeline = simulate(
        schedules, compute=lambda rows: rows / unit, transfer=lambda rows: ratio * rows / unit
    )
    console = Console()
    if not console.is_terminal:
        console = Console(width=max(80, 8 + 20 * len(schedules)))
    console.print(table(schedules))
    console.print(summary(schedules, timeline, ratio), highlight=False, soft_wrap=True)
    if args.out is not None:
        draw(schedules, timeline, ratio, args.out)
        console.print(f"timeline drawn to {args.out}", highlight=False, markup=False, soft_wrap=True)
    return 0


def _ratio(text: str) -> Fraction:
    try:
        ratio = Fraction(text)
    except (ValueError, ZeroDivisionError):
        raise UserError(f"--ratio {text}: expected a number or a fraction such as 0.5 or 2/3") from None
    if not 0 <= ratio <= 10**9:
        raise UserError(f"--ratio {text}: must not be negative, nor above 10**9")
    return ratio


def _schedules(args: argparse.Namespace) -> "list[Schedule]":
    from flashtrain.comm import schedule

    world = args.world
    if world is None:
        world = len(args.rows) if args.rows and len(args.rows) > 1 else 4
    if world < 1:
        raise UserError(f"--world {world}: there must be at least one rank")
    if args.subchunks < 1:
        raise UserError(f"--subchunks {args.subchunks}: a chunk has at least one piece")
    rows: Sequence[int] = args.rows or [args.subchunks] * world
    if min(rows) < 0:
        raise UserError(f"--rows {min(rows)}: must not be negative")
    if args.rows and len(rows) == 1:
        rows = schedule.split_rows(rows[0], world)
    if len(rows) != world:
        raise UserError(
            f"--rows gives {len(rows)} row counts for --world {world}: give one for each rank, or one"
        )
    build = getattr(schedule, args.op)
    try:
        return [build(rows, rank, kind=args.kind, subchunks=args.subchunks) for rank in range(world)]
    except ValueError as error:
        raise UserError(f"--op {args.op} --kind {args.kind}: {error}") from None


def label(schedule: "Schedule", chunk: int) -> str:
    """The owner of a chunk and, where chunks are cut, the piece: ``2`` or ``2.1``."""
    owner, piece = divmod(chunk, schedule.subchunks)
    return f"{owner}.{piece}" if schedule.subchunks > 1 else str(owner)


def table(schedules: "Sequence[Schedule]") -> "Table":
    """One row a step, one column a rank: computed chunk, sends, arrivals; own chunks are starred."""
    from rich.table import Table

    first = schedules[0]
    title = f"{first.op} {first.kind}: computed chunk (* own), sends (→ rank), arrivals (← rank)"
    grid = Table(title=title, title_justify="left", title_style="bold")
    grid.add_column("step", justify="right")
    for one in schedules:
        grid.add_column(f"rank {one.rank}")
    for index in range(len(first.steps)):
        cells = []
        for one in schedules:
            step = one.steps[index]
            own = "*" if step.compute in one.own else " "
            parts = [f"[bold]{label(one, step.compute)}{own}[/bold]"]
            parts += [f"[green]{label(one, send.chunk)}→{send.dst}[/green]" for send in step.sends]
            parts += [f"[cyan]{label(one, expect.chunk)}←{expect.src}[/cyan]" for expect in step.expects]
            cells.append(" ".join(parts))
        grid.add_row(str(index), *cells)
    return grid


def _bound(schedules: "Sequence[Schedule]", ratio: Fraction) -> Fraction | None:
    """The closed form, which holds for equal chunks alone."""
    from flashtrain.comm.simulate import bound

    first = schedules[0]
    if len({chunk.rows for chunk in first.chunks}) > 1 or not first.rows:
        return None
    return bound(first.world, 1, ratio, first.subchunks)


def _number(value: Fraction | int) -> str:
    return f"{float(value):.4g}"


def summary(schedules: "Sequence[Schedule]", timeline: "Timeline", ratio: Fraction) -> str:
    """Makespan, bound and hidden share in one line; times in units of a mean chunk's product."""
    limit = _bound(schedules, ratio)
    hidden = timeline.hidden
    parts = [
        f"t_m/t_c {_number(ratio)}",
        f"makespan {_number(timeline.makespan)} t_c",
        "bound not defined for ragged chunks" if limit is None else f"bound {_number(limit)} t_c",
        "nothing to transfer" if hidden is None else f"{float(hidden):.1%} of the transfers hidden",
    ]
    return " · ".join(parts)


def draw(schedules: "Sequence[Schedule]", timeline: "Timeline", ratio: Fraction, out: Path) -> None:
    """Draw ``timeline`` to the image ``out``: three lanes a rank, chunks coloured by owner, own ones hatched.

    Raises UserError if the file's ending names no image format or the file cannot be written.
    """
    from matplotlib import colormaps
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    first, world = schedules[0], len(schedules)
    colours: Sequence[Any] = PALETTE
    if world > len(PALETTE):
        # Darkened, for the labels are white.
        spectrum = [colormaps["turbo"](0.05 + 0.9 * rank / world) for rank in range(world)]
        colours = [tuple(0.8 * part for part in colour[:3]) for colour in spectrum]
    figure = Figure(figsize=(11, min(1.3 + 0.26 * BLOCK * world, 20)), dpi=150, layout="constrained")
    axes = figure.subplots()
    end = float(timeline.makespan) or 1.0
    for event in timeline.events:
        if event.end > event.start:
            _draw_event(axes, first, event, colours[first.chunks[event.chunk].owner], end)
    axes.axvline(end, color="#111827", linewidth=1.2, zorder=4)
    _draw_frame(axes, world, end)
    limit = _bound(schedules, ratio)
    pieces = f", {first.subchunks} pieces a chunk" if first.subchunks > 1 else ""
    reached = "ragged chunks" if limit is None else f"makespan / bound = {_number(timeline.makespan / limit)}"
    hidden = "" if timeline.hidden is None else f" · {float(timeline.hidden):.0%} of the transfers hidden"
    axes.set_title(
        f"{first.op}, {first.kind}, W = {world}{pieces}, t_m/t_c = {_number(ratio)}\n"
        f"makespan {_number(timeline.makespan)} t_c · {reached}{hidden}",
        fontsize=11,
        loc="left",
    )
    if world <= len(PALETTE):
        handles = [Patch(facecolor=colours[rank], label=f"chunk of rank {rank}") for rank in range(world)]
        handles.append(Patch(facecolor="#9ca3af", edgecolor="white", hatch="////", label="own chunk"))
        columns = min(6, len(handles))
        figure.legend(handles=handles, loc="outside lower center", ncols=columns, frameon=False, fontsize=8)
    try:
        figure.savefig(out)
    except (ValueError, OSError) as error:
        raise UserError(f"--out {out}: {error}") from None


def _draw_event(axes: "Axes", schedule: "Schedule", event: "Event", colour: Any, end: float) -> None:
    """One bar with its chunk, and the peer of a transfer where there is room for it."""
    lane = [engine for engine, _ in LANES].index(event.engine)
    own = event.engine == "compute" and event.rank == schedule.chunks[event.chunk].owner
    start, width = float(event.start), float(event.end - event.start)
    bottom, height = event.rank * BLOCK + lane + 0.06, 0.88
    axes.barh(
        bottom,
        width,
        left=start,
        height=height,
        align="edge",
        color=colour,
        edgecolor="white",
        linewidth=0.8,
        hatch="////" if own else None,
        alpha=1.0 if event.engine == "compute" else 0.82,
        zorder=2,
    )
    text = label(schedule, event.chunk)
    arrow = {"compute": "", "egress": f"→{event.peer}", "ingress": f"←{event.peer}"}[event.engine]
    # A character takes about 0.8 % of the axes' width. Without room for the longest, all omit the peer.
    room = width / end / 0.008
    longest = len(label(schedule, len(schedule.chunks) - 1)) + len(f"→{schedule.world - 1}")
    if room >= len(text):
        axes.text(
            start + width / 2,
            bottom + height / 2,
            text + arrow if room >= longest else text,
            ha="center",
            va="center",
            fontsize=8,
            color="white",
            fontweight="bold",
            bbox={"boxstyle": "round,pad=0.25", "fc": colour, "ec": "none"} if own else None,
            zorder=3,
        )


def _draw_frame(axes: "Axes", world: int, end: float) -> None:
    """Names of ranks and lanes, a grey field behind each rank, and the time axis."""
    ticks, names = [], []
    for rank in range(world):
        top = rank * BLOCK
        axes.axhspan(top - 0.1, top + len(LANES) + 0.1, color="#f3f4f6", zorder=0)
        axes.text(
            -0.075,
            top + len(LANES) / 2,
            f"rank {rank}",
            transform=axes.get_yaxis_transform(),
            ha="right",
            va="center",
            fontsize=10,
            fontweight="bold",
        )
        for lane, (_, name) in enumerate(LANES):
            ticks.append(top + lane + 0.5)
            names.append(name)
    axes.set(xlim=(0, end * 1.01), ylim=((world - 1) * BLOCK + len(LANES) + 0.25, -0.25), xlabel="time / t_c")
    axes.set_yticks(ticks, names, fontsize=8, color="#4b5563")
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x", color="#d1d5db", linewidth=0.6, zorder=1)
    axes.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
