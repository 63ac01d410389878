"""Steps that were begun, read in their order: on a GPU one step late, so that it never waits for the host."""

import contextlib
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist

from flashtrain.comm.transport.base import clock
from flashtrain.errors import TransportError
from flashtrain.metrics import StepMetrics, peak_memory
from flashtrain.models.decoder import Decoder
from flashtrain.train.build import Built
from flashtrain.train.settings import Training
from flashtrain.train.step import StepResult, StepUnderWay


@dataclass(frozen=True)
class Reading:
    """What came of a step. ``timed`` is the step whose times its notes have; 0: of none."""

    result: StepResult
    metrics: StepMetrics
    timed: int


@dataclass(frozen=True)
class _Begun:
    """A step under way, and when the host began with it."""

    step: int
    rate: float
    at: float
    running: StepUnderWay
    timed: int


class Results:
    """Reads the steps of a run; ``measured`` is what has been read so far."""

    def __init__(self, built: Built, train: Training, device: torch.device) -> None:
        self.measured: list[StepMetrics] = []
        self._model: Decoder = built.model
        self._peak, self._train, self._device = built.peak, train, device
        self._under_way: deque[_Begun] = deque()
        self._behind = _behind(device)
        self._read_at = 0.0  # when the latest result was read

    def expect(self, step: int, rate: float, at: float, running: StepUnderWay) -> None:
        """Take in a step that was begun at ``at``."""
        timed = self.measured[-1].step if self.measured else 0
        self._under_way.append(_Begun(step, rate, at, running, timed))

    def read(self, all_of_them: bool) -> Iterator[Reading]:
        """The steps whose turn it is, or all that are under way.

        Raises UserError if too many in a row made no update, TransportError if a peer failed.
        """
        while len(self._under_way) > (0 if all_of_them else self._behind):
            begun = self._under_way.popleft()
            with named(begun.step):
                result = begun.running.result()
            now = clock()
            # A step that was enqueued beside the one before runs from the end of that one.
            seconds, self._read_at = now - max(begun.at, self._read_at), now
            self.measured.append(self._measure(begun.step, begun.rate, result, seconds))
            yield Reading(result, self.measured[-1], begun.timed)

    def _measure(self, step: int, rate: float, result: StepResult, seconds: float) -> StepMetrics:
        tokens = self._train.batch * self._train.sequence
        # Asked each step, since it may change on the way.
        flops = tokens * self._model.flops_per_token(self._train.sequence) / dist.get_world_size() / seconds
        return StepMetrics(
            step=step,
            loss=result.loss,
            grad_norm=result.grad_norm,
            learning_rate=rate,
            tokens=step * tokens,
            tokens_per_s=tokens / seconds,
            tflops_per_s=flops / 1e12,
            mfu=None if self._peak is None else flops / self._peak,
            overlap=result.overlap,
            exposed_s=result.exposed,
            overhead=1.0 - result.arithmetic / seconds,
            memory_bytes=peak_memory(self._device),
            step_s=seconds,
        )


def _behind(device: torch.device) -> int:
    """Steps whose results are unread while the next one runs: a GPU is not to wait for the host."""
    return 1 if device.type == "cuda" else 0


@contextlib.contextmanager
def named(step: int) -> Iterator[None]:
    """Say which step a peer failed in."""
    try:
        yield
    except TransportError as error:
        raise TransportError(f"training step {step}: {error}") from error
