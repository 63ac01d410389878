"""Schedules of all ranks fit together, reach the bound, and faults in them are found."""

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flashtrain.comm import schedule
from flashtrain.comm.schedule import Expect, Schedule, Send, Step
from flashtrain.comm.simulate import ScheduleError, Timeline, bound, check, simulate

FAMILIES = [
    ("all_gather", "direct"),
    ("all_gather", "ring"),
    ("reduce_scatter", "direct"),
    ("reduce_scatter", "ring"),
    ("all_to_all", "direct"),
]
# Those whose sub-chunks may go to all peers in turn.
TAKING_TURNS = [("all_gather", "direct"), ("reduce_scatter", "direct")]


def build(op: str, kind: str, rows: list[int], subchunks: int = 1, **options: bool) -> list[Schedule]:
    make = getattr(schedule, op)
    return [make(rows, rank, kind=kind, subchunks=subchunks, **options) for rank in range(len(rows))]


def engines_are_exclusive(timeline: Timeline) -> bool:
    last: dict[tuple[int, str], int | Fraction] = {}
    for event in timeline.events:
        if event.start < last.get((event.rank, event.engine), 0):
            return False
        last[event.rank, event.engine] = event.end
    return True


def deliveries(timeline: Timeline) -> Counter[tuple[int, int]]:
    """How often each (rank, chunk) arrived."""
    return Counter((event.rank, event.chunk) for event in timeline.events if event.engine == "ingress")


@pytest.mark.parametrize(("op", "kind"), FAMILIES)
@pytest.mark.parametrize("rendezvous", [False, True])
def test_equal_chunks_reach_the_bound_exactly(op: str, kind: str, rendezvous: bool) -> None:
    for world in range(1, 17):
        for subchunks in (1, 2, 3, 4):
            schedules = build(op, kind, [12] * world, subchunks)
            for percent in (6, 90, 1700):
                timeline = simulate(
                    schedules,
                    compute=lambda rows: 100 * rows,
                    transfer=lambda rows, percent=percent: percent * rows,
                    rendezvous=rendezvous,
                )
                assert timeline.makespan == bound(world, 1200, 12 * percent, subchunks)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_everything_is_delivered_once_under_any_delay(data: st.DataObject) -> None:
    op, kind = data.draw(st.sampled_from(FAMILIES), "family")
    rows = data.draw(st.lists(st.integers(0, 7), min_size=1, max_size=16), "rows")
    subchunks = data.draw(st.integers(1, 4), "subchunks")
    world = len(rows)
    turns = {"in_turn": data.draw(st.booleans(), "in turn")} if (op, kind) in TAKING_TURNS else {}
    schedules = build(op, kind, rows, subchunks, **turns)
    ratio = data.draw(st.fractions(Fraction(6, 100), 17), "t_m/t_c")
    steps = st.tuples(st.integers(0, world - 1), st.integers(0, len(schedules[0].steps) - 1))
    timeline = simulate(
        schedules,
        transfer=lambda rows: ratio * rows,
        pauses=data.draw(st.dictionaries(steps, st.integers(0, 50), max_size=10), "pauses"),
        slowdown=data.draw(st.lists(st.integers(1, 5), min_size=world, max_size=world), "slowdown"),
        rendezvous=data.draw(st.booleans(), "rendezvous"),
    )
    assert engines_are_exclusive(timeline)
    own = [(one.rank, chunk) for one in schedules for chunk in one.own]
    every = [(rank, chunk) for rank in range(world) for chunk in range(len(schedules[0].chunks))]
    if op == "all_gather":
        assert deliveries(timeline) == Counter(every) - Counter(own)
    elif kind == "direct":
        assert deliveries(timeline) == Counter(own * (world - 1))
    else:
        # A sum visits every rank but the one that starts it, which is the owner's right neighbour.
        starts = [((chunk // subchunks + 1) % world, chunk) for chunk in range(len(schedules[0].chunks))]
        assert deliveries(timeline) == Counter(every) - Counter(starts)
    for one in schedules:
        computed = [e.chunk for e in timeline.events if e.rank == one.rank and e.engine == "compute"]
        assert sorted(computed) == list(range(len(one.chunks)))
        ends = computed[:subchunks] if op == "all_gather" else computed[-subchunks:]
        # Events of empty chunks share one moment, so only the set of the first or last ones is certain.
        if min(rows) * subchunks and min(chunk.rows for chunk in one.chunks):
            assert ends == list(one.own)


def test_a_late_rank_holds_up_the_others() -> None:
    for op, kind in FAMILIES:
        late = simulate(build(op, kind, [4] * 4), pauses={(2, 0): 10}).makespan
        # It computes for 16 itself; at worst each of its transfers finds the other engine taken once.
        assert 10 + 16 <= late <= 10 + 16 + 3 * 4


def test_a_slow_rank_computes_longer() -> None:
    timeline = simulate(build("all_gather", "direct", [4, 4]), slowdown=[1, 3])
    spent = [sum(e.end - e.start for e in timeline.events if e[:2] == (rank, "compute")) for rank in (0, 1)]
    assert (spent, timeline.makespan) == ([8, 24], 24)


def test_a_rendezvous_waits_for_the_destination() -> None:
    schedules = build("all_gather", "direct", [4, 4])
    for rendezvous, start in ((False, 0), (True, 9)):
        timeline = simulate(schedules, pauses={(1, 0): 9}, rendezvous=rendezvous)
        assert [e.start for e in timeline.events if e[:2] == (1, "ingress")] == [start]


def test_of_two_transfers_the_one_posted_first_comes_first() -> None:
    # Rank 3 fills the ingress of rank 0 until 16. Rank 2 asks for it at 9, rank 1 at 13.
    schedules = build("reduce_scatter", "direct", [1, 0, 0, 0])
    timeline = simulate(schedules, transfer=lambda rows: 15 * rows, pauses={(2, 1): 8, (1, 2): 12})
    arrivals = [(e.peer, e.start) for e in timeline.events if e[:2] == (0, "ingress")]
    assert arrivals == [(3, 1), (2, 16), (1, 31)]


def test_pauses_are_not_counted_as_exposed() -> None:
    timeline = simulate(build("all_gather", "direct", [4]), pauses={(0, 0): 7})
    assert (timeline.makespan, timeline.exposed, timeline.hidden) == (11, (0,), None)


def test_hidden_share_of_a_transfer_bound_gather() -> None:
    timeline = simulate(build("all_gather", "direct", [1] * 4), transfer=lambda rows: 2 * rows)
    assert timeline.exposed == (3, 3, 3, 3)
    assert timeline.hidden == Fraction(1, 2)
    assert simulate(build("all_gather", "direct", [1] * 4)).hidden == 1


def test_an_ingress_serves_one_source_at_a_time() -> None:
    timeline = simulate(build("reduce_scatter", "direct", [0, 8, 0]), pauses={(0, 0): 5})
    arrivals = [e[2:4] for e in timeline.events if e.rank == 1 and e.engine == "ingress"]
    # Rank 0 is ready at 13, while the partial of rank 2 is on its way.
    assert arrivals == [(8, 16), (16, 24)]
    assert timeline.makespan == 24
    assert engines_are_exclusive(timeline)


def with_step(schedules: list[Schedule], rank: int, index: int, **changes: object) -> list[Schedule]:
    """``schedules`` with one step of one rank changed."""
    steps = list(schedules[rank].steps)
    steps[index] = steps[index]._replace(**changes)
    return with_steps(schedules, rank, steps)


def with_steps(schedules: list[Schedule], rank: int, steps: list[Step]) -> list[Schedule]:
    return [replace(one, steps=tuple(steps)) if one.rank == rank else one for one in schedules]


def deadlocked() -> list[Schedule]:
    """Both ranks send their chunk only after they have received the other one's."""
    schedules = build("all_gather", "direct", [1, 1])
    for one in list(schedules):
        first, last = one.steps
        steps = [first._replace(sends=()), last._replace(sends=first.sends)]
        schedules = with_steps(schedules, one.rank, steps)
    return schedules


def delivered_twice() -> list[Schedule]:
    schedules = build("all_gather", "direct", [1] * 3)
    again = schedules[1].steps[0].sends[0]  # chunk 1 to rank 0
    schedules = with_step(schedules, 1, 1, sends=(*schedules[1].steps[1].sends, again))
    return with_step(schedules, 0, 1, expects=(*schedules[0].steps[1].expects, Expect(1, 1, 1)))


def never_delivered() -> list[Schedule]:
    schedules = with_step(build("all_gather", "direct", [1] * 3), 1, 0, sends=())
    return with_step(schedules, 0, 0, expects=())


def lacks_a_contributor(kind: str) -> list[Schedule]:
    """The first transfer from rank 0 to rank 1 is left out on both sides."""
    schedules = with_step(build("reduce_scatter", kind, [1] * 3), 0, 0, sends=())
    expects = [[e for e in step.expects if e.src != 0] for step in schedules[1].steps]
    index = next(i for i, step in enumerate(schedules[1].steps) if any(e.src == 0 for e in step.expects))
    return with_step(schedules, 1, index, expects=tuple(expects[index]))


def added_twice() -> list[Schedule]:
    """Rank 0 sends the ring's sum of chunk 1 to its owner straight away, and along the ring as well."""
    schedules = build("reduce_scatter", "ring", [1] * 3)
    index = next(i for i, step in enumerate(schedules[2].steps) if step.compute == 1)
    assert index == 0  # rank 2 starts chunk 1, rank 0 adds to it, rank 1 owns it
    schedules = with_step(schedules, 2, 0, sends=(*schedules[2].steps[0].sends, Send(1, 1, 2)))
    return with_step(schedules, 1, 0, expects=(*schedules[1].steps[0].expects, Expect(1, 2, 2)))


def forwards_too_early() -> list[Schedule]:
    """Rank 1 of the ring forwards at step 0 what arrives during step 0."""
    schedules = build("all_gather", "ring", [1] * 3)
    first, second, last = schedules[1].steps
    early = [first._replace(sends=second.sends), second._replace(sends=first.sends), last]
    there, then, end = schedules[2].steps
    taken = [there._replace(expects=then.expects), then._replace(expects=there.expects), end]
    return with_steps(with_steps(schedules, 1, early), 2, taken)


def swapped(op: str, kind: str = "direct") -> list[Schedule]:
    """Rank 2 computes its first and last chunk in each other's place."""
    schedules = build(op, kind, [1] * 3)
    first, second, last = schedules[2].steps
    steps = [first._replace(compute=last.compute), second, last._replace(compute=first.compute)]
    return with_steps(schedules, 2, steps)


def changed(op: str, rank: int, index: int, **changes: object) -> Callable[[], list[Schedule]]:
    return lambda: with_step(build(op, "direct", [1] * 3), rank, index, **changes)


def out_of_order() -> list[Schedule]:
    """Rank 0 expects the sub-chunks of rank 1 in the other order."""
    schedules = build("all_gather", "direct", [2, 2], 2)
    one, two = schedules[0].steps[:2]
    schedules = with_step(schedules, 0, 0, expects=two.expects)
    return with_step(schedules, 0, 1, expects=one.expects)


def awaited_before_taken_in() -> list[Schedule]:
    schedules = build("all_gather", "direct", [1] * 3)
    first, second, last = schedules[0].steps
    return with_steps(
        schedules, 0, [first._replace(expects=()), second, last._replace(expects=first.expects)]
    )


def wrong_slot() -> list[Schedule]:
    schedules = with_step(build("reduce_scatter", "direct", [1] * 3), 0, 0, sends=(Send(1, 1, 2),))
    return with_step(schedules, 1, 0, expects=(Expect(1, 0, 2),))


def own_chunk_sent_away() -> list[Schedule]:
    schedules = with_step(build("reduce_scatter", "direct", [1] * 2), 0, 1, sends=(Send(0, 1, 0),))
    return with_step(schedules, 1, 0, expects=(*schedules[1].steps[0].expects, Expect(0, 0, 0)))


@pytest.mark.parametrize(
    ("broken", "rank", "step", "reason"),
    [
        (deadlocked, 0, 1, r"deadlock: waits for chunk 1 from rank 1 for ever \(stuck ranks: 0, 1\)"),
        (delivered_twice, 0, 1, "chunk 1 is delivered twice to slot 1"),
        (never_delivered, 0, 1, "chunk 1 is never delivered"),
        (changed("all_gather", 0, 0, expects=()), 1, 0, "sends chunk 1 to slot 1 of rank 0, which does not"),
        (
            changed("all_gather", 1, 0, sends=()),
            0,
            0,
            "expects chunk 1 in slot 1 from rank 1, which does not",
        ),
        (changed("reduce_scatter", 2, 1, expects=()), 0, 1, "sends chunk 2 .* which does not expect it"),
        (forwards_too_early, 1, 0, "sends chunk 0, which it does not have yet"),
        (lambda: lacks_a_contributor("direct"), 1, 2, "chunk 1 misses the partial of rank 0"),
        (lambda: lacks_a_contributor("ring"), 2, 2, "chunk 2 misses the partial of rank 0"),
        (added_twice, 1, 2, "adds the partial of rank 2 to chunk 1 twice"),
        (lambda: swapped("all_gather"), 2, 0, "computes chunk 1, but own chunks must come first"),
        (lambda: swapped("reduce_scatter"), 2, 0, "computes chunk 2, but own chunks must come last"),
        (lambda: swapped("reduce_scatter", "ring"), 2, 0, "computes chunk 2, but own chunks must come last"),
        (lambda: swapped("all_to_all"), 2, 0, "computes chunk 2, but own chunks must come last"),
        (changed("all_gather", 0, 2, compute=1), 0, 2, "chunk 1 is computed twice"),
        (changed("all_gather", 0, 2, compute=9), 0, 2, "chunk 9 does not exist"),
        (changed("all_gather", 0, 0, sends=(Send(9, 1, 0),)), 0, 0, "chunk 9 does not exist"),
        (changed("all_gather", 0, 0, sends=(Send(0, 0, 0),)), 0, 0, "rank 0 is no peer of rank 0"),
        (out_of_order, 0, 0, "expects chunk 3, but rank 1 sends chunk 2 first"),
        (awaited_before_taken_in, 0, 1, "waits for chunk 1 before it takes it in"),
        (wrong_slot, 1, 0, "chunk 1 lands in slot 2, not in slot 0"),
        (own_chunk_sent_away, 0, 1, "sends its own chunk 0 away"),
    ],
)
def test_broken_schedules_are_refused_by_name(
    broken: Callable[[], list[Schedule]], rank: int, step: int, reason: str
) -> None:
    with pytest.raises(ScheduleError, match=f"^rank {rank}, step {step}: {reason}") as caught:
        simulate(broken())
    assert (caught.value.rank, caught.value.step) == (rank, step)
    assert "\n" not in str(caught.value)


def test_a_chunk_that_is_never_computed_is_refused() -> None:
    schedules = build("all_gather", "direct", [1] * 3)
    with pytest.raises(ScheduleError, match="rank 1, step 2: chunk 0 is never computed"):
        check(with_steps(schedules, 1, list(schedules[1].steps[:2])))


def test_schedules_of_different_families_do_not_mix() -> None:
    gather, ring = build("all_gather", "direct", [1, 1]), build("all_gather", "ring", [1, 1])
    with pytest.raises(ScheduleError, match="rank 1, step 0: op, kind or chunks differ"):
        check([gather[0], ring[1]])
    with pytest.raises(ScheduleError, match="has the schedule of rank 1 of 2 where that of 0 of 2 belongs"):
        check(gather[::-1])
    with pytest.raises(ScheduleError, match="rank 0 of 2 where that of 0 of 1"):
        check(gather[:1])
    with pytest.raises(ValueError, match="no schedules"):
        check([])
