"""Transport between the GPUs of one host: chunks are pushed into the peers' memory.

Copy engines push them, and no multiprocessor moves data, but for fused products whose carriers store at the
peers, by a directory of where those want it (``fused``). An operation is a list of copies and flag writes on
one copy stream, handed to the driver by C++ (``csrc/copy_engine``), and waits for flags on the stream that
computes; the host never waits. Payloads are read where they lie and land in the receiver's arena, which
``landing_buffer`` lends for the duration of the operation; of more than two, ``lend`` lends one for longer
(``transport.loans``). Why two buffers and no acknowledgement suffice, and why payloads may be freed after the
operation, is shown in ``csrc/copy_engine.hpp``.

Operations of one transport follow one another, in the same order on every rank; what is to overlap needs a
group of its own. A peer that stops is found by the watchdog (``csrc/watchdog.hpp``): it lets the waiting
streams go on with data that nobody may use, and the next call of any operation, or ``check``, raises
TransportError on every rank.

Operations that are captured in CUDA graphs have a transport of their own (``captured``), with flags and
landing buffers apart from those of the others, so replays and other operations may come in any order. It is
made, and its landing buffers grow, while operations run outside of captures.
"""

from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from flashtrain.comm.schedule import Expect, Schedule, Send, all_gather
from flashtrain.comm.transport.arena import Arena
from flashtrain.comm.transport.base import Exchange, Transport, capturing, clock
from flashtrain.comm.transport.loans import Loans
from flashtrain.comm.transport.messages import Plan
from flashtrain.comm.transport.symmetric import SymmetricBuffer
from flashtrain.errors import TransportError

DRIVER = "libcuda.so.1"
_PROGRAMS_KEPT = 4096
_TRIAL_BYTES = 4096


class NvlinkTransport(Transport):
    """Copy engines between ``world`` GPUs of one host, each rank with one; ``timeout`` in seconds.

    ``host_tables [world tables]`` int32 is memory that all ranks map, ``device_table`` symmetric memory for
    one table; both went through ``clear_flags`` on all ranks. For the arena, ``allocate(bytes)`` makes
    symmetric memory and ``exchange`` gathers one string from every rank, both collective; ``quiesce`` waits
    until this rank's device is idle; ``arena_bytes`` is the most that landing buffers may take. ``stream()``
    is the handle of the stream that computes. ``has_kernels``: all ranks can run the fused products.
    ``buffers``: how many landing buffers there are, if the arena holds them; from three on they can be lent.
    ``in_graphs``: for captured operations alone. Raises RuntimeError if the driver lacks something.
    """

    name = "nvlink"
    asynchronous = True
    one_at_a_time = True

    def __init__(
        self,
        rank: int,
        world: int,
        timeout: float,
        *,
        host_tables: Tensor,
        device_table: SymmetricBuffer,
        allocate: Callable[[int], SymmetricBuffer],
        exchange: Callable[[str], list[str]],
        quiesce: Callable[[], None],
        stream: Callable[[], int],
        arena_bytes: int,
        has_kernels: bool = False,
        in_graphs: bool = False,
        buffers: int = 2,
        driver: str = DRIVER,
        epoch: int = 0,
    ) -> None:
        super().__init__(rank, world, timeout)
        self.has_kernels, self.in_graphs = has_kernels, in_graphs
        self.captured: NvlinkTransport | None = None
        self._held: set[object] = set()
        self._counters: Tensor | None = None
        self._directories: list[Tensor] = []
        self.core = import_module("flashtrain._core")
        self._plans: dict[tuple[int, int, int, bool], Plan] = {}
        self._stream, self._quiesce = stream, quiesce
        self._tables = host_tables, device_table
        self.device = device_table.memory.device
        self._engine: Any = self.core.CopyEngine(
            driver,
            rank,
            timeout,
            epoch,
            host_tables.data_ptr(),
            device_table.addresses,
            in_graphs,
            self._tables,
        )

        def settle() -> None:
            quiesce()
            self.check()

        self.arena = Arena(allocate, exchange, settle, self._use_landings, arena_bytes, buffers)
        self.loans = Loans(quiesce) if buffers > 2 else None

    def _use_landings(self, landings: tuple[int, ...], stride: int, buffers: int) -> None:
        # Kept until the end: CUDA graphs may hold the address of an older one.
        found = self._engine.directory(landings, stride, buffers)
        pages = torch.tensor(found, dtype=torch.int64, device=self.device)
        self._directories.append(pages)
        self._engine.use_landings(landings, stride, pages.data_ptr(), buffers)
        if self.loans is not None:
            self.loans.reset(buffers)

    def open(self, schedule: Schedule, site: str) -> "NvlinkExchange":
        if self._engine is None:
            raise TransportError(f"rank {self.rank}: {site or 'unnamed site'}: the transport was shut down")
        return NvlinkExchange(self, schedule, site)

    def check(self) -> None:
        try:
            self._engine.check()
        except RuntimeError as error:
            raise TransportError(str(error)) from None
        if self.captured is not None:
            self.captured.check()

    def reserve(self, nbytes: int, site: str) -> None:
        """Make room for an operation that lands ``nbytes`` at the most, and for another that is captured.

        Raises UserError if that passes the budget, or if it is captured itself and none like it ran before;
        TransportError if a peer has failed.
        """
        growing = max(nbytes, 1) > self.arena.room
        if growing and (self.in_graphs or capturing()):
            raise self.uncaptured(site)
        if self.in_graphs:
            self.arena.pin()
            return
        self.arena.reserve(nbytes, site)
        if self.captured is not None:
            self.captured.check()
            self.captured.arena.reserve(nbytes, site)

    def hold(self, what: object) -> None:
        """Keep ``what`` until ``shutdown`` if what was captured here may point to it."""
        if self.in_graphs:
            self._held.add(what)

    def _why_uncaptured(self) -> str:
        if self.in_graphs:
            return "it has not run with these shapes; run it once before the capture"
        return "comm.graphs is off; set it, and run the operation once before the capture"

    def plan(self, schedule: Schedule, row_bytes: int, parts: int = 1, engines: bool = True) -> Plan:
        """The plan of ``schedule``, made at its first use. Raises ValueError if it needs too many flags."""
        # By identity: schedules are cached where they are built, and comparing them costs more than building
        # this. The plan holds its schedule, so an identity is not used twice.
        key = (id(schedule), row_bytes, parts, engines)
        found = self._plans.get(key)
        if found is None:
            if len(self._plans) >= _PROGRAMS_KEPT:
                self._plans.clear()
            found = self._plans[key] = Plan(self.core, schedule, row_bytes, parts, engines)
        return found

    def lend(
        self,
        messages: Plan,
        dtype: torch.dtype,
        shape: tuple[int, ...],
        site: str,
        overdue: Callable[[], None],
    ) -> Tensor | None:
        """A tensor ``[*shape]`` for what the next operation gathers, to be read after it, or None.

        That operation must go by ``messages`` and be given it (``begin_early``). From now on the current
        stream may write the own rows. See ``transport.loans`` for when it must be dropped; if it is held for
        longer it moves, and ``overdue`` is called. Errors as of ``start``.
        """
        if self.loans is None or capturing():
            return None
        self.reserve(messages.nbytes, site)
        place = self._engine.next_place
        if self.arena.buffers < 3:
            return None
        lent = self.loans.lend(self.arena.view(place, dtype, shape), site, overdue)
        if lent is not None and not self.loans.settled(place):
            self.call(self._engine.let_follow, site, "allocation", self._stream())
        return lent

    def _opening(self, out: Tensor | None = None) -> bool:
        """An operation is about to be opened; whether it lands in ``out``, which was lent for it."""
        if self.loans is None:
            return False
        lent = out is not None and self.loans.take(out)
        self.loans.opening(self._engine.next_place)
        return lent

    def landed(self, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
        """The landing buffer of the operation that is open, ``[*shape]``."""
        return self.arena.view(self._engine.place, dtype, shape)

    def start(self, product: Any, nbytes: int, given: list[int], site: str) -> None:
        """Begin a fused product that lands ``nbytes`` at the most. End it with ``finish``.

        ``given``: the addresses that ``product`` (of flashtrain._core) takes. Raises TransportError if a peer
        has failed, UserError if the landing buffer passes its budget.
        """
        self.reserve(nbytes, site)
        self._opening()
        self.call(self._engine.start, site, "fused product", product, site, self._stream(), given)

    def begin(self, messages: Plan, site: str) -> int:
        """Begin an operation by hand; returns its epoch. ``push`` or ``push_early``, wait, then ``finish``.

        Errors as of ``start``.
        """
        self.reserve(messages.nbytes, site)
        self._opening()
        epoch: int = self.call(
            self._engine.open, site, messages.schedule.op, messages.program, site, self._stream(), False
        )
        return epoch

    def begin_early(self, messages: Plan, sources: list[int], site: str, out: Tensor | None = None) -> bool:
        """The same, and push everything at once, each send from an address where it is complete.

        Returns whether what arrives lands in ``out [M, ...]``, because that was lent for it.
        """
        self.reserve(messages.nbytes, site)
        lent, program, stream = self._opening(out), messages.program, self._stream()
        self.call(self._engine.open_early, site, messages.schedule.op, program, site, stream, sources)
        return lent

    def push(self, sends: list[int], sources: list[int], site: str) -> None:
        """Push sends of these numbers, each from an address, behind what the stream now holds."""
        self.call(self._engine.push, site, "push", sends, sources)

    def push_early(
        self, sends: list[int], sources: list[int], site: str, settled: "NvlinkTransport | None" = None
    ) -> None:
        """The same at once, for what was complete at the beginning.

        What was complete when the last operation of ``settled`` ended need not wait for the beginning, unless
        buffers here are lent.
        """
        by = None if settled is None or self.loans is not None else settled._engine
        self.call(self._engine.push_early, site, "push", sends, sources, by)

    def keep(self, source: int, offset: int, nbytes: int, site: str) -> None:
        """Put what is this rank's own, complete at the beginning, into its landing buffer; behind pushes."""
        self.call(self._engine.keep, site, "keep", source, offset, nbytes)

    def wait(self, arrival: int, site: str) -> None:
        """Let the stream wait for the arrival of this number."""
        self.call(self._engine.wait, site, "wait", arrival)

    def wait_for_all(self, site: str) -> None:
        """Let the stream wait for all arrivals, and for what is kept."""
        self.call(self._engine.wait_for_all, site, "wait")

    def wait_beside(self, site: str) -> int:
        """Let the copy stream wait for all arrivals instead, behind all pushes; returns its handle.

        What is enqueued there runs beside the stream that computes, which joins it in ``finish``.
        """
        handle: int = self.call(self._engine.wait_beside, site, "wait")
        return handle

    def finish(self, site: str) -> None:
        """End the operation that was begun, once its stream has nothing more to do with what landed."""
        self.call(self._engine.close, site, "fused product")

    def abandon(self) -> None:
        """End it after an exception, on the peers too."""
        self._engine.abort("an exception broke it off")

    def counters(self, device: torch.device) -> Tensor:
        """Words for the kernels of this transport to count in, zero between operations.

        ``[flag_columns]`` for those that compute, and as many again for those that carry.
        """
        if self._counters is None:
            self._counters = torch.zeros(2 * self.core.flag_columns, dtype=torch.int32, device=device)
        return self._counters

    @property
    def signals(self) -> int:
        """Address of the words with which kernels say that a payload is ready, one a send."""
        address: int = self._engine.signals
        return address

    @property
    def stop_word(self) -> int:
        """Address of a 32-bit word; once it is not zero, a peer has failed and flags may never come."""
        address: int = self._engine.stop_word
        return address

    def call(self, function: Callable[..., Any], site: str, op: str, *arguments: Any) -> Any:
        """Call into C++. Raises TransportError, which says where, for its RuntimeError.

        Raises UserError if this cannot be captured, but is.
        """
        try:
            return function(*arguments)
        except RuntimeError as error:
            text = str(error)
            if not self.in_graphs and capturing():
                raise self.uncaptured(site) from None
            # The watchdog's messages say where; the driver's do not.
            where = f"rank {self.rank}: {site or 'unnamed site'}: {op}: "
            raise TransportError(text if text.startswith("rank ") else where + text) from None

    def trial(self, device: torch.device) -> None:
        """Gather a few bytes as an operation would. Raises RuntimeError if they do not arrive."""
        rows = torch.full((_TRIAL_BYTES,), self.rank + 1, dtype=torch.uint8, device=device)
        schedule = all_gather((_TRIAL_BYTES,) * self.world, self.rank)
        with self.open(schedule, "trial of the links") as exchange:
            landed = exchange.landing_buffer(rows, ())
            exchange.begin(lambda send: rows)
            for step in schedule.steps:
                for expect in step.expects:
                    exchange.wait(0, expect)
            seen = landed.clone()
        found = [set(part.tolist()) for part in seen.chunk(self.world)]
        self.check()
        wrong = [peer for peer in range(self.world) if peer != self.rank and found[peer] != {peer + 1}]
        if wrong:
            raise RuntimeError(f"what rank {wrong[0]} sent did not arrive at rank {self.rank}")

    def shutdown(self) -> None:
        if self._engine is None:
            return
        # Copies under way write to peers; the watchdog, still there, ends those that wait for one.
        with suppress(RuntimeError):
            self._quiesce()
        if self.captured is not None:
            self.captured.shutdown()
        self._engine = None
        self.arena.free()
        self._plans.clear()
        self._held.clear()
        self._directories.clear()


class NvlinkExchange(Exchange):
    """One operation; it begins when its landing buffer is asked for, since that fixes the size of a row."""

    transport: NvlinkTransport
    borrowed = True

    def __init__(self, transport: NvlinkTransport, schedule: Schedule, site: str) -> None:
        super().__init__(transport, schedule, site)
        self._engine = transport._engine
        self._plan: Plan | None = None

    def landing_buffer(self, like: Tensor, row_shape: tuple[int, ...]) -> Tensor:
        # Where the arena must grow, this waits until the devices of all ranks are idle.
        row_bytes = torch.Size(row_shape).numel() * like.element_size()
        transport = self.transport
        plan = transport.plan(self.schedule, row_bytes)
        transport.reserve(plan.nbytes, self.site)
        transport._opening()
        self._call(self._engine.open, plan.program, self.site, transport._stream(), False)
        self._plan = plan
        return transport.landed(like.dtype, (plan.rows, *row_shape))

    def begin(self, payload: Callable[[Send], Tensor]) -> Collection[Send]:
        # Every own chunk to everyone in one call: the host leaves no gaps between the copies.
        early = self._opened().early
        if early:
            self._push(self._engine.push_early, {send: payload(send) for send in early})
        return early

    def _opened(self) -> Plan:
        if self._plan is None:
            raise ValueError("ask for the landing buffer first: it begins the operation")
        return self._plan

    def _push(self, how: Callable[[list[int], list[int]], None], sends: Mapping[Send, Tensor]) -> None:
        plan, sources = self._opened(), []
        for send, payload in sends.items():
            nbytes = self.schedule.chunks[send.chunk].rows * plan.row_bytes
            if not payload.is_contiguous() or payload.nbytes != nbytes:
                raise ValueError(f"the payload of chunk {send.chunk} is not its rows, one after the other")
            sources.append(payload.data_ptr())
            self.transport.traffic.bytes_sent += payload.nbytes
        self._call(how, [plan.sends[send] for send in sends], sources)

    def _transfer(self, step: int, sends: Mapping[Send, Tensor], expects: Mapping[Expect, Tensor]) -> None:
        if sends:
            self._push(self._engine.push, sends)

    def transfer(self, step: int, sends: Mapping[Send, Tensor], expects: Mapping[Expect, Tensor]) -> None:
        self._transfer(step, sends, expects)

    def wait(self, step: int, expect: Expect) -> None:
        # The stream waits, not the host.
        self._call(self._engine.wait, self._opened().arrivals[expect])

    def _wait(self, step: int, expect: Expect) -> float:
        self.wait(step, expect)
        return clock()

    def _close(self) -> None:
        if self._plan is not None:
            self._call(self._engine.close)

    def _abort(self) -> None:
        if self._plan is not None and self._engine is not None:
            self._engine.abort("an exception broke it off")

    def _call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        return self.transport.call(function, self.site, self.schedule.op, *arguments)
