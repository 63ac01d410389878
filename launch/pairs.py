"""``flashtrain doctor --nodes``: whether the hosts of a run fit together, found out before the run."""

import argparse
import json
import platform
import time
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import torch
import torch.distributed as dist

import flashtrain
from flashtrain.checkpoint.ranks import Ranks
from flashtrain.errors import TransportError, UserError
from flashtrain.train import places, ranks

TIMEOUT = 60.0  # seconds
CLOCKS_WITHIN = 0.5  # seconds, beyond what the network's own delay explains
PING_PONGS, LARGE_PING_PONGS, LARGE_BYTES = 20, 3, 8 << 20
SLOW = 0.5  # of the median bandwidth among pairs on different hosts
SAME_EVERYWHERE = ("python", "torch", "flashtrain", "extension", "driver", "nccl")


def run(args: argparse.Namespace) -> int:
    """Examine the ranks that torchrun has started, and show what was found on rank 0; 1 if it is not well.

    Raises UserError for a single rank, and TransportError that names a pair that cannot talk.
    """
    with ranks.joined(TIMEOUT) as device:
        if dist.get_world_size() < 2:
            raise UserError(
                "doctor --nodes compares ranks: start it on every host as flashtrain nodes prints it "
                "(flashtrain nodes torchrun --nodes 2 --processes 1 --head HOST -- doctor --nodes)"
            )
        facts = examine(device)
        if dist.get_rank() == 0:
            print(json.dumps(facts, indent=2)) if args.json else _show(facts)
    return 1 if facts["problems"] else 0


def examine(device: torch.device) -> dict[str, Any]:
    """Facts as plain data, the same on every rank: places, versions, clocks, pairs. Collective."""
    everyone = Ranks(None)
    found = places.survey(device)
    versions = everyone.every(_versions)
    clocks = _clocks(everyone)
    measured = _measure(device)
    pairs = [pair for part in everyone.every(lambda: measured) for pair in part]
    facts: dict[str, Any] = {
        "places": [asdict(place) for place in found],
        "versions": versions,
        "clock_offset_s": clocks,
        "pairs": sorted(pairs, key=lambda pair: (pair["from"], pair["to"])),
    }
    facts["problems"] = problems(facts)
    return facts


def problems(facts: dict[str, Any]) -> list[str]:
    """What in the facts would hurt a run, one line each."""
    hosts = [place["host"] for place in facts["places"]]
    found = []
    for name in SAME_EVERYWHERE:
        by_version: dict[str, list[int]] = {}
        for rank, versions in enumerate(facts["versions"]):
            by_version.setdefault(str(versions[name]), []).append(rank)
        if len(by_version) > 1:
            who = "; ".join(
                f"{version} on {', '.join(sorted({hosts[rank] for rank in on}))} (rank {on[0]})"
                for version, on in by_version.items()
            )
            found.append(f"{name} differs: {who}: install the same everywhere")
    told = set()
    for rank, (offset, uncertain) in enumerate(facts["clock_offset_s"]):
        if abs(offset) > CLOCKS_WITHIN + uncertain and hosts[rank] not in told:
            told.add(hosts[rank])
            direction = "ahead of" if offset > 0 else "behind"
            found.append(
                f"the clock of {hosts[rank]} is {abs(offset):.1f} s {direction} that of {hosts[0]}: run NTP"
            )
    across = [pair for pair in facts["pairs"] if hosts[pair["from"]] != hosts[pair["to"]]]
    rates = sorted(pair["gigabytes_per_s"] for pair in across)
    usual = rates[len(rates) // 2] if rates else 0.0
    for pair in across:
        if pair["gigabytes_per_s"] < SLOW * usual:
            ends = " and ".join(f"rank {pair[end]} ({hosts[pair[end]]})" for end in ("from", "to"))
            found.append(
                f"{ends} exchange {pair['gigabytes_per_s']:.2f} GB/s where the median pair of hosts has "
                f"{usual:.2f}: look at their cables and switches"
            )
    return found


def rounds(world: int) -> Iterator[list[tuple[int, int]]]:
    """All pairs of ranks in rounds of disjoint ones (the circle method), lower rank first."""
    seats = list(range(world)) + ([-1] if world % 2 else [])
    for _ in range(len(seats) - 1):
        half = len(seats) // 2
        opposite = zip(seats[:half], reversed(seats[half:]), strict=True)
        yield [(min(pair), max(pair)) for pair in opposite if -1 not in pair]
        seats = [seats[0], seats[-1], *seats[1:-1]]


def _versions() -> dict[str, str | None]:
    from flashtrain.comm.transport import host

    gpus = torch.cuda.is_available()
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "flashtrain": flashtrain.__version__,
        "extension": "there" if host.available() else "missing",
        "driver": _driver() if gpus else None,
        "nccl": ".".join(map(str, torch.cuda.nccl.version())) if gpus else None,
    }


def _driver() -> str | None:
    try:
        with open("/proc/driver/nvidia/version", encoding="ascii") as file:
            return file.readline().strip()
    except OSError:
        return None


def _clocks(everyone: Ranks) -> list[list[float]]:
    """Of each rank, how far its clock is ahead of rank 0's and how uncertain that is, in seconds."""
    best = [0.0, 0.0]
    for peer in range(1, everyone.world):
        if everyone.rank in (0, peer):
            if everyone.rank == 0:
                _answer(peer)
            else:
                best = _offset()
    return everyone.every(lambda: best)


def _offset() -> list[float]:
    """As NTP does: the exchange with the shortest way there and back says most."""
    found = []
    theirs = torch.zeros(1, dtype=torch.float64)
    for _ in range(PING_PONGS):
        sent = time.time()
        dist.send(torch.zeros(1), 0)
        dist.recv(theirs, 0)
        received = time.time()
        found.append((received - sent, (sent + received) / 2 - float(theirs)))
    there_and_back, offset = min(found)
    return [offset, there_and_back / 2]


def _answer(peer: int) -> None:
    for _ in range(PING_PONGS):
        dist.recv(torch.zeros(1), peer)
        dist.send(torch.tensor([time.time()], dtype=torch.float64), peer)


def _measure(device: torch.device) -> list[dict[str, float]]:
    """Latency and bandwidth of this rank with each higher one; other pairs talk at the same time."""
    rank, found = dist.get_rank(), []
    for pairs in rounds(dist.get_world_size()):
        for first, second in pairs:
            if rank in (first, second):
                peer = second if rank == first else first
                try:
                    small = _ping_pong(peer, rank == first, 1, PING_PONGS, device)
                    large = _ping_pong(peer, rank == first, LARGE_BYTES, LARGE_PING_PONGS, device)
                except RuntimeError as error:
                    reason = str(error).splitlines()[0]
                    raise TransportError(f"rank {rank} cannot talk to peer rank {peer}: {reason}") from error
                if rank == first:
                    rate = LARGE_BYTES / large / 1e9
                    found.append({"from": first, "to": second, "latency_s": small, "gigabytes_per_s": rate})
    return found


def _ping_pong(peer: int, begins: bool, nbytes: int, times: int, device: torch.device) -> float:
    """Seconds of one way, the best of ``times`` after one to warm up."""
    ball, best = torch.zeros(nbytes, dtype=torch.uint8, device=device), float("inf")
    for attempt in range(times + 1):
        started = time.perf_counter()
        for sends in (begins, not begins):
            if sends:
                dist.send(ball, peer)
            else:
                dist.recv(ball, peer)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        if attempt:
            best = min(best, (time.perf_counter() - started) / 2)
    return best


def _show(facts: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    for line in places.describe([places.Place(**place) for place in facts["places"]]):
        console.print(line, markup=False, soft_wrap=True)
    table = Table(title="pairs of ranks", title_justify="left", title_style="bold")
    for name in ("ranks", "latency, µs", "GB/s one way"):
        table.add_column(name, justify="right")
    for pair in facts["pairs"]:
        latency, rate = f"{pair['latency_s'] * 1e6:.0f}", f"{pair['gigabytes_per_s']:.2f}"
        table.add_row(f"{pair['from']} - {pair['to']}", latency, rate)
    console.print(table)
    for problem in facts["problems"]:
        console.print(f"problem: {problem}", markup=False, soft_wrap=True)
    if not facts["problems"]:
        console.print("[green]these ranks fit together[/green]")
