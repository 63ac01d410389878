"""Interleaved timing on all ranks at once."""

import gc
import resource
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

# A call gets the number of the input set that it is to work on; what it returns is freed untimed.
Call = Callable[[int], Any]

FEWEST = 7


@dataclass(frozen=True)
class Samples:
    """One value a repetition: the maximum over the ranks.

    ``wall`` is what a step waits for. ``processor`` (all threads of the process) and ``faults`` (pages that
    the kernel had to map) say what it is spent on, and move less when others use the machine.
    """

    wall: torch.Tensor
    processor: torch.Tensor
    faults: torch.Tensor

    def summary(self) -> dict[str, float]:
        """Milliseconds: median, quartiles, their distance, minimum; processor time; faults."""
        values = {"processor": float(self.processor.median() * 1e3), "faults": float(self.faults.median())}
        return spread(self.wall * 1e3) | {name: round(value, 5) for name, value in values.items()}


def spread(values: torch.Tensor) -> dict[str, float]:
    """Median, quartiles, their distance and minimum of ``values [n]`` float64, to five digits."""
    low, middle, high = torch.quantile(values, torch.tensor([0.25, 0.5, 0.75]).double()).tolist()
    found = {"median": middle, "low": low, "high": high, "iqr": high - low, "min": float(values.min())}
    return {name: round(value, 5) for name, value in found.items()}


def measure(calls: Mapping[str, Call], *, repeats: int, seconds: float, sets: int) -> dict[str, Samples]:
    """Measure each call ``repeats`` times, A B C A B C ...

    Fewer repetitions, but at least ``FEWEST`` (or ``repeats``), where ``repeats`` would take longer than
    ``seconds``. The order within a round moves on by one each round, so that nobody always follows the
    same neighbour. A barrier, untimed, stands before each call. Collective over the default group.
    """
    for call in calls.values():
        for number in range(2):
            call(number % sets)
    trial = _rounds(list(calls.values()), 1, sets)
    affordable = int(seconds / max(float(trial[0].sum()), 1e-6))
    rounds = max(min(repeats, FEWEST), min(repeats, affordable))
    values = _rounds(list(calls.values()), rounds, sets)
    return {name: Samples(*values[:, index]) for index, name in enumerate(calls)}


def _rounds(calls: list[Call], rounds: int, sets: int) -> torch.Tensor:
    """``[wall, processor, faults][call][round]``."""
    values = torch.zeros(3, len(calls), rounds, dtype=torch.float64)
    gc.collect()
    gc.disable()
    try:
        for number in range(rounds):
            for offset in range(len(calls)):
                index = (number + offset) % len(calls)
                dist.barrier()
                faults, processor = _faults(), time.process_time()
                start = time.perf_counter()
                result = calls[index](number % sets)
                values[0, index, number] = time.perf_counter() - start
                values[1, index, number] = time.process_time() - processor
                values[2, index, number] = _faults() - faults
                del result
    finally:
        gc.enable()
    dist.all_reduce(values, dist.ReduceOp.MAX)
    return values


def _faults() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
