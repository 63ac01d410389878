"""Operations of the nvlink transport on GPUs made of threads, each of which says whether it was right."""

import random
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from flashtrain.comm import overlap
from flashtrain.comm.schedule import Expect, Schedule, Send
from flashtrain.comm.transport.base import Exchange
from flashtrain.comm.transport.landing import Landing
from flashtrain.comm.transport.nvlink import NvlinkTransport
from tests.comm.transport.fake_gpu import Stream, _mapped, driver


def contribution(schedule: Schedule, rank: int, chunk: int, salt: int) -> Tensor:
    """What ``rank`` has for ``chunk``: ``[rows, 3]`` int32."""
    rows = schedule.chunks[chunk].rows
    return (
        torch.arange(rows * 3, dtype=torch.int32).view(rows, 3)
        + (chunk * 64 + rank) * 4096
        + salt * 1_000_000
    )


class Operation:
    """One operation whose products are copies; ``check`` when the stream has been synchronised.

    If it was captured, ``feed`` gives its next replay other data, and ``after`` that says whether it was
    right.
    """

    def __init__(self, transport: NvlinkTransport, stream: Stream, schedule: Schedule, salt: int) -> None:
        self.schedule, self.stream, self.salt, self.rank = schedule, stream, salt, transport.rank
        _mapped.append(self)
        self.layout = Landing(schedule)
        chunks = range(len(schedule.chunks))
        self.own = {chunk: contribution(schedule, self.rank, chunk, salt) for chunk in chunks}
        self.leaving = {chunk: torch.empty_like(self.own[chunk]) for chunk in chunks}
        self.seen = torch.zeros(self.layout.rows(self.rank), 3, dtype=torch.int32)
        self.garbage = torch.full((max(1, schedule.rows), 3), -1, dtype=torch.int32)
        landed = self.seen

        def opened(exchange: Exchange) -> None:
            nonlocal landed
            landed = exchange.landing_buffer(self.seen, (3,))

        def span(part: Expect) -> slice:
            return self.layout.span(self.rank, part.chunk, part.slot)

        def payload(send: Send) -> Tensor:
            if schedule.gathers and send.chunk not in schedule.own:
                return landed[self.layout.span(self.rank, send.chunk, send.slot)]
            return self.leaving[send.chunk]

        def compute(chunk: int) -> None:
            if not schedule.gathers:
                stream.copy(self.leaving[chunk], self.own[chunk])

        def arrived(expect: Expect) -> None:
            stream.copy(self.seen[span(expect)], landed[span(expect)])
            if schedule.kind == "ring" and not schedule.gathers:
                # In place of an addition: the newer sum replaces what was computed.
                stream.copy(self.leaving[expect.chunk], landed[span(expect)])

        if schedule.gathers:
            for chunk in schedule.own:
                stream.copy(self.leaving[chunk], self.own[chunk])  # complete before the operation
        overlap.run(
            schedule,
            transport,
            f"site {salt}",
            payload=payload,
            landing=lambda expect: landed[span(expect)],
            compute=compute,
            landed=arrived,
            opened=opened,
        )
        # Functional ops free their payloads here, and the next owner writes into them on the same stream.
        for tensor in self.leaving.values():
            stream.copy(tensor, self.garbage[: len(tensor)])

    def feed(self, salt: int) -> None:
        self.salt = salt
        for chunk, own in self.own.items():
            _mapped.append(fresh := contribution(self.schedule, self.rank, chunk, salt))
            self.stream.copy(own, fresh)

    def after(self) -> Callable[[], None]:
        _mapped.append(seen := torch.zeros_like(self.seen))
        self.stream.copy(seen, self.seen)
        _mapped.append(garbage := torch.full_like(seen, -1))
        self.stream.copy(self.seen, garbage)
        return partial(self.check, self.salt, seen)

    def check(self, salt: int | None = None, seen: Tensor | None = None) -> None:
        schedule = self.schedule
        salt, seen = self.salt if salt is None else salt, self.seen if seen is None else seen
        for step in schedule.steps:
            for expect in step.expects:
                source = schedule.chunks[expect.chunk].owner if schedule.gathers else expect.src
                if schedule.kind == "ring" and not schedule.gathers:
                    source = (
                        schedule.chunks[expect.chunk].owner + 1
                    ) % schedule.world  # the first of the chain
                wanted = contribution(schedule, source, expect.chunk, salt)
                found = seen[self.layout.span(self.rank, expect.chunk, expect.slot)]
                assert torch.equal(found, wanted), (schedule.op, salt, self.rank, expect)


class Fused:
    """Operations of one schedule whose kernel copies: see ``relay`` in the fake driver.

    With ``carried`` another kernel pushes, where else copy engines do.

    One that was captured, by ``record``, is replayed with other data after ``feed``; ``after`` that says
    whether it was right.
    """

    def __init__(
        self, transport: NvlinkTransport, stream: Stream, schedule: Schedule, carried: bool = False
    ) -> None:
        self.transport, self.stream, self.schedule = transport, stream, schedule
        core, parameter = transport.core, transport.core.Parameter
        self.messages = transport.plan(schedule, 12, engines=not carried)
        self.leaving_rows = schedule.own_rows if schedule.gathers else slice(0, schedule.rows)
        leaving_bytes = 12 * (self.leaving_rows.stop - self.leaving_rows.start)
        # As on a GPU: what has no rows has no tiles that wait.
        silent = {m.src for m in self.messages.arrivals if not schedule.chunks[m.chunk].rows}
        first = self.leaving_rows.start
        offsets = [12 * (schedule.chunks[send.chunk].offset - first) for send in self.messages.sends]
        self.deliveries = torch.tensor([
            [send.dst, send.chunk % schedule.subchunks, offset,
             12 * self.messages.landing.span(send.dst, send.chunk, send.slot).start,
             12 * schedule.chunks[send.chunk].rows]
            for send, offset in zip(self.messages.sends, offsets, strict=True)
        ])  # fmt: skip
        numbers = {
            "epoch": 0, "rank": schedule.rank, "world": schedule.world, "subchunks": schedule.subchunks,
            "sends": 0 if schedule.gathers else len(self.messages.sends),
            "leaving_bytes": 0 if schedule.gathers else leaving_bytes,
            "landing_bytes": self.messages.rows * 12, "columns": core.flag_columns,
            "silent": sum(1 << src for src in silent),
        }  # fmt: skip
        pointers = {"source": 0, "leaving": 0, "seen": 0, "signals": transport.signals,
                    "flags": 0, "stop": transport.stop_word}  # fmt: skip
        self.launch = core.Launch(
            core.Kernel(driver(), b"", "relay", 0, 32),
            [
                parameter.matrix("landing", self.messages.rows, 3, 3, 4, 7, 0, [3, 1]),
                *(parameter.pointer(name, False) for name in pointers),
                *(parameter.number(name) for name in numbers),
            ],
        )
        if not self.messages.sends:
            return
        product = core.KernelCall(
            launch=self.launch, blocks=1, values=[0, *pointers.values(), *numbers.values()],
            places=[[1], [2], [3]], landing=[0], flags=[5], epoch=[7], signals=[4] if carried else [],
        )  # fmt: skip
        carrier = self._carrier() if carried else None
        self.product = core.FusedProduct(
            program=self.messages.program, product=product, carrier=carrier, source=1, offsets=offsets,
            early=schedule.gathers,
        )  # fmt: skip

    def _carrier(self) -> Any:
        transport, schedule = self.transport, self.schedule
        core, parameter = transport.core, transport.core.Parameter
        pointers = ("source", "signals", "stop", "directory", "deliveries")
        launch = core.Launch(
            core.Kernel(driver(), b"", "carry", 0, 32),
            [
                *(parameter.pointer(name, False) for name in pointers),
                *(parameter.number(name) for name in ("epoch", "world", "sends", "waits")),
            ],
        )
        values = [0, 0, transport.stop_word, 0, self.deliveries.data_ptr(), 0, schedule.world]
        return core.KernelCall(
            launch=launch, blocks=1, values=[*values, len(self.messages.sends), int(not schedule.gathers)],
            places=[[], [0], []], epoch=[5], directory=[3], signals=[1],
        )  # fmt: skip

    def start(self, salt: int) -> Callable[[], None]:
        """Run it once; the result checks what has landed when the stream has been synchronised."""
        self.record(f"site {salt}", salt)
        return partial(self.check, self.seen, salt)

    def record(self, site: str, salt: int = 0) -> None:
        self.salt, self.source = salt, self.payload(salt)
        self.leaving = torch.zeros_like(self.source)
        self.seen = torch.zeros(self.messages.rows, 3, dtype=torch.int32)
        garbage = torch.full_like(self.leaving, -1)
        _mapped.append((self.source, self.leaving, self.seen, garbage, self))
        if self.schedule.gathers:
            self.stream.copy(self.leaving, self.source)  # complete before the operation
        given = [self.source.data_ptr(), self.leaving.data_ptr(), self.seen.data_ptr()]
        self.transport.start(self.product, self.messages.nbytes, given, site)
        self.transport.finish(site)
        self.stream.copy(self.leaving, garbage)  # its next owner

    def payload(self, salt: int) -> Tensor:
        schedule = self.schedule
        chunks = [contribution(schedule, schedule.rank, c, salt) for c in range(len(schedule.chunks))]
        return torch.cat(chunks)[self.leaving_rows].contiguous()

    def feed(self, salt: int) -> None:
        _mapped.append(fresh := self.payload(salt))
        self.salt = salt
        self.stream.copy(self.source, fresh)

    def after(self) -> Callable[[], None]:
        _mapped.append((seen := torch.zeros_like(self.seen), garbage := torch.full_like(seen, -1)))
        self.stream.copy(seen, self.seen)
        self.stream.copy(self.seen, garbage)
        return partial(self.check, seen, self.salt)

    def check(self, seen: Tensor, salt: int) -> None:
        schedule, rank = self.schedule, self.schedule.rank
        for expect in (expect for step in schedule.steps for expect in step.expects):
            peer = schedule.chunks[expect.chunk].owner if schedule.gathers else expect.src
            found = seen[self.messages.landing.span(rank, expect.chunk, expect.slot)]
            assert torch.equal(found, contribution(schedule, peer, expect.chunk, salt)), (salt, expect)


class Kept:
    """A gather by hand, with the own rows put beside those of the others. ``feed`` and ``after`` as above.

    ``beside``: what has landed is read on the stream of the copies.
    """

    def __init__(
        self, transport: NvlinkTransport, stream: Stream, schedule: Schedule, salt: int, beside: bool = False
    ) -> None:
        self.schedule, self.stream, self.salt = schedule, stream, salt
        self.own, plan = schedule.own_rows, transport.plan(schedule, 12)
        self.source = self.rows(schedule.rank, salt)
        leaving = torch.zeros_like(self.source)
        self.seen = torch.zeros(schedule.rows, 3, dtype=torch.int32)
        garbage = torch.full((schedule.rows, 3), -1, dtype=torch.int32)
        _mapped.append((self, leaving, garbage))
        stream.copy(leaving, self.source)
        first = leaving.data_ptr()
        offsets = [12 * (schedule.chunks[send.chunk].offset - self.own.start) for send in plan.sends]
        transport.begin_early(plan, [first + offset for offset in offsets], "by hand")
        landed = transport.landed(torch.int32, (schedule.rows, 3))
        transport.keep(first, 12 * self.own.start, leaving.nbytes, "by hand")
        reader = stream
        if beside:
            reader = Stream.__new__(Stream)
            reader.handle = transport.wait_beside("by hand")
        else:
            transport.wait_for_all("by hand")
        reader.copy(self.seen, landed)
        reader.copy(landed, garbage)  # nobody else's, until the end
        transport.finish("by hand")
        stream.copy(leaving, garbage[: len(leaving)])  # its next owner

    def rows(self, rank: int, salt: int) -> Tensor:
        rows = self.schedule.rows_of(rank)
        numbers = torch.arange(3 * (rows.stop - rows.start), dtype=torch.int32)
        return numbers.view(-1, 3) + rank * 4096 + salt * 1_000_000

    def feed(self, salt: int) -> None:
        _mapped.append(fresh := self.rows(self.schedule.rank, salt))
        self.salt = salt
        self.stream.copy(self.source, fresh)

    def after(self) -> Callable[[], None]:
        _mapped.append(seen := torch.zeros_like(self.seen))
        self.stream.copy(seen, self.seen)
        return partial(self.check, self.salt, seen)

    def check(self, salt: int | None = None, seen: Tensor | None = None) -> None:
        salt, seen = self.salt if salt is None else salt, self.seen if seen is None else seen
        wanted = torch.cat([self.rows(rank, salt) for rank in range(self.schedule.world)])
        assert torch.equal(seen, wanted), salt


def random_rows(choice: random.Random, world: int) -> tuple[int, ...]:
    return tuple(choice.choice((0, 1, 7, 64, 300)) for _ in range(world))
