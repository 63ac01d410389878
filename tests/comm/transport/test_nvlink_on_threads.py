"""The nvlink transport on GPUs made of threads: order, reuse of buffers, flags that wrap."""

import gc
import random
import time
import weakref
from collections.abc import Iterator
from functools import partial
from importlib import import_module
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from flashtrain.comm.schedule import Schedule, all_gather, all_to_all, reduce_scatter
from flashtrain.comm.transport import messages
from flashtrain.comm.transport.arena import Arena
from flashtrain.comm.transport.symmetric import SymmetricBuffer
from flashtrain.errors import UserError
from tests.comm.transport import fake_gpu
from tests.comm.transport.fake_gpu import Ranks, Stream
from tests.comm.transport.fake_operations import Fused, Kept, Operation, contribution, random_rows

pytest.importorskip("flashtrain._core", reason="the C++ extension is not built")


@pytest.fixture(autouse=True)
def _delays() -> Iterator[None]:
    fake_gpu.delay(30)
    yield
    fake_gpu.delay(0)


def _schedules(rows: tuple[int, ...], rank: int) -> list[Schedule]:
    made = [all_to_all(rows, rank), all_to_all(rows, rank, subchunks=2)]
    for build, kind, subchunks in product((all_gather, reduce_scatter), ("direct", "ring"), (1, 3)):
        made.append(build(rows, rank, kind=kind, subchunks=subchunks))
    return made


@pytest.fixture(params=[False, True], ids=["at will", "in turn"])
def _turns(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Messages of any size take turns, or none do."""
    for name in ("TURN_BYTES", "GATHERED_TURN_BYTES"):
        monkeypatch.setattr(messages, name, 0 if request.param else 1 << 40)


@pytest.mark.usefixtures("_turns")
@pytest.mark.parametrize("world", [2, 3, 4])
def test_every_schedule_delivers_every_byte(world: int) -> None:
    def main(rank: int, ranks: Ranks) -> None:
        stream, choice = Stream(), random.Random(1)
        transport = ranks.connect(rank, stream)
        for salt in range(4):
            rows = random_rows(choice, world)
            operations = [Operation(transport, stream, s, salt) for s in _schedules(rows, rank)]
            stream.synchronize()
            for operation in operations:
                operation.check()
        transport.check()

    Ranks(world).run(main)


@pytest.mark.usefixtures("_turns")
@pytest.mark.parametrize("epoch", [0, 2**30 - 100, 2**31 - 100, 2**32 - 100])
def test_hundreds_of_operations_without_the_host_waiting_once(epoch: int) -> None:
    world = 3

    def main(rank: int, ranks: Ranks) -> None:
        stream, choice, delays = Stream(), random.Random(2), random.Random(rank)
        transport = ranks.connect(rank, stream, epoch=epoch)
        transport.arena.reserve(1 << 20, "at the start")  # growing would wait
        operations = []
        for salt in range(200):
            # Sometimes one rank is late, sometimes another: the others run ahead as far as they may.
            if delays.random() < 0.15:
                stream.sleep(delays.randrange(3000))
            rows = random_rows(choice, world)
            operations.append(Operation(transport, stream, choice.choice(_schedules(rows, rank)), salt))
        stream.synchronize()
        for operation in operations:
            operation.check()
        transport.check()

    Ranks(world).run(main)


def test_flags_that_went_unused_for_two_thousand_million_operations() -> None:
    """At 2^30 epochs and its multiples all flags are brought up, or these would soon seem to be ahead."""
    epoch = 2**30 - 10

    def main(rank: int, ranks: Ranks) -> None:
        stream = Stream()
        transport = ranks.connect(rank, stream, epoch=epoch, flags=(epoch - 2**31 + 40) % 2**32)
        for salt in range(60):
            operation = Operation(transport, stream, all_gather((30, 30), rank), salt)
        stream.synchronize()
        operation.check()
        ranks.exchange(rank, "")  # the peer's pushes are here
        on_host = transport._tables[0].view(2, -1)[rank, : 2 * 256].view(2, 256).tolist()
        on_device = transport._tables[1].memory.view(torch.int32)[: 2 * 256].view(2, 256).tolist()
        assert on_host[1 - rank] == [epoch + 60] + [2**30 - 1] * 255
        assert on_host[rank] == on_device[rank] == on_device[1 - rank] == [2**30 - 1] * 256

    Ranks(2).run(main)


@pytest.mark.usefixtures("_turns")
@pytest.mark.parametrize("world", [2, 3])
def test_own_rows_are_put_beside_those_that_land(world: int) -> None:
    fake_gpu.delay(20, slowness=30)

    def main(rank: int, ranks: Ranks) -> None:
        stream, delays = Stream(), random.Random(rank)
        transport = ranks.connect(rank, stream)
        operations = []
        for salt in range(60):
            if delays.random() < 0.2:
                stream.sleep(delays.randrange(3000))
            rows = tuple(0 if (peer + salt) % 4 == 0 else 20 + peer for peer in range(world))
            plan = all_gather(rows, rank, subchunks=1 + salt % 3)
            operations.append(Kept(transport, stream, plan, salt, beside=salt % 5 < 2))
        stream.synchronize()
        for operation in operations:
            operation.check()

    Ranks(world).run(main)


def test_streams_may_change_between_operations() -> None:
    def main(rank: int, ranks: Ranks) -> None:
        streams, choice, delays = [Stream(), Stream()], random.Random(3), random.Random(rank)
        transport = ranks.connect(rank, streams[0])
        transport.arena.reserve(1 << 20, "at the start")
        operations = []
        for salt in range(80):
            stream = choice.choice(streams)
            transport._stream = lambda handle=stream.handle: handle
            if delays.random() < 0.3:
                stream.sleep(delays.randrange(2000))
            operations.append(Operation(transport, stream, all_gather((90, 0, 40), rank), salt))
        for stream in streams:
            stream.synchronize()
        for operation in operations:
            operation.check()

    Ranks(3).run(main)


def test_two_groups_at_once() -> None:
    groups = [Ranks(3), Ranks(3)]

    def main(rank: int, ranks: Ranks) -> None:
        streams, choice = [Stream(), Stream()], random.Random(4)
        transports = [group.connect(rank, stream) for group, stream in zip(groups, streams, strict=True)]
        for transport in transports:
            transport.arena.reserve(1 << 20, "at the start")
        operations = []
        for salt in range(60):
            which = choice.randrange(2)
            schedule = choice.choice(_schedules(random_rows(choice, 3), rank))
            operations.append(Operation(transports[which], streams[which], schedule, salt))
        for stream in streams:
            stream.synchronize()
        for operation in operations:
            operation.check()

    Ranks(3).run(main)


def test_products_of_two_groups_follow_one_another() -> None:
    """Both kernels at once would each keep multiprocessors from the other's peers."""
    groups = [Ranks(2), Ranks(2)]

    def main(rank: int, ranks: Ranks) -> None:
        streams = [Stream(), Stream()]
        transports = [group.connect(rank, stream) for group, stream in zip(groups, streams, strict=True)]
        for transport in transports:
            transport.arena.reserve(1 << 20, "at the start")
        if rank == 1:
            streams[0].sleep(100_000)  # microseconds
        products = [
            Fused(transport, stream, build((40, 40), rank)).start(1)
            for transport, stream, build in zip(
                transports, streams, (all_gather, reduce_scatter), strict=True
            )
        ]
        streams[1].synchronize()
        for check in products:
            check()
        streams[0].synchronize()

    Ranks(2).run(main)


@pytest.mark.parametrize("world", [2, 3])
def test_kernels_that_wait_for_arrivals_and_signal_what_leaves(world: int) -> None:
    """Gathers and scatters in turn, hundreds in flight, each one call; ranks come late now and then."""
    rows = tuple(range(60, 60 + world))

    def main(rank: int, ranks: Ranks) -> None:
        stream, delays = Stream(), random.Random(rank)
        transport = ranks.connect(rank, stream)
        transport.arena.reserve(1 << 20, "at the start")
        fused = [
            Fused(transport, stream, build(rows, rank, subchunks=subchunks))
            for build, subchunks in product((all_gather, reduce_scatter), (1, 3))
        ]
        carried = [build(rows, rank, subchunks=2) for build in (all_gather, reduce_scatter)]
        fused += [Fused(transport, stream, schedule, True) for schedule in carried]
        started = []
        for salt in range(120):
            if delays.random() < 0.15:
                stream.sleep(delays.randrange(2000))
            started.append(fused[salt * 7 % 6].start(salt))
        stream.synchronize()
        for check in started:
            check()
        transport.check()

    Ranks(world).run(main)


@pytest.mark.parametrize(("build", "carried"), [*product((all_gather, reduce_scatter), (False, True))])
def test_a_rank_without_rows_is_waited_for_by_the_others_and_waits_for_them(
    build: Any, carried: bool
) -> None:
    """Kernels wait for rows alone; without more, ranks would overwrite what others still read."""
    fake_gpu.delay(10, slowness=20)

    def main(rank: int, ranks: Ranks) -> None:
        stream = Stream()
        transport = ranks.connect(rank, stream)
        transport.arena.reserve(1 << 20, "at the start")
        operation, started = Fused(transport, stream, build((40, 0, 42), rank), carried), []
        for salt in range(60):
            if rank == (1 if build is all_gather else 0) and salt % 4 == 0:
                stream.sleep(3000)
            started.append(operation.start(salt))
        stream.synchronize()
        for check in started:
            check()

    Ranks(3).run(main)


def test_what_was_complete_before_leaves_while_the_stream_is_busy() -> None:
    """On a transport beside the one whose last operation says so; each time with other data."""
    world, rows = 3, (40, 0, 42)
    asleep = 300_000  # microseconds

    def main(rank: int, ranks: Ranks) -> float:
        stream, delays = Stream(), random.Random(rank)
        before, lane = ranks.connect(rank, stream), ranks.connect(rank, stream)
        for transport in (before, lane):
            transport.arena.reserve(1 << 20, "at the start")
        operations = [Fused(before, stream, reduce_scatter(rows, rank), carried) for carried in (False, True)]
        schedule = all_gather(rows, rank)
        plan, own, checks, took = lane.plan(schedule, 12), schedule.own_rows, [], 0.0
        flags = lane._tables[0].view(world, -1)[rank, : world * lane.core.flag_columns].view(world, -1)[:, 0]
        wholes = [
            torch.cat([contribution(schedule, source, source, salt) for source in range(world)])
            for salt in range(30)
        ]
        sources, seen = ([torch.zeros_like(whole) for whole in wholes] for _ in range(2))
        fake_gpu._mapped.append((sources, seen, wholes))
        for salt, (source, found) in enumerate(zip(sources, seen, strict=True)):
            if salt % 3 == 0:
                stream.sleep(500)
                for later in range(salt, salt + 3):
                    stream.copy(sources[later], wholes[later])
                checks.append(operations[salt % 2].start(salt))
            stream.sleep(asleep if salt == 29 else delays.randrange(1000))
            began = time.monotonic()
            epoch = lane.begin(plan, "lane")
            starts = [source.data_ptr() + 12 * schedule.chunks[send.chunk].offset for send in plan.sends]
            lane.push_early(list(range(len(starts))), starts, "lane", before)
            lane.keep(source.data_ptr() + 12 * own.start, 12 * own.start, source[own].nbytes, "lane")
            lane.wait_for_all("lane")
            stream.sleep(delays.randrange(1000))
            stream.copy(found, lane.landed(torch.int32, (schedule.rows, 3)))
            lane.finish("lane")
            checks.append(partial(_equal, found, wholes[salt]))
        while any(int(flags[peer]) < epoch for peer in range(world) if peer != rank):
            time.sleep(0.001)
        took = time.monotonic() - began
        stream.synchronize()
        for check in checks:
            check()
        return took

    assert max(Ranks(world).run(main)) < asleep * 0.5e-6


def _equal(found: Tensor, wanted: Tensor) -> None:
    assert torch.equal(found, wanted)


def test_the_tables_live_as_long_as_the_watchdog_that_reads_them() -> None:
    """Even where nothing shuts the transport down, as when an interpreter ends in its own order."""
    core = import_module("flashtrain._core")
    host, device = (torch.zeros(core.flag_table_words(1), dtype=torch.int32) for _ in range(2))
    engine = core.CopyEngine(
        fake_gpu.driver(), 0, 1.0, 0, host.data_ptr(), [device.data_ptr()], False, (host, device)
    )
    table = weakref.ref(host)
    del host, device
    gc.collect()
    assert table() is not None
    del engine
    gc.collect()
    assert table() is None


def test_a_launch_refuses_what_the_kernel_does_not_take() -> None:
    def main(rank: int, ranks: Ranks) -> None:
        stream = Stream()
        transport = ranks.connect(rank, stream)
        core = transport.core
        kernel = core.Kernel(fake_gpu.driver(), b"", "relay", 0, 32)
        with pytest.raises(
            RuntimeError, match=r"parameters of 128, 4, 4, 8, 8, .* bytes where 8, 8, 8 were expected"
        ):
            core.Launch(kernel, [core.Parameter.pointer("x", False)])
        with pytest.raises(RuntimeError, match="cuModuleGetFunction"):
            core.Kernel(fake_gpu.driver(), b"", "another", 0, 32)
        operation = Fused(transport, stream, all_gather((64,), 0))
        with pytest.raises(ValueError, match="landing starts at an address that is no multiple of 16 bytes"):
            operation.launch.start(1, stream.handle, [8] * 16)
        with pytest.raises(ValueError, match="one value a parameter"):
            operation.launch.start(1, stream.handle, [16])

    Ranks(1).run(main)


def test_the_arena_grows_when_nothing_moves_and_keeps_its_size_otherwise() -> None:
    def main(rank: int, ranks: Ranks) -> list[int]:
        stream, sizes = Stream(), []
        transport = ranks.connect(rank, stream)
        for salt, rows in enumerate((10, 200_000, 10, 400_000, 200_000)):
            operation = Operation(transport, stream, all_gather((rows, rows // 2), rank), salt)
            sizes.append(transport.arena.nbytes >> 20)
            stream.synchronize()
            operation.check()
        return sizes

    # Rows of 12 bytes, twice, in steps of 2 MiB; equal on ranks with unequal rows.
    assert Ranks(2).run(main) == [[4, 8, 8, 16, 16]] * 2


def test_an_arena_grows_in_an_order_that_leaves_nobody_without_memory() -> None:
    events: list[Any] = []

    def allocate(nbytes: int) -> SymmetricBuffer:
        events.append("allocate")
        return SymmetricBuffer(torch.empty(nbytes, dtype=torch.uint8), (1, 2))

    def exchange(text: str) -> list[str]:
        events.append("exchange")
        return [text, text]

    arena = Arena(allocate, exchange, lambda: events.append("idle"), lambda *new: events.append(new), 1 << 30)
    for nbytes in (10, 3 << 20, 5):
        arena.reserve(nbytes, "up")
    # Idle everywhere, then known to be idle everywhere, then the memory changes.
    first = ["idle", "exchange", "allocate", ((1, 2), 2 << 20, 2)]
    assert events == [*first, "idle", "exchange", "allocate", ((1, 2), 4 << 20, 2)]
    view = arena.view(1, torch.bfloat16, (5, 7))
    assert arena.view(1, torch.bfloat16, (5, 7)) is view
    assert view.data_ptr() - arena.view(0, torch.bfloat16, (5, 7)).data_ptr() == 4 << 20

    def fails() -> None:
        raise RuntimeError("the device has failed")

    arena._quiesce = fails
    with pytest.raises(RuntimeError, match="the device has failed"):
        arena.reserve(9 << 20, "up")
    assert events[-1] == "exchange"  # the others were told


def test_an_arena_has_as_many_buffers_as_its_budget_allows_but_two() -> None:
    made: list[Any] = []

    def allocate(nbytes: int) -> SymmetricBuffer:
        return SymmetricBuffer(torch.empty(nbytes, dtype=torch.uint8), (1, 2))

    arena = Arena(allocate, lambda text: [text], lambda: None, lambda *new: made.append(new[1:]), 20 << 20, 4)
    for mib, buffers, held in ((2, 4, 8), (5, 2, 12), (10, 2, 20)):  # in steps of 2 MiB
        arena.reserve(mib << 20, "up")
        assert (arena.buffers, arena.nbytes >> 20) == (buffers, held)
        assert made[-1] == (arena.room, buffers)
    with pytest.raises(
        UserError, match=r"landing buffers of 2 x 12 MiB, but comm\.arena_bytes allows 20 MiB"
    ):
        arena.reserve(11 << 20, "up")


def test_an_operation_ends_with_all_its_arrivals() -> None:
    def main(rank: int, ranks: Ranks) -> None:
        stream = Stream()
        transport = ranks.connect(rank, stream)
        schedule = all_gather((50, 50), rank)
        own = contribution(schedule, rank, rank, 0)
        with transport.open(schedule, "nobody waits") as exchange:
            landed = exchange.landing_buffer(own, (3,))
            if rank == 0:
                stream.sleep(20_000)
                exchange.transfer(0, {schedule.steps[0].sends[0]: own}, {})
            else:
                exchange.begin(lambda send: own)
        stream.synchronize()
        theirs = slice(50 * (1 - rank), 50 * (2 - rank))
        assert torch.equal(landed[theirs], contribution(schedule, 1 - rank, 1 - rank, 0))

    Ranks(2).run(main)


@pytest.mark.parametrize(("build", "subchunks"), [(all_gather, 1), (all_gather, 3), (reduce_scatter, 2)])
def test_a_turn_is_given_to_whoever_sends_there_next(build: Any, subchunks: int) -> None:
    core, world = import_module("flashtrain._core"), 5
    most = messages.GATHERED_TURN_BYTES if build is all_gather else messages.TURN_BYTES
    plans = [build((most,) * world, rank, subchunks=subchunks) for rank in range(world)]
    sends: list[list[Any]] = [[] for _ in plans]
    given, awaited = {}, {}
    for rank, plan in enumerate(plans):
        arrivals: list[tuple[int, ...]] = []
        sends[rank] = [
            (send.dst, 0, index, send.chunk, 0, 0)
            for index, step in enumerate(plan.steps)
            for send in step.sends
        ]
        counts = [subchunks * (peer != rank) for peer in range(world)]
        turns = messages._take_turns(core, plan, sends[rank], arrivals, counts)
        for (there, *_), (arrival, peer, column) in zip(sends[rank], turns, strict=True):
            if peer != core.no_turn:
                given[rank, peer, column] = there
                assert column >= subchunks  # the flags below are the chunks'
            if arrival != core.no_turn:
                peer, column, *_ = arrivals[arrival]
                awaited[peer, rank, column] = there
    assert given == awaited
    assert len(given) == world * (world - 2)
    assert not messages._takes_turns(build((most - 1, *[most] * 4), 0), 1)
    assert not messages._takes_turns(build((most, most), 0), 1)
