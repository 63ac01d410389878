"""Callbacks for chosen steps: a profiler trace, a memory snapshot; one file a rank."""

import json
import logging
import os
from collections.abc import Collection
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from flashtrain.methods.callback import Callback, Run
from flashtrain.metrics.report import StepMetrics

_log = logging.getLogger(__name__)

# Allocations and frees that a snapshot can look back on.
_HISTORY = 100_000


class Profiler(Callback):
    """torch's profiler over ``steps``; a trace for each stretch of consecutive ones.

    Writes out/profile/steps-12-14.rank0.json.gz, in Chrome's trace format: open it in ui.perfetto.dev or
    chrome://tracing. A traced step is slower than others, so its metrics are no measurement.
    """

    def __init__(self, steps: Collection[int], rank: int) -> None:
        self.steps, self.rank = frozenset(steps), rank
        self._profile: Any = None
        self._first = self._last = 0

    def before_step(self, step: int) -> None:
        if step not in self.steps or self._profile is not None:
            return
        activities = [ProfilerActivity.CPU]
        if torch.cuda.is_available():
            activities.append(ProfilerActivity.CUDA)
        self._first = self._last = step
        # One cycle; without acc_events torch warns that a second one would drop the first.
        self._profile = profile(activities=activities, record_shapes=True, acc_events=True)
        self._profile.start()

    def waits_for(self, step: int) -> bool:
        # A stretch begins and ends with nothing under way.
        return (step in self.steps) != (step + 1 in self.steps)

    def on_start(self, run: Run) -> None:
        self._folder = run.out / "profile"

    def on_step(self, metrics: StepMetrics) -> None:
        self._last = metrics.step
        if metrics.step + 1 not in self.steps:
            self._write()

    def on_end(self, run: Run) -> None:
        self._write()  # what there is of a stretch that a failure cut short

    def _write(self) -> None:
        if self._profile is None:
            return
        stopped, self._profile = self._profile, None
        stopped.stop()
        steps = f"step-{self._first}" if self._first == self._last else f"steps-{self._first}-{self._last}"
        target = self._folder / f"{steps}.rank{self.rank}.json.gz"
        self._folder.mkdir(parents=True, exist_ok=True)
        unfinished = target.with_name(f".{target.name}")  # torch compresses what ends in .gz
        stopped.export_chrome_trace(str(unfinished))
        os.replace(unfinished, target)
        _log.info("wrote %s", target)


class MemorySnapshot(Callback):
    """What the CUDA allocator holds after each of ``steps``, with the Python stacks that asked for it.

    Writes out/memory/step-12.rank0.json, the dictionary of ``torch.cuda.memory._snapshot`` as JSON;
    ``torch.cuda._memory_viz.trace_plot(json.load(file))`` makes the page of pytorch.org/memory_viz of it.
    Recording the stacks slows every step a little. On the CPU there is no such allocator: one log line says
    so and the callback stays off.
    """

    def __init__(self, steps: Collection[int], rank: int, device: torch.device) -> None:
        self.steps, self.rank, self.device = frozenset(steps), rank, device
        self._recording = False

    def on_start(self, run: Run) -> None:
        if self.device.type != "cuda":
            _log.info("no memory snapshots: this run is on the %s", self.device.type.upper())
            return
        self._folder = run.out / "memory"
        torch.cuda.memory._record_memory_history(max_entries=_HISTORY, stacks="python")
        self._recording = True

    def waits_for(self, step: int) -> bool:
        return self._recording and step in self.steps

    def on_step(self, metrics: StepMetrics) -> None:
        if not self._recording or metrics.step not in self.steps:
            return
        target = self._folder / f"step-{metrics.step}.rank{self.rank}.json"
        self._folder.mkdir(parents=True, exist_ok=True)
        unfinished = target.with_name(f".{target.name}")
        with unfinished.open("w", encoding="utf-8") as file:
            json.dump(torch.cuda.memory._snapshot(self.device), file)
        os.replace(unfinished, target)
        _log.info("wrote %s", target)

    def on_end(self, run: Run) -> None:
        if self._recording:
            torch.cuda.memory._record_memory_history(enabled=None)
            self._recording = False
