"""Operations in CUDA graphs, on GPUs made of threads: replays, their order, and failures in them."""

import random
import time
from collections.abc import Iterator
from itertools import product
from typing import Any

import pytest
import torch

from flashtrain.comm import products
from flashtrain.comm import transport as transports
from flashtrain.comm.schedule import Schedule, all_gather, all_to_all, reduce_scatter
from flashtrain.comm.transport import group, messages, nvlink
from flashtrain.comm.transport.nvlink import NvlinkTransport
from flashtrain.errors import TransportError, UserError
from tests.comm.transport import fake_gpu
from tests.comm.transport.fake_gpu import Graph, Ranks, Stream
from tests.comm.transport.fake_operations import Fused, Kept, Operation

pytest.importorskip("flashtrain._core", reason="the C++ extension is not built")


@pytest.fixture(autouse=True)
def _delays() -> Iterator[None]:
    fake_gpu.delay(30)
    yield
    fake_gpu.delay(0)


def _connect(
    rank: int, ranks: Ranks, stream: Stream, nbytes: int = 1 << 20, **options: Any
) -> tuple[NvlinkTransport, NvlinkTransport]:
    """A transport and that of its captured operations, with room for ``nbytes``."""
    eager = ranks.connect(rank, stream, **options)
    eager.captured = ranks.connect(rank, stream, in_graphs=True, **options)
    eager.reserve(nbytes, "outside of captures")
    return eager, eager.captured


def _fused(
    rank: int, transport: NvlinkTransport, stream: Stream, rows: tuple[int, ...], count: int
) -> list[Fused]:
    kinds = list(product(product((all_gather, reduce_scatter), (False, True)), (1, 3)))
    made = []
    for number in range(count):
        (build, carried), subchunks = kinds[number * 3 % 8]
        made.append(Fused(transport, stream, build(rows, rank, subchunks=subchunks), carried))
    return made


def _capture(stream: Stream, operations: list[Fused]) -> Graph:
    with stream.capture() as graph:
        for number, operation in enumerate(operations):
            operation.record(f"site {number}")
    return graph


@pytest.mark.parametrize(
    ("world", "counts", "turns"),
    [(2, (1, 1), False), (3, (1, 2), False), (3, (3, 4), True), (4, (5, 3), False), (4, (2, 3), True)],
)
def test_replays_of_two_graphs_and_other_operations_in_turn(
    world: int, counts: tuple[int, int], turns: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fresh data each time, ranks late at random, one without rows; the host never waits."""
    for name in ("TURN_BYTES", "GATHERED_TURN_BYTES"):
        monkeypatch.setattr(messages, name, 0 if turns else 1 << 40)
    fake_gpu.delay(20, slowness=30)
    rows = tuple(0 if rank == 1 else 40 + rank for rank in range(world))

    def main(rank: int, ranks: Ranks) -> None:
        stream, choice, delays = Stream(), random.Random(5), random.Random(rank)
        eager, captured = _connect(rank, ranks, stream)
        outside = _fused(rank, eager, stream, rows, 4)
        operations = [_fused(rank, captured, stream, rows, count) for count in counts]
        graphs = [_capture(stream, listed) for listed in operations]
        checks = []
        for salt in range(1, 50):
            if delays.random() < 0.2:
                stream.sleep(delays.randrange(3000))
            which = choice.randrange(3)
            if which == 2:
                checks.append(choice.choice(outside).start(salt))
                continue
            for number, operation in enumerate(operations[which]):
                operation.feed(10 * salt + number)
            stream.replay(graphs[which])
            checks += [operation.after() for operation in operations[which]]
        stream.synchronize()
        for check in checks:
            check()
        eager.check()

    Ranks(world).run(main)


@pytest.mark.parametrize("world", [2, 3])
def test_every_schedule_can_be_replayed(world: int) -> None:
    """Operations with a wait of the stream for each chunk, among them rings, captured one after the other."""

    def main(rank: int, ranks: Ranks) -> None:
        stream, delays = Stream(), random.Random(rank)
        eager, captured = _connect(rank, ranks, stream)
        rows = tuple(range(7, 7 + world))
        schedules: list[Schedule] = [all_to_all(rows, rank, subchunks=2)]
        for build, kind, subchunks in product((all_gather, reduce_scatter), ("direct", "ring"), (1, 3)):
            schedules.append(build(rows, rank, kind=kind, subchunks=subchunks))
        with stream.capture() as graph:
            operations: list[Operation | Kept] = [
                Operation(captured, stream, one, salt) for salt, one in enumerate(schedules)
            ]
            operations += [Kept(captured, stream, all_gather(rows, rank), 50, beside=n > 1) for n in range(4)]
        checks = []
        for salt in range(1, 8):
            if delays.random() < 0.3:
                stream.sleep(delays.randrange(5000))
            for number, operation in enumerate(operations):
                operation.feed(10 * salt + number)
            stream.replay(graph)
            checks += [operation.after() for operation in operations]
        stream.synchronize()
        for check in checks:
            check()
        eager.check()

    Ranks(world).run(main)


def test_a_flag_in_the_host_table_that_is_raised_late_goes_down_as_well() -> None:
    """A kernel waits for flags of the device; the next that uses the same columns waits for the others."""
    fake_gpu.delay(3, slowness=300)

    def main(rank: int, ranks: Ranks) -> None:
        stream = Stream()
        _, captured = _connect(rank, ranks, stream)
        fused = _fused(rank, captured, stream, (8, 8), 2)
        with stream.capture() as graph:
            for operation in fused:
                operation.record("fused")
            others = [Operation(captured, stream, all_gather((8, 8), rank), salt) for salt in range(2)]
        checks = []
        for salt in range(1, 12):
            for number, operation in enumerate((*fused, *others)):
                operation.feed(10 * salt + number)
            stream.replay(graph)
            checks += [operation.after() for operation in (*fused, *others)]
        stream.synchronize()
        for check in checks:
            check()

    Ranks(2).run(main)


def test_a_capture_may_go_on_upon_another_stream() -> None:
    def main(rank: int, ranks: Ranks) -> None:
        streams = [Stream(), Stream()]
        _, captured = _connect(rank, ranks, streams[0])
        first, second = [Fused(captured, stream, all_gather((30, 40), rank)) for stream in streams]
        third = Fused(captured, streams[0], reduce_scatter((30, 40), rank))
        with streams[0].capture() as graph:
            first.record("first")
            streams[1].follow(streams[0])
            captured._stream = lambda: streams[1].handle
            second.record("second")  # after the first: the transport sees to it
            captured._stream = lambda: streams[0].handle
            third.record("third")
            streams[0].follow(streams[1])
        checks = []
        for salt in range(1, 30):
            for number, operation in enumerate((first, second, third)):
                operation.stream = streams[0]
                operation.feed(10 * salt + number)
            streams[0].replay(graph)
            checks += [operation.after() for operation in (first, second, third)]
        streams[0].synchronize()
        for check in checks:
            check()

    Ranks(2).run(main)


def test_graphs_captured_before_landing_buffers_grew_still_run() -> None:
    def main(rank: int, ranks: Ranks) -> int:
        stream = Stream()
        eager, captured = _connect(rank, ranks, stream, arena_bytes=32 << 20)
        old = Fused(captured, stream, all_gather((50, 60), rank))
        graphs = [(_capture(stream, [old]), old)]
        eager.reserve(3 << 20, "a larger operation")
        new = Fused(captured, stream, all_gather((50, 60), rank))
        graphs.append((_capture(stream, [new]), new))
        checks = []
        for salt in range(20):
            graph, operation = graphs[salt % 2]
            operation.feed(salt)
            stream.replay(graph)
            checks.append(operation.after())
        stream.synchronize()
        for check in checks:
            check()
        with pytest.raises(UserError, match=r"landing buffers of 2 x 12 MiB beside 12 MiB that CUDA graphs"):
            eager.reserve(12 << 20, "one too large")
        return captured.arena.nbytes >> 20

    assert Ranks(2).run(main) == [12, 12]  # 2 x 2 and 2 x 4


def test_a_graph_that_runs_longer_than_the_time_out_has_not_failed() -> None:
    """One operation again and again: it always seems to be under way."""

    def main(rank: int, ranks: Ranks) -> None:
        stream = Stream()
        eager, captured = _connect(rank, ranks, stream, timeout=0.5)
        operation = Fused(captured, stream, reduce_scatter((40, 40), rank))
        with stream.capture() as graph:
            if rank == 1:
                stream.sleep(25_000)
            operation.record("down")
        for _ in range(50):
            stream.replay(graph)
        stream.synchronize()
        eager.check()

    Ranks(2).run(main)


@pytest.mark.parametrize("within", [False, True])
def test_a_peer_that_stops_is_named_and_later_replays_end(within: bool) -> None:
    """Rank 1 stops before its third replay, or in it, between the first and the second operation."""
    fake_gpu.delay(0)
    word = torch.zeros(1, dtype=torch.int32)

    def main(rank: int, ranks: Ranks) -> tuple[str, float]:
        stream = Stream()
        eager, captured = _connect(rank, ranks, stream, timeout=0.4)
        outside = Fused(eager, stream, all_gather((8, 8, 8), rank))
        operations = _fused(rank, captured, stream, (8, 8, 8), 2)
        with stream.capture() as graph:
            operations[0].record("layers.0.qkv")
            if rank == 1:
                stream.await_word(word.data_ptr(), 0 if not within else 1)
            operations[1].record("layers.0.down")
        word.fill_(1)
        for _ in range(2):
            stream.replay(graph)
        stream.synchronize()
        eager.check()
        ranks.exchange(rank, "")
        word.zero_()
        ranks.exchange(rank, "")
        began = time.monotonic()
        if rank == 1 and not within:
            ranks.exchange(rank, "the others have come to an end")
        for _ in range(300):
            stream.replay(graph)
        if rank == 1 and within:
            ranks.exchange(rank, "the others have come to an end")
            word.fill_(1)
        stream.synchronize()  # returns
        took = time.monotonic() - began
        if rank != 1:
            ranks.exchange(rank, "")
        deadline = time.monotonic() + 5
        while time.monotonic() < deadline:
            try:
                eager.check()
            except TransportError as error:
                with pytest.raises(TransportError):
                    outside.start(1)
                return str(error), took
            stream.replay(graph)
            stream.synchronize()
        raise AssertionError("nothing was raised")

    for rank, (message, took) in enumerate(Ranks(3).run(main)):
        assert took < 3
        if rank == 1:
            assert "gave up" in message
            continue
        assert "of a CUDA graph step " in message
        assert "peer rank 1" in message or "of rank 1 never arrived" in message
        assert message.startswith(
            f"rank {rank}: layers.0.{'down: ' if within else 'qkv: start of a replay of a CUDA graph'}"
        )


def test_what_cannot_be_captured_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    refusals = "comm.graphs is off; set it", "it has not run with these shapes; run it once"

    def main(rank: int, ranks: Ranks) -> None:
        stream = Stream()
        eager, captured = _connect(rank, ranks, stream)
        without = ranks.connect(rank, stream)
        without.reserve(1 << 20, "outside")
        schedule = all_gather((8, 8), rank)
        monkeypatch.setattr(nvlink, "capturing", lambda: True)
        with stream.capture():
            with (
                pytest.raises(UserError, match=f"^up cannot be captured in a CUDA graph: {refusals[0]}"),
                without.open(schedule, "up") as exchange,
            ):
                exchange.landing_buffer(torch.empty(0), (3,))
            with pytest.raises(UserError, match=f"^up .*{refusals[0]}"):
                without.reserve(3 << 20, "up")  # would grow
            with pytest.raises(UserError, match=f"^down cannot be .*: {refusals[1]}"):
                captured.reserve(3 << 20, "down")
        with (
            pytest.raises(TransportError, match="up: all_gather: this transport is for captured operations"),
            captured.open(schedule, "up") as exchange,
        ):
            exchange.landing_buffer(torch.empty(0), (3,))
        # Half of the flags are for every other operation.
        with (
            pytest.raises(ValueError, match="a message of all_gather has no place"),
            stream.capture(),
            captured.open(all_gather((200, 200), rank, subchunks=200), "up") as exchange,
        ):
            exchange.landing_buffer(torch.empty(0), (3,))
        ranks.exchange(rank, "")
        monkeypatch.setattr(nvlink, "capturing", lambda: False)
        Operation(eager, stream, schedule, 1)
        stream.synchronize()

    Ranks(2).run(main)


def test_while_a_graph_is_captured_its_transport_takes_the_place_of_the_other(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    device = torch.device("cuda", 0)

    def main(rank: int, ranks: Ranks) -> None:
        eager, captured = _connect(rank, ranks, Stream())
        transports.assign("of the test", "cuda", eager)
        try:
            assert transports.of("of the test", device) is eager
            monkeypatch.setattr(transports, "capturing", lambda: True)
            assert transports.of("of the test", device) is captured
            with pytest.raises(UserError, match="group another has no transport yet, and none can be made"):
                transports.of("another", device)
        finally:
            transports.shutdown()
        assert captured._engine is None

    Ranks(1).run(main)


def test_a_way_is_remembered_for_captured_operations_too() -> None:
    class Way:
        mover: Any = None

        def on(self, mover: Any, x: Any, w: Any) -> "Way":
            again = Way()
            again.mover = mover
            return again

    def main(rank: int, ranks: Ranks) -> None:
        eager, captured = _connect(rank, ranks, Stream())
        bound, free = Way(), object()
        operand = torch.zeros(1)
        assert products._keep(eager, ("bound",), bound, operand, operand) is bound
        assert products._keep(eager, ("free",), free, operand, operand) is free
        assert captured.ways["bound",].mover is captured
        assert captured.ways["free",] is free

    Ranks(1).run(main)


def test_torch_distributed_is_not_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    class Group:
        def rank(self) -> int:
            return 0

        def size(self) -> int:
            return 2

    monkeypatch.setattr(group.groups, "backend", lambda *_: "nccl")
    mover = group.GroupTransport(Group(), 1.0, "cuda")  # type: ignore[arg-type]
    schedule = all_gather((8, 8), 0)
    mover.open(schedule, "up")
    monkeypatch.setattr(group, "capturing", lambda: True)
    with pytest.raises(
        UserError, match=r"^up cannot be captured .* talk through group over nccl, and only nvlink"
    ):
        mover.open(schedule, "up")
