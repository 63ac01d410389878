"""Check the schedules of all ranks and replay them under a link model, in exact arithmetic.

Every rank has three engines that each do one thing at a time: compute, egress, ingress. A rank walks
``Schedule.actions()``; its sends leave in schedule order, and a transfer occupies the source's egress
and the destination's ingress. Chunks that meet at an ingress are served first come, first served.

The model leaves out launches, flags, the final addition and the rate that a product loses by being
cut. For equal chunks every schedule reaches ``bound`` exactly; for ragged ones the simulated makespan
takes its place.
"""

import heapq
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal, NamedTuple

from flashtrain.comm.schedule import Action, Compute, Expect, Schedule, Send, Transfer, Wait

Time = int | Fraction
Engine = Literal["compute", "egress", "ingress"]


class ScheduleError(ValueError):
    """Schedules that cannot work together. The message names rank and step."""

    def __init__(self, rank: int, step: int, reason: str) -> None:
        super().__init__(f"rank {rank}, step {step}: {reason}")
        self.rank, self.step = rank, step


class Event(NamedTuple):
    """One engine of ``rank`` is busy with ``chunk`` in ``[start, end)``.

    Times are in the caller's unit of time. ``peer`` is the other rank of a transfer; ``step`` computed, sent
    or expected the chunk on this rank.
    """

    rank: int
    engine: Engine
    start: Time
    end: Time
    chunk: int
    peer: int | None
    step: int


@dataclass(frozen=True)
class Timeline:
    """What every engine did, in order of start. Times are in the caller's unit of time.

    ``makespan`` is when the last rank is done, its sends included. ``exposed[r]`` is the time in which
    rank r did not compute, pauses left out.
    """

    events: tuple[Event, ...]
    makespan: Time
    exposed: tuple[Time, ...]

    @property
    def hidden(self) -> Fraction | None:
        """Share of the transfer time that passed behind computation; None without transfers."""
        moving = sum(event.end - event.start for event in self.events if event.engine == "ingress")
        return max(Fraction(0), 1 - Fraction(sum(self.exposed)) / moving) if moving else None


def bound(world: int, compute: Time, transfer: Time, subchunks: int = 1) -> Fraction:
    """Least makespan of W equal chunks that take ``compute`` and ``transfer`` each, in one unit of time.

    A reduce-scatter cannot send before its first piece is computed, an all-gather must compute one
    piece after the last arrival, and one link carries W-1 chunks.
    """
    compute, transfer = Fraction(compute), Fraction(transfer)
    return max(world * compute, compute / subchunks + (world - 1) * transfer)


def check(schedules: Sequence[Schedule]) -> None:
    """Raise ScheduleError unless ``schedules``, one for each rank in rank order, fit together.

    Covers what does not depend on time: one family, every chunk computed once, the own chunk first
    (all-gather) or last, sends and expects that match one to one and in the same order for each pair of
    ranks, nothing delivered twice or never, nothing sent that the rank does not have. Raises ValueError
    for no schedules at all.
    """
    if not schedules:
        raise ValueError("there are no schedules to check")
    first = schedules[0]
    for rank, schedule in enumerate(schedules):
        if (schedule.rank, schedule.world) != (rank, len(schedules)):
            given, wanted = f"{schedule.rank} of {schedule.world}", f"{rank} of {len(schedules)}"
            raise ScheduleError(rank, 0, f"has the schedule of rank {given} where that of {wanted} belongs")
        if (schedule.op, schedule.kind, schedule.chunks) != (first.op, first.kind, first.chunks):
            raise ScheduleError(rank, 0, "op, kind or chunks differ from those of rank 0")
        _check_order(schedule)
    _check_pairs(schedules)
    for schedule in schedules:
        _check_arrivals(schedule)
        _check_possession(schedule)


def _check_order(schedule: Schedule) -> None:
    """Every chunk is computed once; own chunks are first in a gather and last in a scatter."""
    rank, seen = schedule.rank, set[int]()
    own_steps = range(schedule.subchunks)
    if not schedule.gathers:
        own_steps = range(len(schedule.steps) - schedule.subchunks, len(schedule.steps))
    for index, step in enumerate(schedule.steps):
        if not 0 <= step.compute < len(schedule.chunks):
            raise ScheduleError(rank, index, f"chunk {step.compute} does not exist")
        if step.compute in seen:
            raise ScheduleError(rank, index, f"chunk {step.compute} is computed twice")
        seen.add(step.compute)
        if (step.compute in schedule.own) != (index in own_steps):
            place = "first" if schedule.gathers else "last"
            raise ScheduleError(
                rank, index, f"computes chunk {step.compute}, but own chunks must come {place}"
            )
    if missing := set(range(len(schedule.chunks))) - seen:
        raise ScheduleError(rank, len(schedule.steps), f"chunk {min(missing)} is never computed")


def _check_pairs(schedules: Sequence[Schedule]) -> None:
    """What a rank sends to a peer is what the peer expects from it, in the same order."""
    sent: dict[tuple[int, int], list[tuple[Expect, int]]] = defaultdict(list)
    expected: dict[tuple[int, int], list[tuple[Expect, int]]] = defaultdict(list)
    for schedule in schedules:
        rank = schedule.rank
        for index, step in enumerate(schedule.steps):
            for peer in [send.dst for send in step.sends] + [expect.src for expect in step.expects]:
                if peer == rank or not 0 <= peer < schedule.world:
                    raise ScheduleError(rank, index, f"rank {peer} is no peer of rank {rank}")
            for chunk in [send.chunk for send in step.sends] + [expect.chunk for expect in step.expects]:
                if not 0 <= chunk < len(schedule.chunks):
                    raise ScheduleError(rank, index, f"chunk {chunk} does not exist")
            for send in step.sends:
                sent[rank, send.dst].append((Expect(send.chunk, rank, send.slot), index))
            for expect in step.expects:
                expected[expect.src, rank].append((expect, index))
    for src, dst in sorted(sent.keys() | expected.keys()):
        outgoing, incoming = sent[src, dst], expected[src, dst]
        unmatched = Counter(expect for expect, _ in outgoing)
        unmatched.subtract(expect for expect, _ in incoming)
        for (chunk, _, slot), at in reversed(outgoing):
            if unmatched[Expect(chunk, src, slot)] > 0:
                reason = f"sends chunk {chunk} to slot {slot} of rank {dst}, which does not expect it"
                raise ScheduleError(src, at, reason)
        for (chunk, _, slot), at in reversed(incoming):
            if unmatched[Expect(chunk, src, slot)] < 0:
                reason = f"expects chunk {chunk} in slot {slot} from rank {src}, which does not send it"
                raise ScheduleError(dst, at, reason)
        # Transports without tags match the messages of a pair by their order.
        for (coming, _), (expect, at) in zip(outgoing, incoming, strict=True):
            if coming != expect:
                reason = f"expects chunk {expect.chunk}, but rank {src} sends chunk {coming.chunk} first"
                raise ScheduleError(dst, at, reason)


def _check_arrivals(schedule: Schedule) -> None:
    """Nothing arrives twice, everything lands in its slot, and a gather misses no chunk."""
    arrived: set[tuple[int, int]] = set()
    for index, step in enumerate(schedule.steps):
        for expect in step.expects:
            if (expect.chunk, expect.slot) in arrived or (schedule.gathers and expect.chunk in schedule.own):
                raise ScheduleError(
                    schedule.rank, index, f"chunk {expect.chunk} is delivered twice to slot {expect.slot}"
                )
            arrived.add((expect.chunk, expect.slot))
            slot = schedule.chunks[expect.chunk].owner if schedule.gathers else expect.src
            if expect.slot != slot:
                raise ScheduleError(
                    schedule.rank,
                    index,
                    f"chunk {expect.chunk} lands in slot {expect.slot}, not in slot {slot}",
                )
    for index, step in enumerate(schedule.steps):
        owner = schedule.chunks[step.compute].owner
        if schedule.gathers and owner != schedule.rank and (step.compute, owner) not in arrived:
            raise ScheduleError(schedule.rank, index, f"chunk {step.compute} is never delivered")


def _check_possession(schedule: Schedule) -> None:
    """A rank sends what it owns or has waited for (gather) or has computed (scatter), and no own partial."""
    has = set(schedule.own) if schedule.gathers else set[int]()
    posted: set[Expect] = set()
    for action in schedule.actions():
        match action:
            case Wait(step, expect):
                if expect not in posted:
                    raise ScheduleError(
                        schedule.rank, step, f"waits for chunk {expect.chunk} before it takes it in"
                    )
                if schedule.gathers:
                    has.add(expect.chunk)
            case Compute(_, chunk):
                has.add(chunk)
            case Transfer(step, sends, expects):
                posted.update(expects)
                for send in sends:
                    if send.chunk not in has:
                        raise ScheduleError(
                            schedule.rank, step, f"sends chunk {send.chunk}, which it does not have yet"
                        )
                    if not schedule.gathers and send.chunk in schedule.own:
                        raise ScheduleError(schedule.rank, step, f"sends its own chunk {send.chunk} away")


class _Transfer(NamedTuple):
    """A send that waits for its engines or is under way, with the ranks whose partials it carries."""

    posted: Time
    step: int
    src: int
    send: Send
    carries: frozenset[int]

    @property
    def arrival(self) -> tuple[int, Expect]:
        return self.send.dst, Expect(self.send.chunk, self.src, self.send.slot)


class _Replay:
    """The state of all engines at one moment."""

    def __init__(
        self,
        schedules: Sequence[Schedule],
        compute: Callable[[int], Time],
        transfer: Callable[[int], Time],
        pauses: Mapping[tuple[int, int], Time],
        slowdown: Sequence[Time],
        rendezvous: bool,
    ) -> None:
        self.schedules, self.compute, self.transfer = schedules, compute, transfer
        self.pauses, self.slowdown, self.rendezvous = dict(pauses), slowdown, rendezvous
        ranks = range(len(schedules))
        self.programs: list[deque[Action]] = [deque(schedule.actions()) for schedule in schedules]
        self.queues: list[deque[_Transfer]] = [deque() for _ in ranks]
        self.sending, self.receiving = [False for _ in ranks], [False for _ in ranks]
        self.blocked: dict[int, Wait] = {}
        self.posted: set[tuple[int, Expect]] = set()
        self.landed: dict[tuple[int, Expect], frozenset[int]] = {}
        # Which ranks' partials are in the (sum of a) chunk that a rank holds.
        self.holds: dict[tuple[int, int], frozenset[int]] = defaultdict(frozenset)
        self.expected_at = {
            (schedule.rank, expect): index
            for schedule in schedules
            for index, step in enumerate(schedule.steps)
            for expect in step.expects
        }
        self.idle: list[Time] = [0 for _ in ranks]
        self.finish: list[Time] = [0 for _ in ranks]
        self.events: list[Event] = []
        self.agenda: list[tuple[Time, int, int | _Transfer]] = []
        self.scheduled = 0  # numbers the agenda's entries: of two at one time the earlier made comes first

    def run(self) -> Timeline:
        for rank in range(len(self.schedules)):
            self._at(0, rank)
        while self.agenda:
            now = self.agenda[0][0]
            # All that happens at one moment comes before the engines are given out, so that ties are
            # decided by rule and not by the order of this loop.
            while self.agenda and self.agenda[0][0] == now:
                what = heapq.heappop(self.agenda)[2]
                if isinstance(what, _Transfer):
                    self._land(now, what)
                else:
                    self._advance(now, what)
            self._start_transfers(now)
        self._check_end()
        self.events.sort(key=lambda event: (event.start, event.end, event.rank, event.engine, event.step))
        useful = list(self.idle)
        for event in self.events:
            if event.engine == "compute":
                useful[event.rank] += event.end - event.start
        exposed = tuple(finish - spent for finish, spent in zip(self.finish, useful, strict=True))
        return Timeline(tuple(self.events), max(self.finish), exposed)

    def _at(self, time: Time, what: int | _Transfer) -> None:
        self.scheduled += 1
        heapq.heappush(self.agenda, (time, self.scheduled, what))

    def _advance(self, now: Time, rank: int) -> None:
        """Run the program of ``rank`` until it computes, pauses or blocks."""
        program, schedule = self.programs[rank], self.schedules[rank]
        while program:
            action = program[0]
            if pause := self.pauses.pop((rank, action.step), 0):
                self.idle[rank] += pause
                return self._at(now + pause, rank)
            if isinstance(action, Wait) and (rank, action.expect) not in self.landed:
                self.blocked[rank] = action
                return None
            program.popleft()
            match action:
                case Wait(step, expect):
                    self._add(rank, step, expect.chunk, self.landed[rank, expect])
                case Compute(step, chunk):
                    self._add(rank, step, chunk, frozenset({rank}))
                    end = now + self.compute(schedule.chunks[chunk].rows) * self.slowdown[rank]
                    self.events.append(Event(rank, "compute", now, end, chunk, None, step))
                    return self._at(end, rank)
                case Transfer(step, sends, expects):
                    self.posted.update((rank, expect) for expect in expects)
                    self.queues[rank].extend(
                        _Transfer(now, step, rank, send, self.holds[rank, send.chunk]) for send in sends
                    )
        self.finish[rank] = max(self.finish[rank], now)
        return None

    def _add(self, rank: int, step: int, chunk: int, partials: frozenset[int]) -> None:
        if self.schedules[rank].gathers:
            return
        if twice := self.holds[rank, chunk] & partials:
            raise ScheduleError(rank, step, f"adds the partial of rank {min(twice)} to chunk {chunk} twice")
        self.holds[rank, chunk] |= partials

    def _start_transfers(self, now: Time) -> None:
        waiting = [queue[0] for rank, queue in enumerate(self.queues) if queue and not self.sending[rank]]
        for transfer in sorted(waiting, key=lambda transfer: transfer[:3]):
            src, dst = transfer.src, transfer.send.dst
            if self.receiving[dst] or (self.rendezvous and transfer.arrival not in self.posted):
                continue
            self.sending[src] = self.receiving[dst] = True
            end = now + self.transfer(self.schedules[src].chunks[transfer.send.chunk].rows)
            chunk, step_there = transfer.send.chunk, self.expected_at[transfer.arrival]
            self.events.append(Event(src, "egress", now, end, chunk, dst, transfer.step))
            self.events.append(Event(dst, "ingress", now, end, chunk, src, step_there))
            self._at(end, transfer)

    def _land(self, now: Time, transfer: _Transfer) -> None:
        src, (dst, expect) = transfer.src, transfer.arrival
        self.queues[src].popleft()
        self.sending[src] = self.receiving[dst] = False
        self.finish[src] = max(self.finish[src], now)
        self.landed[dst, expect] = transfer.carries
        if dst in self.blocked and self.blocked[dst].expect == expect:
            del self.blocked[dst]
            self._at(now, dst)

    def _check_end(self) -> None:
        if self.blocked:
            rank, wait = min(self.blocked.items())
            stuck = ", ".join(str(rank) for rank in sorted(self.blocked))
            raise ScheduleError(
                rank,
                wait.step,
                f"deadlock: waits for chunk {wait.expect.chunk} from rank {wait.expect.src} for ever "
                f"(stuck ranks: {stuck})",
            )
        everyone = frozenset(range(len(self.schedules)))
        for schedule in self.schedules:
            for index, step in enumerate(schedule.steps):
                if schedule.gathers or step.compute not in schedule.own:
                    continue
                if missing := everyone - self.holds[schedule.rank, step.compute]:
                    raise ScheduleError(
                        schedule.rank,
                        index,
                        f"chunk {step.compute} misses the partial of rank {min(missing)}",
                    )


def _proportional(rows: int) -> Time:
    return rows


def simulate(
    schedules: Sequence[Schedule],
    *,
    compute: Callable[[int], Time] = _proportional,
    transfer: Callable[[int], Time] = _proportional,
    pauses: Mapping[tuple[int, int], Time] | None = None,
    slowdown: Sequence[Time] | None = None,
    rendezvous: bool = False,
) -> Timeline:
    """Check ``schedules`` (one for each rank, in rank order) and replay them.

    ``compute`` and ``transfer`` give the time of a chunk from its rows; times are int or Fraction, in one
    unit of time, and exact. ``pauses[rank, step]`` is time in which a rank stands still before that step, so
    a pause before step 0 is a late start. ``slowdown[rank]`` multiplies a rank's compute times. With
    ``rendezvous`` a transfer also waits until the destination has reached the step that takes it in,
    as two-sided transports do. Raises ScheduleError for schedules that fail ``check``, that deadlock,
    or that leave a chunk's owner without exactly one partial of every rank, and ValueError for none.
    """
    check(schedules)
    return _Replay(
        schedules,
        compute,
        transfer,
        pauses or {},
        slowdown if slowdown is not None else [1] * len(schedules),
        rendezvous,
    ).run()
