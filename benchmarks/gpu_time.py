"""What benchmarks of one GPU share: calls timed in turn by CUDA events, kernels by the profiler, errors."""

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
Call = Callable[[], Any]


def race(
    calls: Mapping[str, Call],
    repeats: int,
    cycles: int,
    prepare: Mapping[str, Call] | None = None,
    waits: bool = False,
) -> dict[str, float]:
    """Median milliseconds of each call, in turn; the queue is never empty.

    The GPU sleeps for ``cycles`` before each call, in which the host enqueues all of it. ``prepare`` is what
    precedes a call untimed. ``waits``: the host waits for each call, so that the memory of two is not
    needed at once.
    """
    before_it = prepare or {}
    taken: dict[str, list[Any]] = {name: [] for name in calls}
    for repeat in range(-2, repeats):
        for name, call in calls.items():
            if name in before_it:
                before_it[name]()
            if repeat < 0:
                call()
            elif DEVICE == "cpu":
                start = time.perf_counter()
                call()
                taken[name].append((time.perf_counter() - start) * 1e3)
            else:
                before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                torch.cuda._sleep(cycles)
                before.record()
                call()
                after.record()
                taken[name].append((before, after))
                if waits:
                    torch.cuda.synchronize()
    if DEVICE == "cuda":
        torch.cuda.synchronize()
        taken = {name: [a.elapsed_time(b) for a, b in pairs] for name, pairs in taken.items()}
    return {name: round(statistics.median(times), 4) for name, times in taken.items()}


def medians(calls: Mapping[str, Call], rounds: int = 12, cycles: int = 2_000_000) -> dict[str, float]:
    """``race`` of calls that each need much memory."""
    return race(calls, rounds, cycles, waits=True)


def kernel_ms(call: Call, repeats: int = 8) -> dict[str, float]:
    """Milliseconds of a call in each kernel."""
    call()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as found:
        for _ in range(repeats):
            call()
        torch.cuda.synchronize()
    return {
        event.key[:60]: round(event.device_time_total / repeats / 1e3, 4)
        for event in found.key_averages()
        if event.device_time_total
    }


def error(found: Tensor, true: Tensor) -> float:
    """Relative error; NaN stays NaN."""
    return float((found.double() - true.double()).norm() / true.double().norm())


class poisoned:
    """Fresh memory holds NaN inside, so that an element that nobody writes is seen."""

    def __enter__(self) -> None:
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = True

    def __exit__(self, *_: Any) -> None:
        torch.use_deterministic_algorithms(False)
