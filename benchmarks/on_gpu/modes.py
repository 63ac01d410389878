"""Two ways to time the same calls, all systems in turn on all ranks at once.

Launch-free: the device sleeps while the host issues a burst, so that no call waits for the host; the first
calls of a burst are dropped. Host-issued: each call starts at a barrier with nothing prepared. Replays of
CUDA graphs are timed as host-issued calls.
"""

import gc
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from on_gpu.ranks import Ranks
from timing import spread
from torch import Tensor

# A call gets the number of the input set that it is to work on.
Call = Callable[[int], Any]

BURST, LONG_BURST, DROPPED = 8, 5, 2
LONG = 2.0  # milliseconds; bursts of longer calls are shorter, as the device slows down under load
SLEEP = 12.0  # milliseconds
FEWEST_ROUNDS, FEWEST_CALLS = 3, 10


@dataclass(frozen=True)
class Times:
    """``ms [calls]``: milliseconds of each call on the slowest rank.

    ``host``: milliseconds that issuing one takes, the median of the rank whose host is slowest. ``late``:
    part of the launch-free bursts in which a device awoke before the host was done.
    """

    ms: Tensor
    host: float
    late: float = 0.0

    def summary(self) -> dict[str, float]:
        """Median, quartiles and minimum of ``ms``, how many calls, and the rest."""
        host = {"host": round(self.host, 5), "late": round(self.late, 3)}
        return spread(self.ms) | {"calls": len(self.ms)} | host


def launch_free(
    calls: Mapping[str, Call], ranks: Ranks, *, seconds: float, sets: int, burst: int | None = None
) -> dict[str, Times]:
    """Times of ``Settings.calls`` calls each or a few more, or of what fits in ``seconds``. Collective."""
    # Bursts of systems take turns A B C A B C; within a burst the inputs rotate.
    trial = _bursts(calls, ranks, 1, burst or LONG_BURST, dict.fromkeys(calls, 4 * SLEEP), sets)
    if burst is None:
        burst = LONG_BURST if max(float(times.ms.median()) for times in trial.values()) > LONG else BURST
    sleeps = {name: max(SLEEP, 3 * burst * times.host) for name, times in trial.items()}
    one = sum(sleeps[name] + burst * float(times.ms.median()) for name, times in trial.items()) / 1e3
    rounds = _rounds(seconds, one, FEWEST_ROUNDS, math.ceil(ranks.settings.calls / (burst - DROPPED)))
    return _bursts(calls, ranks, rounds, burst, sleeps, sets)


def host_issued(calls: Mapping[str, Call], ranks: Ranks, *, seconds: float, sets: int) -> dict[str, Times]:
    """Times of ``Settings.calls`` calls each, or of what fits in ``seconds``. Collective."""
    started = time.perf_counter()
    _one_by_one(calls, ranks, 2, sets)
    taken = torch.tensor([time.perf_counter() - started], dtype=torch.float64)
    rounds = _rounds(seconds, float(ranks.slowest(taken)) / 2, FEWEST_CALLS, ranks.settings.calls)
    return _one_by_one(calls, ranks, rounds, sets)


def _rounds(seconds: float, one: float, fewest: int, most: int) -> int:
    return max(fewest, min(most, int(seconds / max(one, 1e-6))))


def _bursts(
    calls: Mapping[str, Call], ranks: Ranks, rounds: int, burst: int, sleeps: Mapping[str, float], sets: int
) -> dict[str, Times]:
    device, kept = ranks.device, burst - DROPPED
    names = list(calls)
    shape = (len(names), rounds, kept)
    ms, host = torch.zeros(shape, dtype=torch.float64), torch.zeros(shape, dtype=torch.float64)
    late = torch.zeros(len(names), rounds, dtype=torch.float64)
    marks, issued = [device.mark() for _ in range(burst + 1)], [0.0] * burst
    with _no_collector():
        for number in range(rounds):
            for offset in range(len(names)):
                index = (number + offset) % len(names)
                call = calls[names[index]]
                device.synchronize()
                ranks.meet()
                device.sleep(sleeps[names[index]])
                ranks.align()
                marks[0].record()
                for position in range(burst):
                    started = time.perf_counter()
                    result = call((number * burst + position) % sets)
                    issued[position] = (time.perf_counter() - started) * 1e3
                    marks[position + 1].record()
                    del result
                late[index, number] = not device.asleep(marks[0])
                device.synchronize()
                for position in range(DROPPED, burst):
                    ms[index, number, position - DROPPED] = marks[position].elapsed_time(marks[position + 1])
                host[index, number] = torch.tensor(issued[DROPPED:], dtype=torch.float64)
            ranks.alive()
    ms, late = ranks.slowest(ms), ranks.slowest(late)
    issuing = ranks.slowest(host.flatten(1).median(1).values)
    return {
        name: Times(ms[index].flatten(), float(issuing[index]), float(late[index].mean()))
        for index, name in enumerate(names)
    }


def _one_by_one(calls: Mapping[str, Call], ranks: Ranks, rounds: int, sets: int) -> dict[str, Times]:
    device, names = ranks.device, list(calls)
    ms, host = (torch.zeros(len(names), rounds, dtype=torch.float64) for _ in range(2))
    begin, end = device.mark(), device.mark()
    with _no_collector():
        for number in range(rounds):
            for offset in range(len(names)):
                index = (number + offset) % len(names)
                device.synchronize()
                ranks.meet()
                begin.record()
                started = time.perf_counter()
                result = calls[names[index]](number % sets)
                host[index, number] = (time.perf_counter() - started) * 1e3
                end.record()
                device.synchronize()
                ms[index, number] = begin.elapsed_time(end)
                del result
            ranks.alive()
    ms, issuing = ranks.slowest(ms), ranks.slowest(host.median(1).values)
    return {name: Times(ms[index], float(issuing[index])) for index, name in enumerate(names)}


class _no_collector:
    """Keep Python's garbage collector out of the timed calls."""

    def __enter__(self) -> None:
        gc.collect()
        gc.disable()

    def __exit__(self, *_: object) -> None:
        gc.enable()
