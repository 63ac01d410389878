"""The order that schedules promise: who computes what when, and who sends it where."""

import itertools

import pytest
import torch

from flashtrain.comm import schedule
from flashtrain.comm.schedule import Compute, Schedule, Transfer, Wait

FAMILIES = [
    ("all_gather", "direct"),
    ("all_gather", "ring"),
    ("reduce_scatter", "direct"),
    ("reduce_scatter", "ring"),
    ("all_to_all", "direct"),
]
WORLDS = range(1, 17)


def build(op: str, kind: str, rows: list[int], subchunks: int = 1) -> list[Schedule]:
    make = getattr(schedule, op)
    return [make(rows, rank, kind=kind, subchunks=subchunks) for rank in range(len(rows))]


@pytest.mark.parametrize(
    ("op", "kind", "orders"),
    [
        ("all_gather", "ring", ["0321", "1032", "2103", "3210"]),
        ("reduce_scatter", "ring", ["3210", "0321", "1032", "2103"]),
        ("all_gather", "direct", ["0123", "1230", "2301", "3012"]),
        ("reduce_scatter", "direct", ["1230", "2301", "3012", "0123"]),
        ("all_to_all", "direct", ["1230", "2301", "3012", "0123"]),
    ],
)
def test_four_ranks_compute_in_the_published_order(op: str, kind: str, orders: list[str]) -> None:
    schedules = build(op, kind, [2] * 4)
    assert ["".join(str(step.compute) for step in one.steps) for one in schedules] == orders


@pytest.mark.parametrize(("op", "kind"), FAMILIES)
@pytest.mark.parametrize("subchunks", [1, 3])
def test_last_step_is_silent_and_every_other_one_moves_one_piece(op: str, kind: str, subchunks: int) -> None:
    for world in WORLDS:
        for one in build(op, kind, [6] * world, subchunks):
            silent = one.steps[-subchunks:]
            assert all(not step.sends and not step.expects for step in silent)
            assert all(len(step.sends) == len(step.expects) == 1 for step in one.steps[:-subchunks])


@pytest.mark.parametrize(
    ("op", "order"),
    [("all_gather", [2, 3, 4, 0, 5, 1]), ("reduce_scatter", [4, 0, 5, 1, 2, 3])],
)
def test_peers_take_turns_and_own_chunks_stay_at_their_end(op: str, order: list[int]) -> None:
    """Rank 1 of 3 with two sub-chunks each: one of each peer, then the next of each."""
    make = getattr(schedule, op)
    one = make([2] * 3, 1, subchunks=2, in_turn=True)
    assert [step.compute for step in one.steps] == order
    assert {step.sends + step.expects for step in one.steps} == {
        step.sends + step.expects for step in make([2] * 3, 1, subchunks=2).steps
    }
    with pytest.raises(ValueError, match="there is nobody to take turns"):
        make([2] * 3, 1, kind="ring", in_turn=True)


@pytest.mark.parametrize(("op", "kind"), FAMILIES)
def test_every_step_has_distinct_sources_and_destinations(op: str, kind: str) -> None:
    for world in WORLDS:
        schedules = build(op, kind, [1] * world)
        for steps in zip(*(one.steps for one in schedules), strict=True):
            destinations = [send.dst for step in steps for send in step.sends]
            sources = [expect.src for step in steps for expect in step.expects]
            assert len(set(destinations)) == len(destinations)
            assert len(set(sources)) == len(sources)


@pytest.mark.parametrize(("op", "kind"), [family for family in FAMILIES if family[1] == "direct"])
def test_direct_schedules_reach_every_peer_once(op: str, kind: str) -> None:
    for world in WORLDS:
        for one in build(op, kind, [1] * world):
            reached = [send.dst for step in one.steps for send in step.sends]
            assert sorted(reached) == [rank for rank in range(world) if rank != one.rank]


def test_an_owner_receives_partials_in_descending_rank_order() -> None:
    one = build("reduce_scatter", "direct", [1] * 5)[2]
    assert [expect.src for step in one.steps for expect in step.expects] == [1, 0, 4, 3]


@pytest.mark.parametrize("rows", [[3, 0, 5, 1], [0, 0, 0], [7], [0], [1, 2]])
@pytest.mark.parametrize("subchunks", [1, 2, 4])
def test_chunks_tile_the_rows_in_order(rows: list[int], subchunks: int) -> None:
    for op, kind in FAMILIES:
        for one in build(op, kind, rows, subchunks):
            assert len(one.chunks) == len(rows) * subchunks
            ends = list(itertools.accumulate(chunk.rows for chunk in one.chunks))
            assert [chunk.offset for chunk in one.chunks] == [0, *ends[:-1]]
            assert one.rows == sum(rows)
            assert [one.chunks[chunk].owner for chunk in one.own] == [one.rank] * subchunks
            start = sum(rows[: one.rank])
            assert one.own_rows == slice(start, start + rows[one.rank])


def test_split_rows_cuts_as_tensor_split_does() -> None:
    for rows, parts in itertools.product(range(12), range(1, 6)):
        pieces = torch.empty(rows).tensor_split(parts)
        assert schedule.split_rows(rows, parts) == tuple(len(piece) for piece in pieces)


@pytest.mark.parametrize(("op", "kind"), FAMILIES)
def test_actions_wait_on_the_right_side_of_the_product(op: str, kind: str) -> None:
    for one in build(op, kind, [2] * 4, 2):
        computed: set[int] = set()
        taken_in: set[object] = set()
        awaited: list[object] = []
        for action in one.actions():
            match action:
                case Compute(_, chunk):
                    computed.add(chunk)
                case Transfer(_, sends, expects):
                    taken_in.update(expects)
                    assert one.gathers or all(send.chunk in computed for send in sends)
                case Wait(_, expect):
                    assert expect in taken_in
                    assert (expect.chunk in computed) != one.gathers
                    awaited.append(expect)
        assert sorted(awaited) == sorted(expect for step in one.steps for expect in step.expects)
        assert len(awaited) == len(set(awaited))


def test_equal_arguments_give_the_same_immutable_object() -> None:
    one = schedule.all_gather([1, 2], 0)
    assert one is schedule.all_gather((1, 2), 0)
    assert hash(one) == hash(schedule.all_gather([1, 2], 0))
    with pytest.raises(AttributeError):
        one.rank = 1  # type: ignore[misc]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: schedule.all_gather([1, 1], 2), "rank 2 is not one of 2 ranks"),
        (lambda: schedule.reduce_scatter([1, 1], -1), "rank -1 is not one of 2 ranks"),
        (lambda: schedule.all_gather([], 0), "rank 0 is not one of 0 ranks"),
        (lambda: schedule.all_gather([1], 0, subchunks=0), "subchunks must be at least 1"),
        (lambda: schedule.all_gather([1, -1], 0), "must not be negative"),
        (lambda: schedule.all_to_all([1, 1], 0, kind="ring"), "no ring schedule for all_to_all"),
        (lambda: schedule.all_gather([1, 1], 0, kind="tree"), "no tree schedule for all_gather"),  # type: ignore[arg-type]
    ],
)
def test_arguments_out_of_range_are_refused(call: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()  # type: ignore[operator]
