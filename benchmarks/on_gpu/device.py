"""What times a call: CUDA events on one GPU a rank, or in a rehearsal the clock of the CPU."""

import time
from typing import Any

import torch

_TRIAL_CYCLES = 10_000_000


class Cuda:
    """GPU ``rank`` of this machine. Collectives go through NCCL, the ops through copy engines."""

    backend, group_backend, transport = "nccl", "cpu:gloo,cuda:nccl", "nvlink"

    def __init__(self, rank: int) -> None:
        self.device = torch.device("cuda", rank)
        torch.cuda.set_device(self.device)
        begin, end = self.mark(), self.mark()
        for _ in range(2):  # the first launch of a process takes longer
            begin.record()
            torch.cuda._sleep(_TRIAL_CYCLES)
            end.record()
            self.synchronize()
        self._cycles = _TRIAL_CYCLES / begin.elapsed_time(end)

    def mark(self) -> Any:
        """A point of the stream: ``record()`` sets it, ``elapsed_time(later)`` is in milliseconds."""
        return torch.cuda.Event(enable_timing=True)

    def synchronize(self) -> None:
        """Wait until all work issued so far is done."""
        torch.cuda.synchronize(self.device)

    def sleep(self, milliseconds: float) -> None:
        """Let the current stream do nothing for so long; returns at once."""
        torch.cuda._sleep(int(milliseconds * self._cycles))

    def asleep(self, mark: Any) -> bool:
        """Whether the stream has not yet come to ``mark``."""
        return not mark.query()


class _Instant:
    """A point in time of the host."""

    def __init__(self) -> None:
        self.at = 0.0

    def record(self) -> None:
        self.at = time.perf_counter()

    def elapsed_time(self, later: "_Instant") -> float:
        return (later.at - self.at) * 1e3


class Cpu:
    """A CPU rank that goes through the same motions; there is no device whose work could wait."""

    backend, group_backend, transport = "gloo", "gloo", "host"

    def __init__(self, rank: int) -> None:
        self.device = torch.device("cpu")
        torch.set_num_threads(1)

    def mark(self) -> Any:
        """See ``Cuda.mark``."""
        return _Instant()

    def synchronize(self) -> None:
        """Nothing is ever under way."""

    def sleep(self, milliseconds: float) -> None:
        """Nothing can be issued ahead."""

    def asleep(self, mark: Any) -> bool:
        """True: no burst is marked as late."""
        return True


Device = Cuda | Cpu
