"""What ranks agree on before they use each other's memory: who can share, where chunks land, which pages."""

import random
from typing import Any

import pytest
import torch
import torch.distributed as dist

from flashtrain.comm import transport
from flashtrain.comm.schedule import all_gather, all_to_all, reduce_scatter
from flashtrain.comm.transport import nvlink, symmetric
from flashtrain.comm.transport.landing import Landing
from flashtrain.comm.transport.pages import SharedPages
from flashtrain.errors import UserError
from tests.comm.transport.driving import gather_strings
from tests.distributed import run_distributed


def _facts(machine: str = "m/1", device: str = "a", visible: str = "a,b", reached: str = "a,b") -> str:
    return ";".join((machine, device, visible, reached))


@pytest.mark.parametrize(
    ("facts", "verdict"),
    [
        ([_facts(), _facts(device="b")], ""),
        # Each rank sees its own device alone: it cannot ask about the other.
        ([_facts(visible="a", reached="a"), _facts(device="b", visible="b", reached="b")], ""),
        ([_facts(), _facts(machine="n/1", device="b")], "ranks 0 and 1 run on different machines"),
        ([_facts(), _facts(device="b"), _facts(device="a")], "ranks 0 and 2 share one GPU"),
        ([_facts(), _facts(device="b", reached="b")], "the GPU of rank 1 cannot reach that of rank 0"),
        ([_facts(), "error:there is no CUDA driver"], "rank 1: there is no CUDA driver"),
    ],
)
def test_ranks_come_to_the_same_verdict(facts: list[str], verdict: str) -> None:
    assert symmetric.refusal(facts).startswith(verdict)
    assert bool(symmetric.refusal(facts)) == bool(verdict)


def _landing_of_everyone(schedules: list[Any]) -> None:
    """No two chunks that one rank takes in share a row, and each has its size."""
    for schedule in schedules:
        layout, taken = Landing(schedule), []
        for step in schedule.steps:
            for expect in step.expects:
                span = layout.span(schedule.rank, expect.chunk, expect.slot)
                assert span.stop - span.start == schedule.chunks[expect.chunk].rows
                taken += range(span.start, span.stop)
        assert len(taken) == len(set(taken))
        assert max(taken, default=-1) < layout.rows(schedule.rank) <= layout.most_rows()
        for step in schedule.steps:
            for send in step.sends:
                # The sender's idea of the place is the receiver's.
                theirs = Landing(schedules[send.dst])
                assert layout.span(send.dst, send.chunk, send.slot) == theirs.span(
                    send.dst, send.chunk, send.slot
                )


def test_chunks_land_apart_and_where_the_sender_thinks() -> None:
    choice = random.Random(1)
    for world in (2, 3, 5):
        rows = tuple(choice.choice((0, 1, 4, 9)) for _ in range(world))
        for build in (all_gather, reduce_scatter, all_to_all):
            for kind in ("direct", "ring"):
                if kind == "ring" and build is all_to_all:
                    continue
                for subchunks in (1, 3):
                    options = {} if build is all_to_all else {"kind": kind}
                    _landing_of_everyone(
                        [build(rows, rank, subchunks=subchunks, **options) for rank in range(world)]
                    )


def test_plans_pair_messages_and_keep_their_places() -> None:
    class Core:
        flag_columns = 256

        class Program:
            def __init__(
                self, op: str, steps: int, sends: list[Any], arrivals: list[Any], turns: list[Any]
            ) -> None:
                self.sends, self.arrivals = sends, arrivals
                assert not turns  # for so few bytes

    rows = (3, 0, 5)
    plans = [
        nvlink.Plan(Core, reduce_scatter(rows, rank, subchunks=2), row_bytes=10) for rank in range(len(rows))
    ]
    sent = sorted(
        (rank, peer, column, chunk, offset, size)
        for rank, plan in enumerate(plans)
        for peer, column, _, chunk, offset, size in plan.program.sends
    )
    taken = sorted(
        (peer, rank, column, chunk, offset, size)
        for rank, plan in enumerate(plans)
        for peer, column, _, chunk, offset, size in plan.program.arrivals
    )
    assert sent == taken
    assert len(sent) == 3 * 2 * 2
    assert [plan.nbytes for plan in plans] == [3 * 5 * 10] * 3  # the most that any rank needs
    assert [len(plan.early) for plan in plans] == [0] * 3
    gather = all_gather(rows, 0, subchunks=2)
    assert nvlink.Plan(Core, gather, 10).early == [send for step in gather.steps for send in step.sends]
    ring = all_gather(rows, 0, kind="ring")
    assert nvlink.Plan(Core, ring, 10).early == list(ring.steps[0].sends)


def _pages(rank: int, world: int) -> tuple[list[int], str]:
    with SharedPages(3000, rank, gather_strings) as pages:
        assert pages.words is not None
        assert pages.words.shape == (3000,)
        pages.words[rank] = rank + 1
        gather_strings(pages.problem)
    dist.barrier()
    return pages.words[: world + 1].tolist(), pages.problem


def test_pages_are_the_same_memory_on_every_rank() -> None:
    assert run_distributed(_pages, 3) == [([1, 2, 3, 0], "")] * 3


def _pages_refused(rank: int, world: int) -> str:
    def exchange(text: str) -> list[str]:
        return ["/proc/1/fd/none", *gather_strings(text)[1:]]

    with SharedPages(10, rank, exchange) as pages:
        assert rank == 0 or pages.words is None
    return pages.problem


def test_a_rank_that_cannot_map_the_pages_says_why() -> None:
    first, second = run_distributed(_pages_refused, 2)
    assert first == ""
    assert second.startswith("the flags of rank 0 cannot be mapped: ")


def _asks_for_nvlink(rank: int, world: int) -> list[str]:
    messages = []
    transport.configure(transport.Settings(transport="nvlink"))
    for device in ("cpu", "cuda"):
        with pytest.raises(UserError) as caught:
            transport.of(dist.group.WORLD.group_name, torch.device(device, 0))
        messages.append(str(caught.value))
    return messages


@pytest.mark.skipif(torch.cuda.is_available(), reason="is for machines without a GPU")
def test_nvlink_that_cannot_be_had_is_refused_with_the_reason() -> None:
    for on_cpu, on_gpu in run_distributed(_asks_for_nvlink, 2):
        assert on_cpu == "comm.transport is nvlink, but its ranks hold cpu tensors; use comm.transport group"
        assert on_gpu.startswith("comm.transport is nvlink, but rank 0: ")
        assert on_gpu.endswith("; use comm.transport group")


def test_an_arena_too_small_for_anything_is_refused() -> None:
    with pytest.raises(UserError, match=r"comm\.arena_bytes is 1000; it must be at least"):
        transport.Settings(arena_bytes=1000).validate()
