"""Landing buffers lent to readers on another stream, as FSDP2 reads what it gathers: GPUs made of threads."""

import random
from collections import deque
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from flashtrain.comm.schedule import all_gather, reduce_scatter
from flashtrain.comm.streamed import GatherInto
from flashtrain.comm.transport.nvlink import NvlinkTransport
from tests.comm.transport import fake_gpu
from tests.comm.transport.fake_gpu import Ranks, Stream, _mapped
from tests.comm.transport.fake_operations import Kept, Operation

pytest.importorskip("flashtrain._core", reason="the C++ extension is not built")

WIDTH = 3


@pytest.fixture(autouse=True)
def _delays() -> Iterator[None]:
    fake_gpu.delay(20, slowness=10)
    yield
    fake_gpu.delay(0)


class Gathers:
    """What FSDP2 does on its three streams: copies own rows in, gathers, copies out of what it gathered."""

    def __init__(self, ranks: Ranks, rank: int, rows: tuple[int, ...], **options: Any) -> None:
        self.copy_in, self.gathering, self.computing = Stream(), Stream(), Stream()
        self.current = self.gathering
        self.transport: NvlinkTransport = ranks.connect(rank, self.gathering, **options)
        self.transport._stream = lambda: self.current.handle
        self.transport._quiesce = self.transport.loans._quiesce = self.synchronize
        self.plan, self.rank, self.rows = all_gather(rows, rank), rank, rows
        self.way = GatherInto(self.transport, self.plan, torch.Size((sum(rows), WIDTH)), torch.int32)
        self.overdue: list[int] = []
        self.seen: list[tuple[int, Tensor]] = []

    def synchronize(self) -> None:
        for stream in (self.copy_in, self.gathering, self.computing):
            stream.synchronize()

    def shard(self, number: int, rank: int) -> Tensor:
        values = torch.arange(self.rows[rank] * WIDTH, dtype=torch.int32).view(-1, WIDTH)
        return values + 1_000_000 * number + 10_000 * rank

    def gather(self, number: int) -> Tensor:
        own = self.plan.own_rows
        _mapped.append(shard := self.shard(number, self.rank))
        self.current = self.copy_in
        out = self.way.output(f"unit {number}", lambda: self.overdue.append(number))
        assert out is not None
        self.copy_in.copy(out[own], shard)
        self.gathering.follow(self.copy_in)
        self.current = self.gathering
        self.way(out, out[own], f"unit {number}")
        # No copy: what is read lies where it landed.
        assert out.data_ptr() == self.transport.landed(torch.int32, self.way.shape).data_ptr()
        return out

    def read(self, number: int, out: Tensor, sleep: int = 0) -> None:
        self.computing.follow(self.gathering)
        self.computing.sleep(sleep)
        _mapped.append(seen := torch.zeros_like(out))
        self.computing.copy(seen, out)
        self.seen.append((number, seen))

    def may_drop(self) -> None:
        for stream in (self.copy_in, self.gathering):
            stream.follow(self.computing)

    def check(self) -> None:
        self.synchronize()
        for number, seen in self.seen:
            wanted = torch.cat([self.shard(number, rank) for rank in range(len(self.rows))])
            assert torch.equal(seen, wanted), number
        self.transport.check()


@pytest.mark.parametrize(("world", "ahead"), [(2, 1), (3, 1), (2, 3)])
def test_a_slow_reader_never_sees_its_buffer_overwritten(world: int, ahead: int) -> None:
    """Forward passes: a unit's output is dropped when the next has been waited for."""
    rows = tuple(0 if rank == 2 else 40 + rank for rank in range(world))

    def main(rank: int, ranks: Ranks) -> None:
        gathers = Gathers(ranks, rank, rows, buffers=ahead + 2, epoch=2**32 - 20)
        gathers.transport.arena.reserve(1 << 20, "at the start")
        slow, waiting, read = random.Random(rank), deque[tuple[int, Tensor]](), None
        for number in range(60):
            waiting.append((number, gathers.gather(number)))
            if len(waiting) < ahead:
                continue
            if read is not None:
                gathers.may_drop()
            read = waiting.popleft()
            gathers.read(*read, sleep=slow.choice((0, 0, 300, 3000)) if rank != 1 else 0)
        gathers.check()
        assert not gathers.overdue
        assert gathers.transport.arena.nbytes == (ahead + 2) * gathers.transport.arena.room

    Ranks(world).run(main)


def test_operations_that_copy_come_between_those_that_lend() -> None:
    """Own rows are copied in on another stream than the one which read that buffer before."""
    rows = (50, 43)

    def main(rank: int, ranks: Ranks) -> None:
        gathers, choice, slow = Gathers(ranks, rank, rows, buffers=3), random.Random(1), random.Random(rank)
        transport, others = gathers.transport, []
        transport.arena.reserve(1 << 20, "at the start")
        for number in range(60):
            if choice.random() < 0.5:
                out = gathers.gather(number)
                gathers.read(number, out, sleep=slow.choice((0, 0, 2000)))
                gathers.may_drop()
                del out
                continue
            if slow.random() < 0.3:
                gathers.gathering.sleep(2000)
            if choice.random() < 0.5:
                others.append(Kept(transport, gathers.gathering, all_gather((64, 60), rank), number))
            else:
                schedule = reduce_scatter((64, 60), rank)
                others.append(Operation(transport, gathers.gathering, schedule, number))
        gathers.check()
        for operation in others:
            operation.check()

    Ranks(2).run(main)


def test_what_is_held_for_long_moves_before_a_peer_may_write_there() -> None:
    rows = (40, 30)

    def main(rank: int, ranks: Ranks) -> None:
        gathers = Gathers(ranks, rank, rows, buffers=3)
        gathers.transport.arena.reserve(1 << 20, "at the start")
        gathers.gathering.sleep(20_000)  # it has not landed when it must move
        held = (0, gathers.gather(0))
        storage = gathers.transport.arena.view(0, torch.uint8, (1,)).untyped_storage().data_ptr()
        assert held[1].untyped_storage().data_ptr() == storage
        for number in range(1, 20):
            out = gathers.gather(number)
            gathers.read(number, out, sleep=1000 if rank else 0)
            gathers.may_drop()
            del out
            # Buffers of two others may be written while it is read, and the third is its own.
            assert gathers.overdue == ([0] if number > 1 else [])
        assert held[1].untyped_storage().data_ptr() != storage
        gathers.read(*held)
        gathers.check()

    Ranks(2).run(main)


def test_an_output_belongs_to_the_next_gather() -> None:
    def main(rank: int, ranks: Ranks) -> None:
        gathers = Gathers(ranks, rank, (40, 30), buffers=3)
        transport, way = gathers.transport, gathers.way
        first = way.output("first", lambda: None)
        assert first is not None
        assert way.output("second", lambda: None) is None, "the buffer is lent already"
        with pytest.raises(ValueError, match="allocated for first, but another operation begins"):
            transport.begin(transport.plan(gathers.plan, 4), "third")
        del first  # as after an exception: somebody else may have it
        again = way.output("fourth", lambda: None)
        assert again is not None
        # New buffers, while this one is out: it is filled by copying, and stays readable.
        transport.reserve(4 << 20, "a larger operation")
        landed = transport.arena.view(1, torch.int32, way.shape)
        assert landed.untyped_storage().data_ptr() != again.untyped_storage().data_ptr()
        del again
        out = gathers.gather(7)
        gathers.read(7, out)
        gathers.check()

    Ranks(2).run(main)


def test_where_two_buffers_are_all_that_the_budget_allows_none_is_lent() -> None:
    def main(rank: int, ranks: Ranks) -> None:
        gathers = Gathers(ranks, rank, (40, 30), buffers=3, arena_bytes=11 << 20)
        outputs = [gathers.gather(number) for number in range(2)]  # of three buffers of 2 MiB
        for number, out in enumerate(outputs):
            gathers.read(number, out, sleep=3000 if rank else 0)
        gathers.transport.reserve(4 << 20, "a larger operation")
        assert gathers.transport.arena.buffers == 2
        assert gathers.way.output("none", lambda: None) is None
        stream = gathers.gathering
        later = [Kept(gathers.transport, stream, all_gather((64, 60), rank), salt) for salt in range(20)]
        gathers.check()
        for operation in later:
            operation.check()
        assert not gathers.overdue

    Ranks(2).run(main)
