"""Transport between ranks of one machine through shared memory, for CPU tensors.

Every rank owns an anonymous memory file with one incoming ring per peer; its peers map it through
``/proc/<pid>/fd``. Two worker threads per rank (one sends, one receives) copy while the caller computes;
a short message is copied by the caller itself, and a caller that waits copies too. The work is done in
C++ (``csrc/``); this file finds the peers, posts the messages of a schedule and words the errors.

Which interleavings are legal: several exchanges may be open at once if every rank opens them in the same
order and calls ``transfer`` in the same order of (exchange, step). The messages of one pair of ranks then
pair up in posting order, whatever order the exchanges were opened in. Each carries its operation's number
and site, chunk, slot and size, which the receiver compares with its own, so ranks out of step are told.

A transport does not survive ``os.fork``: its calls raise in the child. The parent goes on undisturbed.
"""

import os
import weakref
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from typing import Any

from torch import Tensor

from flashtrain.comm.schedule import Expect, Schedule, Send
from flashtrain.comm.transport.base import Exchange, Transport
from flashtrain.errors import TransportError, UserError

_core: Any = None
_missing = ""
try:
    _core = import_module("flashtrain._core")
except ImportError as error:
    _missing = str(error)


class HostUnavailable(TransportError):
    """These ranks cannot share memory; all of them raise it together. Use the group transport instead."""


def available() -> bool:
    """Whether the C++ extension is there. Whether the ranks share a machine shows when they connect."""
    return _core is not None


def _machine() -> str:
    with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
        return file.read().strip()


def _pid_namespace() -> str:
    return str(os.stat("/proc/self/ns/pid").st_ino)


def _refusal(addresses: Sequence[str]) -> str | None:
    """Why ranks with these addresses cannot share memory; the same verdict on every rank."""
    first = addresses[0].split(":")
    for rank, address in enumerate(addresses):
        fields = address.split(":")
        match fields[0]:
            case "error":
                return f"rank {rank} has no shared memory: {address.removeprefix('error:')}"
            case version if version != first[0]:
                return f"ranks 0 and {rank} run different builds of flashtrain._core; install one build"
        for field, what in ((1, "machines"), (2, "pid namespaces (containers)")):
            if fields[field] != first[field]:
                return f"ranks 0 and {rank} run in different {what}"
    return None


def _connect(core: Any, rank: int, addresses: Sequence[str]) -> str:
    """Map the peers' memory; return "" or what failed."""
    for peer, address in enumerate(addresses):
        if peer == rank:
            continue
        try:
            core.connect(peer, _core.Address(*map(int, address.split(":")[3:])))
        except RuntimeError as error:
            return f"rank {rank} cannot map the memory of rank {peer}: {error}"
    return ""


class HostTransport(Transport):
    """Shared memory between ``world`` ranks of one machine.

    ``exchange_addresses`` gathers one string from every rank, in rank order; it is called twice, on all
    ranks. ``timeout`` is in seconds without any progress from the awaited peer. ``ring_bytes`` is the
    buffer of each ordered pair of ranks: how far a sender may run ahead of its receiver.

    Raises HostUnavailable, on all ranks, if they do not share a machine and a pid namespace, if one
    may not open the other's memory, or if one lacks the C++ extension.
    """

    name = "host"

    def __init__(
        self,
        rank: int,
        world: int,
        timeout: float,
        exchange_addresses: Callable[[str], list[str]],
        ring_bytes: int = 4 << 20,
    ) -> None:
        super().__init__(rank, world, timeout)
        if ring_bytes < 4096:
            raise UserError(f"ring_bytes is {ring_bytes}; give the host transport at least 4096")
        # A rank that fails alone must still take part in both rounds, or its peers would hang.
        core = None
        try:
            if _core is None:
                raise RuntimeError(f"flashtrain was installed without its C++ extension ({_missing})")
            core = _core.HostTransport(rank, world, ring_bytes)
            mine = core.address
            # The version comes first, so that unlike builds are told apart before anything else is read.
            numbers = (mine.pid, mine.descriptor, mine.start_time, mine.token)
            address = ":".join(map(str, (_core.layout, _machine(), _pid_namespace(), *numbers)))
        except (OSError, RuntimeError) as error:
            address = f"error:{error}"
        addresses = exchange_addresses(address)
        problem = _refusal(addresses)
        if problem is None:
            failures = exchange_addresses(_connect(core, rank, addresses))
            problem = next(filter(None, failures), None)
        if problem is not None:
            if core is not None:
                core.shutdown()
            raise HostUnavailable(f"the host transport cannot be used: {problem}; use the group transport")
        assert core is not None
        core.start()
        self._core = core
        self._copied = 0.0
        # Runs at interpreter exit at the latest: a late destructor could not tell the peers any more.
        self._finalizer = weakref.finalize(self, core.shutdown)

    def open(self, schedule: Schedule, site: str) -> "HostExchange":
        try:
            return HostExchange(self, schedule, site)
        except RuntimeError as error:
            raise TransportError(f"rank {self.rank}: {site or 'unnamed site'}: {error}") from None

    def shutdown(self) -> None:
        self._count_copying()
        self._finalizer()

    def _count_copying(self) -> None:
        used = self._core.worker_time
        self.traffic.copying += used - self._copied
        self._copied = used


class HostExchange(Exchange):
    """One operation over a HostTransport.

    It holds on to its tensors, and is itself held by nothing: dropping an exchange that was neither
    closed nor aborted gives it up as ``_abort`` does, before its tensors are freed.
    """

    transport: HostTransport

    def __init__(self, transport: HostTransport, schedule: Schedule, site: str) -> None:
        super().__init__(transport, schedule, site)
        self._core = transport._core
        label = f"{site or 'unnamed site'}: {schedule.kind} {schedule.op}"
        self._operation = self._core.open(label)
        self._tensors: list[Tensor] = []
        self._sent: list[tuple[int, Send, Any]] = []
        self._expected: dict[Expect, tuple[int, Any]] = {}
        self._ended = False

    def _transfer(self, step: int, sends: Mapping[Send, Tensor], expects: Mapping[Expect, Tensor]) -> None:
        post_receive, post_send = self._core.receive, self._core.send
        try:
            for expect, tensor in expects.items():
                _check(tensor)
                self._tensors.append(tensor)
                self._expected[expect] = (
                    step,
                    post_receive(
                        self._operation,
                        step,
                        expect.src,
                        expect.chunk,
                        expect.slot,
                        tensor.data_ptr(),
                        tensor.nbytes,
                    ),
                )
            for send, tensor in sends.items():
                _check(tensor)
                self._tensors.append(tensor)
                request = post_send(
                    self._operation, step, send.dst, send.chunk, send.slot, tensor.data_ptr(), tensor.nbytes
                )
                if request.pending:
                    self._sent.append((step, send, request))
        except RuntimeError as error:
            raise TransportError(
                f"rank {self.transport.rank}: {self.site or 'unnamed site'}: {error}"
            ) from None

    def _wait(self, step: int, expect: Expect) -> float:
        if expect not in self._expected:
            raise ValueError(
                f"{self.describe(step, expect.chunk, expect.src)}: waited for before its transfer"
            )
        return self._finish(step, expect.chunk, expect.src, self._expected[expect][1])

    def _close(self) -> None:
        try:
            # Receives that nobody waited for would write into tensors that the caller thinks are free.
            for expect, (step, request) in self._expected.items():
                self._finish(step, expect.chunk, expect.src, request)
            for step, send, request in self._sent:
                self._finish(step, send.chunk, send.dst, request)
        except BaseException:
            self._abort()
            raise
        self._end()

    def _abort(self) -> None:
        if not self._ended:
            self._core.abort(self._operation)
            self._end()

    def _end(self) -> None:
        self._ended = True
        self._tensors.clear()
        self.transport._count_copying()

    def _finish(self, step: int, chunk: int, peer: int, request: Any) -> float:
        try:
            landed: float = self._core.wait(request, self.transport.timeout)
        except _core.TransportFailure as error:  # handlers of signals run meanwhile and may raise anything
            raise TransportError(f"{self.describe(step, chunk, peer)}: {error}") from None
        return landed

    def __del__(self) -> None:
        if hasattr(self, "_ended"):
            self._abort()


def _check(tensor: Tensor) -> None:
    if tensor.device.type != "cpu" or not tensor.is_contiguous():
        raise ValueError(
            f"the host transport moves contiguous CPU tensors, not {tuple(tensor.shape)} with strides "
            f"{tensor.stride()} on {tensor.device}"
        )
