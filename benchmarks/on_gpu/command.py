"""Run the benchmark of the GPUs: start the ranks, watch them, show what they wrote.

One run: one rank a GPU, all systems in turn on the same random tensors, which rotate beyond the cache; the
slowest rank counts; medians over calls. ``modes`` says how calls are timed, ``score`` what times mean,
``forward``, ``backward``, ``data_parallel`` and ``graphs`` what competes.
"""

import faulthandler
import json
import logging
import os
import signal
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from on_gpu import backward, data_parallel, forward, graphs, tables
from on_gpu.ranks import Ranks
from on_gpu.report import Report, save, summarise
from on_gpu.settings import Settings, parse, switch_multicast_off
from rich.console import Console

from flashtrain.comm import transport

PARTS = {
    "forward": forward.measure,
    "host": forward.measure_host,
    "backward": backward.measure,
    "dp": data_parallel.measure,
    "graph": graphs.measure,
}


def rank_main(rank: int, settings: Settings, folder: str, path: str) -> None:
    """One rank: all parts; rank 0 writes the report."""
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    logging.basicConfig(
        level=logging.INFO if rank == 0 else logging.WARNING, format=f"[%(name)s] rank {rank}: %(message)s"
    )
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=settings.world
    )
    ranks = Ranks(settings, rank, Path(folder, "heartbeat"))
    report = Report(Path(path) if rank == 0 else None, settings)
    for part in settings.parts:
        PARTS[part](ranks, report)
        if part == "forward":
            arena = getattr(transport.of(ranks.ours, ranks.device.device), "arena", None)
            report.note(part, {"arena_bytes": getattr(arena, "nbytes", None)})
    report.end("complete")
    dist.barrier()
    transport.shutdown()
    dist.destroy_process_group()


def run(settings: Settings, path: Path) -> str:
    """Start the ranks and wait; what went wrong, or nothing. They write ``path`` row by row."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)  # of an earlier run: it must not pass for this one's
    with tempfile.TemporaryDirectory() as folder:
        heartbeat = Path(folder, "heartbeat")
        heartbeat.write_text("starting")
        ranks = multiprocessing.spawn(
            rank_main, args=(settings, folder, str(path)), nprocs=settings.world, join=False
        )
        try:
            while not ranks.join(timeout=1.0):
                if time.time() - heartbeat.stat().st_mtime > settings.patience:
                    _kill(ranks)
                    return f"no progress for {settings.patience:.0f} s since: {heartbeat.read_text()}"
        except (multiprocessing.ProcessRaisedException, multiprocessing.ProcessExitedException) as error:
            return str(error)
    return ""


def _kill(ranks: multiprocessing.ProcessContext) -> None:
    """End ranks that hang, after each has written to stderr where it stands."""
    for process in ranks.processes:
        with suppress(ProcessLookupError):
            os.kill(process.pid, signal.SIGUSR1)
    time.sleep(1.0)
    for process in ranks.processes:
        process.kill()
        process.join()


def main(arguments: list[str]) -> int:
    """Measure, print, write; the exit status. Raises UserError for settings that cannot be measured."""
    settings, path = parse(arguments)
    switch_multicast_off()
    problem = run(settings, path)
    if path.exists():
        data = json.loads(path.read_text())
        if problem:
            data["ended"] = next((line for line in reversed(problem.splitlines()) if line.strip()), "failed")
            save(path, data | {"summary": summarise(data)})
        tables.show(data, Console(width=max(200, Console().width)))
        print(f"written: {path}")
    if problem:
        print(problem, file=sys.stderr)
    return 1 if problem else 0
