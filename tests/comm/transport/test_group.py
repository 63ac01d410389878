"""The torch.distributed transport: what it moves, and what it says when a peer fails."""

import os
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from flashtrain.comm import collectives, ops, schedule, transport
from flashtrain.comm.schedule import Expect, Send
from flashtrain.comm.transport.group import GroupTransport
from flashtrain.errors import TransportError
from tests.distributed import context, run_distributed

SILENCE = 1.0  # seconds after which a peer counts as failed here


def _main(
    fn: Callable[..., str], rank: int, world: int, store: str, args: tuple[Any, ...], answers: Any
) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=world, timeout=timedelta(seconds=30)
    )
    answers.put((rank, fn(rank, world, *args)))
    answers.close()
    answers.join_thread()
    os._exit(0)  # the group may be broken: no farewell


def survivors(fn: Callable[..., str], world: int, folder: Path, *args: Any) -> dict[int, str]:
    """What each rank but rank 1, which fails in ``fn``, returns."""
    answers = context.Queue()
    ranks = [
        context.Process(
            target=_main, args=(fn, rank, world, str(folder / "store"), args, answers), daemon=True
        )
        for rank in range(world)
    ]
    for process in ranks:
        process.start()
    try:
        return dict(answers.get(timeout=30) for _ in range(world - 1))
    finally:
        for process in ranks:
            process.kill()
            process.join()


def _meet_a_failure(rank: int, world: int, operation: str, way: str) -> str:
    transport.configure(transport.Settings(transport="group", timeout=SILENCE, subchunks=2))
    group = dist.group.WORLD.group_name

    def act() -> None:
        if operation == "all_gather":
            collectives.all_gather(torch.ones(4, 3), group, "layers.7.mlp.up")
        else:
            collectives.reduce_scatter(torch.ones(4 * world, 3), group, "layers.7.mlp.up")

    act()
    if rank == 1:
        if way == "exits":
            os._exit(0)
        time.sleep(60)
    started = time.monotonic()
    try:
        act()
    except TransportError as error:
        assert time.monotonic() - started < SILENCE + 10
        return str(error)
    return "no error"


@pytest.mark.parametrize("operation", ["all_gather", "reduce_scatter"])
@pytest.mark.parametrize("way", ["exits", "falls silent"])
def test_a_failing_peer_is_named_with_its_place_in_the_schedule(
    operation: str, way: str, tmp_path: Path
) -> None:
    answers = survivors(_meet_a_failure, 3, tmp_path, operation, way)
    assert answers.keys() == {0, 2}
    for rank, message in answers.items():
        assert message.startswith(f"rank {rank}: layers.7.mlp.up: {operation} step "), message
        assert " of 6, chunk " in message
        assert ", peer rank " in message
        assert "\n" not in message
    # One survivor may learn it from the other, which gave up first; at least one names the one that failed.
    assert any("peer rank 1: " in message for message in answers.values()), answers


def _receives_nothing(rank: int, world: int) -> str:
    def begin(batch: list[dist.P2POp]) -> list[dist.Work]:
        if any(message.op is dist.irecv for message in batch):
            raise RuntimeError("connection closed")
        return []

    dist.batch_isend_irecv = begin
    plan, before, behind = schedule.all_gather([1] * world, rank), (rank - 1) % world, (rank + 1) % world
    sends, expects = (
        {Send(rank, behind, rank): torch.ones(1)},
        {Expect(before, before, before): torch.ones(1)},
    )
    try:
        with GroupTransport(dist.group.WORLD, 20.0).open(plan, "site") as exchange:
            exchange.transfer(0, sends, expects)
    except TransportError as error:
        return str(error)
    return "no error"


def test_the_peer_of_a_message_that_cannot_begin_is_named() -> None:
    for rank, message in enumerate(run_distributed(_receives_nothing, 3)):
        before = (rank - 1) % 3
        assert message.endswith(f", chunk {before}, peer rank {before}: connection closed"), message


def _move(rank: int, world: int) -> dict[str, Any]:
    mover, peer = GroupTransport(dist.group.WORLD, 20.0), 1 - rank
    plan = schedule.all_gather([3, 0], rank)
    send, expect = Send(rank, peer, rank), Expect(peer, peer, peer)
    mine, theirs = torch.arange(3.0)[: 3 * (1 - rank)], torch.full((3 * rank,), -1.0)
    with mover.open(plan, "empty") as exchange:
        exchange.transfer(0, {send: mine}, {expect: theirs})
        exchange.wait(1, expect)
    empty_ok = torch.equal(theirs, torch.arange(3.0)[: 3 * rank])
    counted = mover.traffic.bytes_sent

    # Two operations at once, whose messages are waited for in the other order.
    first, second = mover.open(plan, "first"), mover.open(plan, "second")
    landings = [torch.empty(2), torch.empty(2)]
    for turn, exchange in enumerate((first, second)):
        exchange.transfer(0, {send: torch.full((2,), 10.0 * turn + rank)}, {expect: landings[turn]})
    second.wait(1, expect)
    first.wait(1, expect)
    second.close()
    first.close()
    return {"empty": empty_ok, "bytes": counted, "interleaved": [landing.tolist() for landing in landings]}


def test_empty_chunks_and_interleaved_operations() -> None:
    zero, one = run_distributed(_move, 2)
    assert zero == {"empty": True, "bytes": 12, "interleaved": [[1.0, 1.0], [11.0, 11.0]]}
    assert one == {"empty": True, "bytes": 0, "interleaved": [[0.0, 0.0], [10.0, 10.0]]}


def _counted(rank: int, world: int) -> tuple[float, ...]:
    transport.configure(transport.Settings(transport="group"))
    group = dist.group.WORLD.group_name
    ops.all_gather_matmul(torch.ones(4, 8), torch.ones(2, 8), group)
    traffic = transport.of(group, torch.device("cpu")).traffic
    return traffic.bytes_sent, traffic.in_flight, traffic.exposed, traffic.computing, traffic.operating


def test_traffic_of_an_operation_is_counted() -> None:
    for sent, in_flight, exposed, computing, operating in run_distributed(_counted, 3):
        assert sent == 2 * 4 * 8 * 4
        assert 0 <= exposed <= in_flight <= operating
        assert 0 < computing < operating
