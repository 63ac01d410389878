"""What a transport must do to run a schedule.

A transport moves chunks between the ranks of one process group. ``open`` starts one operation and
returns an ``Exchange``; the executor then walks the schedule's actions and calls ``transfer`` and
``wait`` in that order on every rank.
"""

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flashtrain.comm.schedule import Expect, Schedule, Send
from flashtrain.comm.transport.landing import Landing
from flashtrain.errors import UserError

_MOST_WAYS = 4096


def clock() -> float:
    """Seconds on the clock that all times of a transport are taken on (CLOCK_MONOTONIC on Linux)."""
    return time.perf_counter()


def capturing() -> bool:
    """Whether what is issued to the current stream becomes part of a CUDA graph."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


@dataclass
class Traffic:
    """What the operations of a transport cost since the last ``reset``; times in seconds."""

    bytes_sent: int = 0
    in_flight: float = 0.0  # from an operation's first transfer until its last chunk had landed
    exposed: float = 0.0  # of it, time in which this rank did nothing but wait
    copying: float = 0.0  # processor time that the transport's own threads spent
    operating: float = 0.0  # inside operations, all in all
    computing: float = 0.0  # of it, in the products

    @property
    def hidden(self) -> float | None:
        """Share of the communication time that passed behind computation; None without communication."""
        return None if self.in_flight <= 0 else max(0.0, 1.0 - self.exposed / self.in_flight)

    @property
    def handling(self) -> float:
        """Seconds inside operations that were neither a product nor waiting: copies, additions, calls."""
        return max(0.0, self.operating - self.computing - self.exposed)

    def reset(self) -> None:
        """Start counting anew."""
        self.__init__()  # type: ignore[misc]


class Exchange(ABC):
    """One operation under way. ``close`` must be called; use it as a context manager.

    ``borrowed``: arrivals land in ``landing_buffer`` alone, and that belongs to the transport.
    """

    borrowed = False

    def __init__(self, transport: "Transport", schedule: Schedule, site: str) -> None:
        self.transport, self.schedule, self.site = transport, schedule, site
        self._started: float | None = None
        self._landed = self._blocked = 0.0

    def landing_buffer(self, like: Tensor, row_shape: tuple[int, ...]) -> Tensor:
        """Memory for all that arrives: ``[rows, *row_shape]``, rows and places as in ``Landing(schedule)``.

        Of the dtype and on the device of ``like``; ask once, before anything moves. Fresh memory for the
        caller to keep, unless ``borrowed``: then it may be read and written until ``close``, by work issued
        to the stream that was current here, and what is to outlive the operation must be copied.
        """
        return like.new_empty(Landing(self.schedule).rows(self.schedule.rank), *row_shape)

    def begin(self, payload: Callable[[Send], Tensor]) -> Collection[Send]:
        """Start sends whose payloads are complete before the first product, if early is better; return them.

        ``payload(send) [rows, ...]`` has the rows of its chunk. What was started is not passed to
        ``transfer`` again.
        """
        return ()

    def transfer(self, step: int, sends: Mapping[Send, Tensor], expects: Mapping[Expect, Tensor]) -> None:
        """Start moving ``sends`` and take in ``expects``; return at once.

        Tensors ``[rows, ...]`` are contiguous and have the rows of their chunk; each expected one is where
        its chunk lands, of the size that the peer sends. Payloads must stay as they are until ``close``.
        ``step`` is for error messages.
        """
        if self._started is None:
            self._started = clock()
        self.transport.traffic.bytes_sent += sum(payload.nbytes for payload in sends.values())
        self._transfer(step, sends, expects)

    def wait(self, step: int, expect: Expect) -> None:
        """Block until ``expect`` has landed.

        Raises TransportError that names rank, site, op, step, chunk and peer if the peer died, sent
        something else, or sent nothing within the transport's time-out.
        """
        start = clock()
        self._landed = max(self._landed, self._wait(step, expect))
        self._blocked += clock() - start

    def close(self) -> None:
        """Wait until every payload has left, so that it may be changed or freed."""
        start = clock()
        self._close()
        self._blocked += clock() - start
        if self._started is not None and not self.transport.asynchronous:
            traffic = self.transport.traffic
            traffic.exposed += self._blocked
            # Sends that this rank had to wait for at the end were in flight longer than its arrivals.
            traffic.in_flight += max(self._landed - self._started, self._blocked)

    def describe(self, step: int, chunk: int, peer: int) -> str:
        """Where an operation stands, for messages: site, op, step, chunk, ranks."""
        return (
            f"rank {self.transport.rank}: {self.site or 'unnamed site'}: {self.schedule.op} "
            f"step {step} of {len(self.schedule.steps)}, chunk {chunk}, peer rank {peer}"
        )

    @abstractmethod
    def _transfer(
        self, step: int, sends: Mapping[Send, Tensor], expects: Mapping[Expect, Tensor]
    ) -> None: ...

    @abstractmethod
    def _wait(self, step: int, expect: Expect) -> float:
        """Block; return when the chunk landed, on the clock of ``time.perf_counter``."""

    @abstractmethod
    def _close(self) -> None: ...

    @abstractmethod
    def _abort(self) -> None:
        """Stop touching this operation's tensors, at once and without a word to the peers."""

    def __enter__(self) -> "Exchange":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        # After a failure the peers are gone or out of step: there is nothing left to wait for.
        try:
            if kind is None:
                self.close()
                return
        except BaseException:
            self._abort()
            raise
        self._abort()


class Transport(ABC):
    """Moves chunks between the ranks of one process group.

    ``timeout`` is in seconds. Operations run one after the other or interleaved, but every rank of the
    group must open them in the same order. ``asynchronous``: waits order a device's stream and do not block
    the host, whose clock then knows nothing of what was hidden: ``traffic`` counts bytes and host time only.
    ``one_at_a_time``: an operation must be closed before the next is opened. ``has_kernels``: the fused
    products of ``comm.fused`` run on it. ``captured``: what takes its place while a CUDA graph is captured.
    ``device``: where all tensors must be; None: on any. ``ways``: how products of which shapes are computed.
    """

    name: str
    asynchronous = False
    one_at_a_time = False
    has_kernels = False
    captured: "Transport | None" = None
    device: torch.device | None = None

    def __init__(self, rank: int, world: int, timeout: float) -> None:
        self.rank, self.world, self.timeout = rank, world, timeout
        self.ways: dict[tuple[Any, ...], Any] = {}
        self.traffic = Traffic()

    @abstractmethod
    def open(self, schedule: Schedule, site: str) -> Exchange:
        """Start one operation. ``site`` names it in messages and reports."""

    def keep_way(self, key: tuple[Any, ...], way: Any) -> Any:
        """Remember ``way``, of a product with ``key``, and return it."""
        # Ragged batches bring ever new shapes, and a way is cheap to make once its kernel is compiled.
        if len(self.ways) >= _MOST_WAYS:
            self.ways.clear()
        self.ways[key] = way
        return way

    def forget_ways(self) -> None:
        """Choose anew how products are computed, those of captured operations as well."""
        self.ways.clear()
        if self.captured is not None:
            self.captured.forget_ways()

    def uncaptured(self, site: str) -> UserError:
        """That an operation here cannot become part of a CUDA graph, and why."""
        return UserError(
            f"{site or 'an operation'} cannot be captured in a CUDA graph: {self._why_uncaptured()}"
        )

    def _why_uncaptured(self) -> str:
        return f"its ranks talk through {self.name}, and only nvlink can be captured"

    def check(self) -> None:  # noqa: B027  nothing to say where operations raise themselves
        """Raise TransportError if an operation has failed since the last call that could have said so."""

    @abstractmethod
    def shutdown(self) -> None:
        """Free threads and memory. Collective only in that no operation may be under way anywhere."""
