"""What a schedule means on ``nvlink``: messages with places and flags, as C++ takes them."""

from importlib import import_module
from typing import Any

from torch import Tensor

from flashtrain.comm.schedule import Expect, Schedule, Send
from flashtrain.comm.transport.landing import Landing


class Plan:
    """A schedule whose rows have ``row_bytes``: what C++ needs, and the numbers that messages have there.

    Each chunk is ``parts`` messages, one after the other, for what moves it column by column.
    """

    def __init__(self, core: Any, schedule: Schedule, row_bytes: int, parts: int = 1) -> None:
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
        if max(*leaving, *coming, len(sends)) > core.flag_columns:
            raise ValueError(
                f"{schedule.op} has more chunks a rank than the {core.flag_columns} that have flags"
            )
        self.program = core.Program(schedule.op, len(schedule.steps), sends, arrivals)


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
