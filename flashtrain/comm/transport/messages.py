"""What a schedule means on ``nvlink``: messages with places and flags, as C++ takes them."""

from importlib import import_module
from typing import Any

from torch import Tensor

from flashtrain.comm.schedule import Expect, Schedule, Send
from flashtrain.comm.transport.landing import Landing

# From so many bytes a pair of ranks on, senders to one receiver take turns. Two at once take half as long
# again as one after the other (an H200's copy engines), and a turn passes from rank to rank in some 6 us. A
# gather's ranks begin together; those of a scatter when their products are ready.
GATHERED_TURN_BYTES, TURN_BYTES = 24 << 20, 8 << 20


class Plan:
    """A schedule whose rows have ``row_bytes``: what C++ needs, and the numbers that messages have there.

    ``engines``: copy engines move chunks, and where these are large, take turns. Else each chunk may be
    ``parts`` messages, one after the other, for what moves it column by column.
    """

    def __init__(
        self, core: Any, schedule: Schedule, row_bytes: int, parts: int = 1, engines: bool = True
    ) -> None:
        self.schedule, self.landing = schedule, Landing(schedule)
        self.row_bytes, self.rows = row_bytes, self.landing.rows(schedule.rank)
        self.nbytes = self.landing.most_rows() * row_bytes
        sends: list[tuple[int, ...]] = []
        arrivals: list[tuple[int, ...]] = []
        self.sends: dict[Send, int] = {}
        self.arrivals: dict[Expect, int] = {}
        self.early: list[Send] = []
        leaving, coming = [0] * schedule.world, [0] * schedule.world
        for index, step in enumerate(schedule.steps):
            for send in step.sends:
                span = self.landing.span(send.dst, send.chunk, send.slot)
                self.sends[send] = len(sends)
                for _ in range(parts):
                    sends.append(_message(index, send.dst, leaving, send.chunk, span, row_bytes))
                if schedule.gathers and send.chunk in schedule.own:
                    self.early.append(send)
            for expect in step.expects:
                span = self.landing.span(schedule.rank, expect.chunk, expect.slot)
                self.arrivals[expect] = len(arrivals)
                for _ in range(parts):
                    arrivals.append(_message(index, expect.src, coming, expect.chunk, span, row_bytes))
        taking_turns = engines and _takes_turns(schedule, row_bytes)
        flags = max(*leaving, *coming) + (schedule.world - 2 if taking_turns else 0)
        if max(flags, len(sends)) > core.flag_columns:
            raise ValueError(
                f"{schedule.op} has more chunks a rank than the {core.flag_columns} that have flags"
            )
        turns = _take_turns(core, schedule, sends, arrivals, leaving) if taking_turns else []
        self.program = core.Program(schedule.op, len(schedule.steps), sends, arrivals, turns)


def _takes_turns(schedule: Schedule, row_bytes: int) -> bool:
    rows = [schedule.rows_of(rank) for rank in range(schedule.world)]
    smallest = min(own.stop - own.start for own in rows) * row_bytes
    fewest = GATHERED_TURN_BYTES if schedule.gathers else TURN_BYTES
    return schedule.kind == "direct" and schedule.world > 2 and smallest >= fewest


def _take_turns(
    core: Any,
    schedule: Schedule,
    sends: list[tuple[int, ...]],
    arrivals: list[tuple[int, ...]],
    leaving: list[int],
) -> list[tuple[int, int, int]]:
    """Of each send the arrival that it awaits, whom it gives a turn, and by which flag; adds to ``arrivals``.

    Who sends to a rank after this one is the same neighbour for all ranks, since all ranks begin with a
    neighbour and go round.
    """
    world, rank, away = schedule.world, schedule.rank, 1 if schedule.gathers else -1
    after, before = (rank + away) % world, (rank - away) % world
    turns, number = [], 0
    for index, (peer, _, step, chunk, *_) in enumerate(sends):
        awaited, given = core.no_turn, (core.no_turn, 0)
        if index and peer != sends[index - 1][0]:
            number += 1
            awaited = len(arrivals)
            arrivals.append((before, leaving[after] + number - 1, step, chunk, 0, 0))
        if number < world - 2 and (index + 1 == len(sends) or sends[index + 1][0] != peer):
            given = after, leaving[after] + number
        turns.append((awaited, *given))
    return turns


def _message(
    step: int, peer: int, counts: list[int], chunk: int, span: slice, row_bytes: int
) -> tuple[int, ...]:
    counts[peer] += 1
    return (peer, counts[peer] - 1, step, chunk, span.start * row_bytes, (span.stop - span.start) * row_bytes)


def clear_flags(words: Tensor, world: int, epoch: int = 0) -> None:
    """Set tables ``words [n]`` int32 of ``world`` ranks as if operation ``epoch`` had been the last."""
    core = import_module("flashtrain._core")
    tables = words.view(-1, core.flag_table_words(world))
    tables.zero_()
    tables[:, : core.flag_words(world)] = epoch if epoch < 2**31 else epoch - 2**32
