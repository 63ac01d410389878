"""Which way a product takes: measured once for its shape, the same on all ranks, kept on disk.

The fused ways share their bits, so among them the choice is free. Another way has its own (those of
cuBLAS), so it must be faster by some. A choice once made holds as long as the file, the GPUs and the
versions stay the same.
"""

import json
import logging
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import cache
from math import log2
from pathlib import Path
from typing import Any, Protocol

import torch

log = logging.getLogger("flashtrain.comm")

# How much faster another way must be than the fused ones, and a fused one than the first that is named.
MARGIN, PREFERENCE = 0.03, 0.01
_FINALISTS = 5
_ROUNDS = 5
_BURST, _DROPPED = 6, 2
_SLEEP_CYCLES = 2_000_000  # about a millisecond, in which the host issues a burst
_REST = 4  # times a burst that the GPU idles before the next: hot, it throttles whoever comes then

# What makes each way, by name.
Candidates = Mapping[str, Callable[[], Any]]


def folder() -> Path:
    """Where choices are kept: ``flashtrain`` in the user's cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "flashtrain"


def bucket(rows: int) -> int:
    """The number of rows that stands for ``rows``: batches of nearly one size share a choice."""
    return round(2 ** (round(4 * log2(rows)) / 4)) if rows > 1 else rows


class Members(Protocol):
    """Who chooses together: this process is ``rank`` of ``world``."""

    @property
    def rank(self) -> int:
        """From 0 on."""
        ...

    @property
    def world(self) -> int:
        """How many choose."""
        ...


def choose(
    name: str,
    candidates: Candidates,
    call: Callable[[Any], Any],
    mover: Members,
    exchange: Callable[[str], list[str]],
    device: torch.device,
) -> Any:
    """The fastest of ``candidates``, made; ``name`` tells shapes apart. Collective over ``mover``'s group.

    ``call(way)`` runs one on real operands and is repeated; its results are dropped. Names that begin with
    "fused" share their bits; the first is what would be taken unmeasured. Raises TransportError if a peer
    fails.
    """
    kept = _Kept(_key(device, mover.world))
    # Rank 0 decides: another rank's file may hold something else.
    picked = exchange(kept.choices.get(name, "") if mover.rank == 0 else "")[0]
    if picked in candidates:
        return candidates[picked]()
    made: dict[str, Any] = {}
    if mover.rank == 0:
        made = {title: make() for title, make in candidates.items()}
    exchange("")  # one rank compiles, the others find the kernels on disk
    if mover.rank != 0:
        made = {title: make() for title, make in candidates.items()}
    times = _measure(made, call, exchange)
    best = _best(times, next(iter(candidates)))
    if mover.rank == 0:
        kept.add(name, best)
        table = ", ".join(f"{title} {times[title]:.3f}" for title in sorted(times, key=times.__getitem__))
        log.info("tuned %s: %s (ms: %s)", name, best, table)
    return made[best]


def _best(times: dict[str, float], first: str) -> str:
    """The fastest; ties go to the fused ways if there are any, and among them to ``first``."""
    fused = {title for title in times if title.startswith("fused")} or times.keys()

    def handicapped(title: str) -> float:
        margin = -PREFERENCE if title == first else 0.0 if title in fused else MARGIN
        return times[title] * (1.0 + margin)

    return min(times, key=handicapped)


def _measure(
    ways: dict[str, Any], call: Callable[[Any], Any], exchange: Callable[[str], list[str]]
) -> dict[str, float]:
    """Milliseconds of the first of ``ways`` and the fastest, of the slowest rank; the same on every rank."""
    for way in ways.values():
        for _ in range(2):
            call(way)
    first = _agreed({title: _burst(title, way, call) for title, way in ways.items()}, exchange)
    field = sorted(first, key=first.__getitem__)[:_FINALISTS]
    field += [title for title in list(ways)[:1] if title not in field]
    rounds = [{title: _burst(title, ways[title], call) for title in field} for _ in range(_ROUNDS)]
    return _agreed({title: statistics.median(one[title] for one in rounds) for title in field}, exchange)


def _burst(title: str, way: Any, call: Callable[[Any], Any]) -> float:
    """Milliseconds of one call among several issued ahead, or of issuing it, where that takes longer.

    A way that keeps the host busy for long counts twice what it takes there: the host has more to issue.
    """
    torch.cuda.synchronize()
    torch.cuda._sleep(_SLEEP_CYCLES)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    issuing = time.perf_counter()
    for number in range(_BURST):
        if number == _DROPPED:
            begin.record()
        call(way)
    issued = (time.perf_counter() - issuing) * 1e3
    end.record()
    torch.cuda.synchronize()
    taken: float = begin.elapsed_time(end)
    # By the device's time: the host's counts how long others rested, and ranks would rest ever longer.
    time.sleep(_REST * taken * 1e-3)
    busy = issued / _BURST * (1 if title.startswith("fused") else 2)
    return max(taken / (_BURST - _DROPPED), busy)


def _agreed(times: dict[str, float], exchange: Callable[[str], list[str]]) -> dict[str, float]:
    everyone = [json.loads(text) for text in exchange(json.dumps(times))]
    return {title: max(one[title] for one in everyone) for title in times}


@cache
def _key(device: torch.device, world: int) -> str:
    """What a choice depends on besides the shape."""
    import triton

    parts = (torch.cuda.get_device_name(device), f"{world} ranks", f"torch {torch.__version__}")
    return "; ".join((*parts, f"cuda {torch.version.cuda}", f"triton {triton.__version__}"))


class _Kept:
    """The choices of one machine and its versions, in one file for all."""

    def __init__(self, key: str) -> None:
        self.key, self.path = key, folder() / "tuned.json"
        self.choices: dict[str, str] = self._read().get(key, {})

    def _read(self) -> dict[str, dict[str, str]]:
        try:
            found = json.loads(self.path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return {}
        except (OSError, ValueError) as error:
            log.warning("%s cannot be read (%s): products are measured again", self.path, error)
            return {}
        return found if isinstance(found, dict) else {}

    def add(self, name: str, choice: str) -> None:
        """Keep ``choice`` beside what others may have written meanwhile; without a disk nothing is kept."""
        everything = self._read()
        everything.setdefault(self.key, {})[name] = choice
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(
                "w", dir=self.path.parent, suffix=".json", delete=False, encoding="utf-8"
            ) as file:
                json.dump(everything, file, indent=1, sort_keys=True)
            os.replace(file.name, self.path)
        except OSError as error:
            log.warning("the choice for %s is not kept: %s", name, error)
            with suppress(OSError, UnboundLocalError):
                os.unlink(file.name)
