"""Run schedules over a host transport with plain byte tensors, and start ranks that may be killed."""

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from flashtrain.comm import transport
from flashtrain.comm.schedule import Compute, Expect, Schedule, Send, Transfer, Wait
from flashtrain.comm.transport.base import Exchange
from flashtrain.comm.transport.host import HostTransport
from tests.distributed import context


def gather_strings(text: str) -> list[str]:
    return transport.exchange_of(dist.group.WORLD.group_name)(text)


def connect(rank: int, world: int, timeout: float = 30.0, **options: Any) -> HostTransport:
    return HostTransport(rank, world, timeout, gather_strings, **options)


def payload(schedule: Schedule, rank: int, chunk: int, salt: int = 0) -> Tensor:
    """What ``rank`` contributes to ``chunk``: one byte per row."""
    rows = torch.arange(schedule.chunks[chunk].rows, dtype=torch.int64)
    return ((rows * 37 + rows // 251 + chunk * 11 + rank * 101 + salt) % 256).to(torch.uint8)


class Drive:
    """One operation; ``run`` or ``step`` it, then ``check`` what arrived."""

    def __init__(self, exchange: Exchange, salt: int = 0) -> None:
        self.exchange, self.schedule, self.salt = exchange, exchange.schedule, salt
        self.actions = self.schedule.actions()
        self.chunks: dict[int, Tensor] = {}  # this rank's version of each chunk
        self.slots: dict[Expect, Tensor] = {}
        if self.schedule.gathers:
            self.chunks = {own: self._contribution(own) for own in self.schedule.own}

    def _contribution(self, chunk: int, rank: int | None = None) -> Tensor:
        return payload(self.schedule, self.schedule.rank if rank is None else rank, chunk, self.salt)

    def step(self) -> bool:
        """Do the next action; False if there is none."""
        match next(self.actions, None):
            case None:
                return False
            case Compute(_, chunk):
                if not self.schedule.gathers:
                    self.chunks[chunk] = self._contribution(chunk)
            case Wait(step, expect):
                self.exchange.wait(step, expect)
                if self.schedule.gathers:
                    self.chunks[expect.chunk] = self.slots[expect]
                elif self.schedule.kind == "ring":
                    self.chunks[expect.chunk] += self.slots[expect]
            case Transfer(step, sends, expects):
                into = {
                    expect: torch.full((self.schedule.chunks[expect.chunk].rows,), 99, dtype=torch.uint8)
                    for expect in expects
                }
                self.slots.update(into)
                self.exchange.transfer(step, {send: self.chunks[send.chunk] for send in sends}, into)
        return True

    def run(self) -> "Drive":
        while self.step():
            pass
        return self

    def check(self) -> None:
        """Compare every byte that arrived with what its sender contributed."""
        world, rank = self.schedule.world, self.schedule.rank
        if self.schedule.gathers:
            for chunk in range(len(self.schedule.chunks)):
                owner = self.schedule.chunks[chunk].owner
                assert torch.equal(self.chunks[chunk], self._contribution(chunk, owner)), chunk
        elif self.schedule.kind == "ring":
            for own in self.schedule.own:
                total = sum(
                    (self._contribution(own, other) for other in range(world)), torch.tensor(0).byte()
                )
                assert torch.equal(self.chunks[own], total), own
        else:
            assert {(e.chunk, e.slot) for e in self.slots} == {
                (own, other) for own in self.schedule.own for other in range(world) if other != rank
            }
            for expect, tensor in self.slots.items():
                assert torch.equal(tensor, self._contribution(expect.chunk, expect.src)), expect


def drive(transport: HostTransport, schedule: Schedule, site: str = "site", salt: int = 0) -> None:
    with transport.open(schedule, site) as exchange:
        run = Drive(exchange, salt).run()
    run.check()


def message(src: int, dst: int) -> tuple[Send, Expect]:
    """The two ends of one transfer of chunk ``src``."""
    return Send(src, dst, src), Expect(src, src, src)


class FileExchange:
    """All-gather of strings through a folder, for ranks whose process group must not hang on a death."""

    def __init__(self, folder: str, rank: int, world: int) -> None:
        self.folder, self.rank, self.world, self.round = Path(folder), rank, world, 0

    def __call__(self, text: str) -> list[str]:
        self.round += 1
        written = self.folder / f"writing-{self.rank}"
        written.write_text(text)
        written.rename(self.folder / f"{self.round}-{self.rank}")
        files = [self.folder / f"{self.round}-{rank}" for rank in range(self.world)]
        limit = time.monotonic() + 30
        while not all(file.exists() for file in files):
            assert time.monotonic() < limit, "a rank did not come"
            time.sleep(0.002)
        return [file.read_text() for file in files]


def _independent_main(
    fn: Callable[..., Any], rank: int, world: int, folder: str, args: tuple[Any, ...]
) -> None:
    torch.set_num_threads(1)
    fn(rank, world, FileExchange(folder, rank, world), *args)
    (Path(folder) / f"finished-{rank}").touch()


def start_independent(fn: Callable[..., Any], world: int, folder: Path, *args: Any) -> list[Any]:
    """Start ``fn(rank, world, exchange_addresses, *args)`` on ranks that share no process group."""
    folder.mkdir(exist_ok=True)
    ranks = [
        context.Process(
            target=_independent_main, args=(fn, rank, world, os.fspath(folder), args), daemon=True
        )
        for rank in range(world)
    ]
    for process in ranks:
        process.start()
    return ranks
