"""What the nvlink transport says of peers that stop, of misuse and of memory, on GPUs made of threads."""

import os
import signal
import time
from contextlib import suppress
from typing import Any

import pytest
import torch

from flashtrain.comm.schedule import Schedule, all_gather, reduce_scatter
from flashtrain.comm.transport.base import Exchange
from flashtrain.comm.transport.nvlink import NvlinkTransport
from flashtrain.errors import TransportError, UserError
from tests.comm.transport import fake_gpu
from tests.comm.transport.fake_gpu import Ranks, Stream
from tests.comm.transport.fake_operations import Operation

pytest.importorskip("flashtrain._core", reason="the C++ extension is not built")


def test_an_arena_beyond_its_budget_is_refused_on_every_rank() -> None:
    def main(rank: int, ranks: Ranks) -> str:
        transport = ranks.connect(rank, Stream(), arena_bytes=4 << 20)
        with (
            pytest.raises(UserError) as caught,
            transport.open(all_gather((200_000,) * 2, rank), "up") as exchange,
        ):
            exchange.landing_buffer(torch.empty(0), (3,))
        return str(caught.value)

    for message in Ranks(2).run(main):
        assert message.startswith("up needs landing buffers of 2 x 6 MiB, but comm.arena_bytes allows 4 MiB")


def test_ranks_that_need_different_buffers_are_told() -> None:
    def main(rank: int, ranks: Ranks) -> str:
        transport = ranks.connect(rank, Stream())
        with pytest.raises(TransportError) as caught:
            transport.arena.reserve((1 + rank) << 21, "up")
        return str(caught.value)

    for message in Ranks(2).run(main):
        assert message.startswith(
            "up: ranks need landing buffers of different sizes (bytes: 2097152, 4194304)"
        )


def _run_until_it_raises(
    transport: NvlinkTransport, stream: Stream, schedule: Schedule, pause: float
) -> tuple[str, int]:
    """What it said, and at which operation."""
    for salt in range(1, 60):
        try:
            Operation(transport, stream, schedule, salt)
        except TransportError as error:
            return str(error), salt
        stream.synchronize()  # returns though a peer is silent
        time.sleep(pause)
    raise AssertionError("nothing was raised")


@pytest.mark.parametrize("build", [all_gather, reduce_scatter])
def test_a_peer_that_stops_is_named_on_every_rank(build: Any) -> None:
    fake_gpu.delay(0)
    rows, stopped = (8, 8, 8), 1

    def main(rank: int, ranks: Ranks) -> tuple[str, float, int]:
        stream = Stream()
        transport = ranks.connect(rank, stream, timeout=0.4)
        Operation(transport, stream, build(rows, rank), 0)
        stream.synchronize()
        ranks.exchange(rank, "")
        started = time.monotonic()
        if rank == stopped:
            time.sleep(1.2)
        caught, salt = _run_until_it_raises(transport, stream, build(rows, rank), pause=0.0)
        took = time.monotonic() - started
        with pytest.raises(TransportError, match=r"operation|chunk"):
            transport.open(build(rows, rank), "afterwards").landing_buffer(torch.empty(0), ())
        return caught, took, salt

    for rank, (message, took, salt) in enumerate(Ranks(3).run(main)):
        assert message.startswith(f"rank {rank}: site ")
        assert f": {build.__name__} step " in message or "(operation " in message
        assert took < 2.5
        if rank != stopped:
            assert "site 1: " in message
            assert "peer rank 1" in message or "of rank 1 never arrived" in message
            assert salt <= 3
        else:
            assert "gave up" in message


def test_an_exception_within_an_operation_ends_it_for_the_peers_too() -> None:
    fake_gpu.delay(0)

    def main(rank: int, ranks: Ranks) -> str:
        stream = Stream()
        transport = ranks.connect(rank, stream, timeout=20)
        schedule = reduce_scatter((8, 8), rank)
        started = time.monotonic()
        if rank == 1:
            with suppress(ZeroDivisionError), transport.open(schedule, "down") as exchange:
                exchange.landing_buffer(torch.empty(0), (3,))
                raise ZeroDivisionError
        caught, _ = _run_until_it_raises(transport, stream, schedule, pause=0.05)
        assert time.monotonic() - started < 10
        return caught

    first, second = Ranks(2).run(main)
    assert "chunk 0, peer rank 1: rank 1 gave up this operation" in first
    assert second == "rank 1: down: reduce_scatter (operation 1): an exception broke it off"


def test_misuse_raises() -> None:
    def main(rank: int, ranks: Ranks) -> None:
        stream = Stream()
        transport = ranks.connect(rank, stream)
        schedule = all_gather((4, 4), rank)
        like = torch.zeros(4, 3)
        idle: Exchange = transport.open(schedule, "idle")
        idle.close()  # nothing had begun
        with pytest.raises(ValueError, match="ask for the landing buffer first"):
            transport.open(schedule, "x").begin(lambda send: like)
        with pytest.raises(ValueError, match="more chunks a rank than the 256 that have flags"):
            transport.plan(all_gather((4, 4), rank, subchunks=300), 4)
        with transport.open(schedule, "first") as exchange:
            exchange.landing_buffer(like, (3,))
            with pytest.raises(TransportError, match="an operation is open; give operations that overlap"):
                transport.open(schedule, "second").landing_buffer(like, (3,))
            with pytest.raises(ValueError, match="payload of chunk"):
                exchange.begin(lambda send: torch.zeros(3, 3))
            exchange.begin(lambda send: like)
        stream.synchronize()
        with pytest.raises(RuntimeError, match="there is no CUDA driver"):
            ranks.connect(rank, stream, driver="libthere-is-none.so")

    Ranks(2).run(main)


def test_a_forked_child_lets_go_of_the_transport_and_ends() -> None:
    transport = Ranks(1).connect(0, Stream())
    time.sleep(0.05)  # the watchdog, which the child will not have, waits
    child = os.fork()
    if child == 0:
        transport.shutdown()
        os._exit(0)
    limit = time.monotonic() + 5
    ended = 0, 0
    while not ended[0] and time.monotonic() < limit:
        time.sleep(0.01)
        ended = os.waitpid(child, os.WNOHANG)
    if not ended[0]:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert ended == (child, 0)
    transport.check()
    transport.shutdown()
