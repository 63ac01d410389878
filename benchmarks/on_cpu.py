"""The benchmark on CPU ranks of this machine: plain product, gloo around it, and the op on each transport.

Measures everything in one run, repetition by repetition in turn, prints a table and writes
``overlap-cpu.json``. How to read it: NOTES.md beside this file. The calls are host-issued: each starts at a
barrier with nothing prepared.
"""

import argparse
import json
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import floors
import machine
import shapes
import systems
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from contest import DTYPES, QUIET, Ranks, Settings, measure_site
from rich.console import Console
from rich.table import Table

from flashtrain.comm import transport
from flashtrain.errors import UserError

RESULTS = Path(__file__).parent / "results"


def rank_main(rank: int, settings: Settings, folder: str) -> None:
    """One rank: measure everything; rank 0 writes what came out to ``folder``."""
    torch.set_num_threads(settings.threads_per_rank)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=settings.world
    )
    ranks = Ranks(settings)
    chosen = chosen_sites(settings)
    ways = {
        "gloo": systems.collectives(
            "column", ranks.gloo, systems.gather_tensor, systems.scatter_tensor, False
        ),
        **{name: systems.overlapped("column", group, "floor", False) for name, group in ranks.groups.items()},
    }
    limits, others = ranks.quietly(lambda: floors.floors(ways, settings.quick))
    result: dict[str, Any] = {"floors": {**limits, "others_share": round(others, 4)}, "rows": []}
    for site in chosen:
        result["rows"] += measure_site(site, ranks)
        if rank == 0:
            print(f"{site.shape} {site.name}", file=sys.stderr, flush=True)
    if rank == 0:
        Path(folder, "result.json").write_text(json.dumps(result))
    dist.barrier()
    transport.shutdown()
    dist.destroy_process_group()


def chosen_sites(settings: Settings) -> list[shapes.Site]:
    """The sites to measure; UserError if none, or if one does not divide by the ranks."""
    listed = shapes.quick() if settings.quick else shapes.cpu()
    chosen = [site for site in listed if settings.only in f"{site.shape} {site.name}"]
    if not chosen:
        raise UserError(
            f"--only {settings.only!r} matches no site; sites are called like '{listed[0].shape} qkv'"
        )
    for site in chosen:
        site.local(settings.world)
        if site.rows % settings.world:
            raise UserError(f"{site.shape}: gloo cannot scatter {site.rows} rows over {settings.world} ranks")
    return chosen


def run(settings: Settings) -> dict[str, Any]:
    """Start the ranks and return the whole report."""
    chosen_sites(settings)
    before = machine.load()
    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.spawn(rank_main, args=(settings, folder), nprocs=settings.world)
        measured = json.loads(Path(folder, "result.json").read_text())
    return {
        "benchmark": "overlap",
        "date": machine.date(),
        "machine": machine.facts(),
        "versions": machine.versions(),
        "load_average": {"before": before, "after": machine.load()},
        "settings": {**asdict(settings), "transport": asdict(transport.Settings()), "mode": "host-issued"},
        **measured,
        "summary": summarise(measured["rows"]),
    }


def summarise(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Where the op on host is worst against gloo, and where it is slower, and which rows were disturbed."""

    def standing(row: dict[str, Any]) -> dict[str, Any]:
        ratios = {"gloo_over_host": row["gloo_over"]["host"], "paired": row["gloo_over_paired"]["host"]}
        return {"at": _title(row), **ratios, "others_share": row["others_share"]}

    return {
        "worst": standing(min(rows, key=lambda row: row["gloo_over"]["host"])),
        "host_slower_than_gloo": [standing(row) for row in rows if row["gloo_over"]["host"] < 1],
        "disturbed": [_title(row) for row in rows if row["others_share"] > QUIET],
    }


def _title(row: dict[str, Any]) -> str:
    return f"{row['shape']} {row['name']} {row['direction']}"


def show(report: dict[str, Any], console: Console) -> None:
    """Print the table and the verdict."""
    table = Table(
        title="milliseconds: median over repetitions of the slowest rank (± half the quartile distance)"
    )
    for heading in ("site", "direction", "local M N K"):
        table.add_column(heading, no_wrap=True)
    for heading in (
        "plain",
        "gloo",
        "host",
        "group",
        "G gloo",
        "G host",
        "gloo/host",
        "gloo/group",
        "MB sent",
        "n",
    ):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in report["rows"]:
        times = (row["ms"][name] for name in ("plain", "gloo", "host", "group"))
        ratio = row["gloo_over"]["host"]
        table.add_row(
            f"{row['shape']} {row['name']}",
            row["direction"],
            " ".join(map(str, row["local_mnk"])),
            *(f"{time['median']:.3f} ±{time['iqr'] / 2:.3f}" for time in times),
            f"{row['G']['gloo']:.2f}",
            f"{row['G']['host']:.2f}",
            f"{ratio:.2f}" if ratio >= 1 else f"[bold red]{ratio:.2f}[/]",
            f"{row['gloo_over']['group']:.2f}",
            f"{row['per_call']['host']['bytes_sent'] / 1e6:.2f}",
            str(row["repeats"]),
            f"{row['others_share']:.0%}",
        )
    console.print(table)
    console.print("floors:", report["floors"])
    summary = report["summary"]
    console.print(f"worst gloo/host: {_words(summary['worst'])}")
    slower = [_words(standing) for standing in summary["host_slower_than_gloo"]]
    console.print("host slower than gloo:", "; ".join(slower) or "nowhere")
    disturbed = len(summary["disturbed"])
    console.print(
        f"others used more than {QUIET:.0%} of the cores in {disturbed} of {len(report['rows'])} rows"
    )


def _words(standing: dict[str, Any]) -> str:
    return (
        f"{standing['gloo_over_host']:.2f} at {standing['at']} "
        f"(within repetitions {standing['paired']:.2f}, others {standing['others_share']:.0%})"
    )


def parse(arguments: list[str]) -> tuple[Settings, Path]:
    """Settings and output folder of a command line."""
    parser = argparse.ArgumentParser(
        "overlap.py --device cpu",
        description=str(__doc__).splitlines()[0],
        epilog="for the GPUs: overlap.py --device cuda --help",
    )
    parser.add_argument("--world", type=int, default=2, help="ranks to start (default: 2)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the JSON")
    parser.add_argument("--repeats", type=int, help="repetitions of each call (default: 101; 3 with --quick)")
    parser.add_argument(
        "--seconds", type=float, default=12.0, help="most for one site and direction (default: 12)"
    )
    parser.add_argument(
        "--patience", type=float, default=0.0, help="seconds each may wait for idle cores (default: 0)"
    )
    parser.add_argument(
        "--dtype", choices=list(DTYPES), default="float32", help="of all operands (default: float32)"
    )
    parser.add_argument("--only", default="", help="measure only sites whose 'shape name' contains this text")
    parser.add_argument("--quick", action="store_true", help="one tiny shape: whether it runs, not how fast")
    given = parser.parse_args(arguments)
    if given.world < 2:
        raise UserError(f"--world is {given.world}; communication takes at least 2 ranks")
    if given.repeats is not None and given.repeats < 1:
        raise UserError(f"--repeats is {given.repeats}; it must be at least 1")
    settings = Settings(
        device="cpu",
        world=given.world,
        threads_per_rank=max(1, machine.cores() // given.world),
        dtype=given.dtype,
        repeats=given.repeats or (3 if given.quick else 101),
        seconds=given.seconds,
        patience=given.patience,
        input_sets=1 if given.quick else 4,
        quick=given.quick,
        only=given.only,
    )
    return settings, given.out


def main(arguments: list[str]) -> int:
    """Measure, print, write; the exit status. Raises UserError for settings that cannot be measured."""
    settings, out = parse(arguments)
    report = run(settings)
    show(report, Console(width=max(200, Console().width)))
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"overlap-{settings.device}.json"
    path.write_text(json.dumps(report, indent=1) + "\n")
    print(f"written: {path}")
    return 0
