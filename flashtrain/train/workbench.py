"""Steps of a run on random tokens, to be timed: no data, no checkpoint, weights drawn where they are used."""

import gc
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.profiler import ProfilerActivity, profile

from flashtrain.comm import transport
from flashtrain.comm.transport.base import clock
from flashtrain.metrics import current_memory, peak_memory, reset_peak_memory, step_time
from flashtrain.metrics.gpu import Gpu, GpuSample
from flashtrain.metrics.step_time import Account, Record
from flashtrain.nn.attend import Documents
from flashtrain.nn.attend import settings as attention_settings
from flashtrain.parallel.context import own_segment
from flashtrain.parallel.mesh import DATA
from flashtrain.train import attention
from flashtrain.train.build import Built, build_empty, build_step
from flashtrain.train.step import Batch, StepUnderWay
from flashtrain.train.trainer import Trainer

_SAMPLES_EVERY = 0.1


@dataclass(frozen=True)
class Timed:
    """``seconds`` of each step on this rank, and what it cost: bytes of memory at the peak and between steps.

    ``allocations``: how often the allocator asked the driver for memory in all these steps, and ``retries``
    how often it had to free its cache first; None on the CPU. ``gpu``: samples that the GPU gave meanwhile.
    """

    seconds: list[float]
    peak_bytes: int | None
    held_bytes: int | None
    allocations: int | None
    retries: int | None
    gpu: list[GpuSample]


class Workbench:
    """The model and the step of ``config`` on this rank, made for timing.

    Weights are random and those of every mesh differ. Collective over ``mesh``; transports and attention are
    set up as a run would. ``close`` frees what was taken, so that another can be made.
    """

    def __init__(self, config: Trainer.Config, mesh: DeviceMesh, device: torch.device) -> None:
        self.config, self.mesh, self.device = config, mesh, device
        train = config.train
        transport.configure(config.comm)
        attention.prepare(config.attention, config.model, train, config.parallel, device)
        self.attention = attention_settings()
        self.built = _draw(config, mesh, device)
        # Random tokens give gradients that a rule for text might refuse: a step without update is another.
        skip = replace(config.skip, above=0.0)
        self.step = build_step(self.built.model, mesh, config.optimizer, skip, (), Path())
        self._batches = [self._random(number) for number in range(2)]
        self._done = 0

    def _random(self, number: int) -> list[Batch]:
        train, degree = self.config.train, self.config.parallel.data
        size = (train.batch // (degree * train.accumulate), train.sequence)
        draw = torch.Generator().manual_seed(1 + number + 100 * self.mesh[DATA].get_local_rank())
        made: list[Batch] = []
        for _ in range(train.accumulate):
            tokens = torch.randint(self.config.model.vocabulary, size, generator=draw)
            both = tuple(
                own_segment(part, self.mesh).t().contiguous().to(self.device)
                for part in (tokens, tokens.roll(-1, 1))
            )
            # One boundary in about a thousand tokens, as documents of text have them.
            apart = torch.where(torch.rand(size, generator=draw) < 1e-3, 0, 1)
            own = [Documents.of(apart, 0, self.device)] if train.document_mask else []
            made.append((*both, *own))  # type: ignore[arg-type]
        return made

    def one(self) -> StepUnderWay:
        """The next step, begun: the host is not to wait for it, as in a run."""
        self._done += 1
        rate = self.config.optimizer.learning_rate_at(self._done, 1000)
        return self.step.begin(self._done, rate, self._batches[self._done % 2])

    def run(self, steps: int, warmup: int) -> Timed:
        """Time ``steps`` after ``warmup`` others; ``results`` are then those of the timed ones."""
        for _ in range(warmup):
            self.one()
        begun: list[StepUnderWay] = []
        timed = measure(lambda: begun.append(self.one()), steps, self.device)
        self.results = [step.result() for step in begun]
        return timed

    def close(self) -> None:
        """Free the model, its optimizer and the transports' memory."""
        del self.step, self.built, self._batches
        transport.shutdown()
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def measure(one: Callable[[], object], steps: int, device: torch.device) -> Timed:
    """Time ``steps`` calls of ``one``: on a GPU between marks, without waiting for it in between."""
    finish(device)
    reset_peak_memory(device)
    before, watcher = _allocator(device), _Watcher(device)
    if device.type == "cuda":
        events = [torch.cuda.Event(enable_timing=True) for _ in range(steps + 1)]
        events[0].record()
        for event in events[1:]:
            one()
            event.record()
        finish(device)
        seconds = [begin.elapsed_time(end) * 1e-3 for begin, end in pairwise(events)]
    else:
        marks = [clock()]
        for _ in range(steps):
            one()
            marks.append(clock())
        seconds = [end - begin for begin, end in pairwise(marks)]
    samples, after = watcher.stop(), _allocator(device)
    new, retries = (end - begin for begin, end in zip(before, after, strict=True)) if before else (None, None)
    return Timed(seconds, peak_memory(device), current_memory(device), new, retries, samples)


def profiled(one: Callable[[], object], steps: int, device: torch.device) -> Account:
    """Where the time of one call of ``one`` goes on this rank, by a profile of ``steps`` calls."""
    finish(device)
    cuda = device.type == "cuda"
    activity = ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU
    with profile(activities=[activity], acc_events=True) as taken:
        started = clock()
        for _ in range(steps):
            one()
        finish(device)
        seconds = clock() - started
    if cuda:
        whole = step_time.account(_records(taken))
    else:
        own = {event.key: event.self_cpu_time_total * 1e-6 for event in taken.key_averages()}
        spent = step_time.account_of_operators(own, seconds)
        whole = Account(sum(spent.values()), spent, spent[step_time.EXPOSED])
    kinds = {kind: seconds / steps for kind, seconds in whole.kinds.items()}
    return Account(whole.seconds / steps, kinds, whole.moving / steps)


def finish(device: torch.device) -> None:
    """Wait for all that was issued to ``device``."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _draw(config: Trainer.Config, mesh: DeviceMesh, device: torch.device) -> Built:
    """The parallelised model with weights that were drawn where they are, faster than those of a run."""
    by_branches = config.parallel.branches > 1
    built = build_empty(config.model, config.train, config.fsdp, mesh, device, by_branches)
    torch.manual_seed(config.train.seed + mesh.get_rank())
    deviation = (2 / (5 * config.model.hidden)) ** 0.5
    with torch.no_grad():
        for parameter in built.model.parameters():
            local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
            torch.nn.init.normal_(local, std=deviation) if parameter.dim() > 1 else local.fill_(1.0)
    return built


def _allocator(device: torch.device) -> tuple[int, ...]:
    """Segments that the caching allocator has asked the driver for so far, and its retries; () on the CPU."""
    if device.type != "cuda":
        return ()
    counts = torch.cuda.memory_stats(device)
    return counts["segment.all.allocated"], counts["num_alloc_retries"]


def _records(taken: Any) -> list[Record]:
    """What ran on the GPU: kernels, copies and fills."""
    from torch.autograd import DeviceType

    events = taken.profiler.kineto_results.events()
    return [
        Record(event.name(), event.start_ns(), event.start_ns() + event.duration_ns())
        for event in events
        if event.device_type() == DeviceType.CUDA and event.duration_ns() > 0
    ]


class _Watcher:
    """Samples of this rank's GPU from a thread until ``stop``; none where NVML does not know it."""

    def __init__(self, device: torch.device) -> None:
        self._samples: list[GpuSample] = []
        self._over = threading.Event()
        self._thread: threading.Thread | None = None
        if device.type != "cuda":
            return
        try:
            nvml = import_module("pynvml")
            gpu = Gpu(nvml, f"GPU-{torch.cuda.get_device_properties(device).uuid}")
        except ImportError:
            return
        except nvml.NVMLError:
            return
        self._thread = threading.Thread(target=self._watch, args=(gpu,), daemon=True)
        self._thread.start()

    def _watch(self, gpu: Gpu) -> None:
        while not self._over.wait(_SAMPLES_EVERY):
            self._samples.append(gpu.sample(0, time.time()))
        gpu.close()

    def stop(self) -> list[GpuSample]:
        """End the thread; all samples."""
        self._over.set()
        if self._thread is not None:
            self._thread.join()
        return self._samples
