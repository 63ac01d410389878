"""``flashtrain report``: a run's folder, or several, as one HTML page."""

import argparse
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flashtrain.errors import UserError

PAGE = "report.html"


def add_parser(subparsers: Any) -> None:
    """Register the ``report`` subcommand."""
    parser = subparsers.add_parser(
        "report",
        help="write a run's curves, events and settings as one HTML page",
        description=(
            "Write one HTML page that needs no network: loss, throughput, MFU, hidden communication, memory, "
            "events, settings and machine of a run. Several runs are laid over each other. A run may still "
            "be going on."
        ),
    )
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="the --out of a run")
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help=f"where to write the page (default: RUN/{PAGE}, of several runs {PAGE} in this folder)",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Read the runs, write the page, say where it is."""
    from flashtrain.metrics import history
    from flashtrain.metrics.page import render

    out = args.out or (args.runs[0] / PAGE if len(args.runs) == 1 else Path(PAGE))
    histories = [history.read(folder) for folder in args.runs]
    if out.is_dir():
        raise UserError(f"--out {out} is a folder; give the name of a file in it, such as {out / PAGE}")
    page = render(histories, names(args.runs), time.time())
    unfinished = out.with_name(f".{out.name}.part")
    try:
        unfinished.write_text(page, encoding="utf-8")
        os.replace(unfinished, out)
    except OSError as error:
        raise UserError(f"{out} cannot be written: {error.strerror}; choose another --out") from None
    for one in histories:
        for file, count in one.damaged.items():
            print(f"{one.out / file}: {count} damaged, left out")
    print(f"wrote {out}: open it in a browser")
    return 0


def names(folders: Sequence[Path]) -> list[str]:
    """What to call the runs: the shortest ends of their paths that differ."""
    parts = [folder.absolute().parts for folder in folders]
    for length in range(1, max(map(len, parts)) + 1):
        found = ["/".join(part[-length:]) for part in parts]
        if len(set(found)) == len(found):
            return found
    raise UserError(f"{folders[0]} is given twice; name each run once")
