"""Ranks as processes, each with a GPU made of threads: nvlink transports under what needs process groups."""

import mmap
import os
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from flashtrain.comm import transport
from flashtrain.comm.transport.messages import clear_flags
from flashtrain.comm.transport.nvlink import NvlinkTransport
from flashtrain.comm.transport.pages import SharedPages
from flashtrain.comm.transport.symmetric import SymmetricBuffer
from tests.comm.transport import fake_gpu

_mapped: list[Any] = []


class Eager(NvlinkTransport):
    """The host reads and writes device memory itself, so it waits for the device before it does.

    What peers may write from now on holds 0xFF, as if they had written at once: whoever still reads it reads
    NaN. ``outputs`` counts those that were asked for, and gathered without a copy.
    """

    fake: fake_gpu.Stream
    asked = direct = 0

    def wait_for_all(self, site: str) -> None:
        super().wait_for_all(site)
        self.fake.synchronize()

    def finish(self, site: str) -> None:
        super().finish(site)
        self.fake.synchronize()

    def lend(self, *arguments: Any) -> Tensor | None:
        lent = super().lend(*arguments)
        self.asked += 1
        if lent is not None:
            assert lent.untyped_storage().data_ptr() == self.arena._buffer.memory.data_ptr()
        return lent

    def begin_early(self, *arguments: Any) -> bool:
        lent = super().begin_early(*arguments)
        self.direct += lent
        return lent

    def _opening(self, out: Tensor | None = None) -> bool:
        lent = super()._opening(out)
        if self.loans is not None:
            after = (self._engine.next_place + 1) % self.arena.buffers
            self.arena.view(after, torch.uint8, (self.arena.room,)).fill_(0xFF)
        return lent


def connect(group: dist.ProcessGroup, driver: str, buffers: int = 2, **options: Any) -> Eager:
    """A transport between the ranks of ``group``; ``driver`` as of ``fake_gpu``."""
    fake_gpu.driver = lambda: driver  # type: ignore[assignment]  # compiled once, not by each rank
    exchange = transport.exchange_of(group.group_name)
    world, stream = group.size(), fake_gpu.Stream()

    def allocate(nbytes: int) -> SymmetricBuffer:
        file = os.memfd_create("fake-device-memory")
        os.ftruncate(file, nbytes)
        files = [os.open(path, os.O_RDWR) for path in exchange(f"/proc/{os.getpid()}/fd/{file}")]
        memories = [torch.frombuffer(mmap.mmap(one, nbytes), dtype=torch.uint8) for one in files]
        memories[group.rank()].fill_(0xEE)
        exchange("")  # all have it
        for one in (file, *files):
            os.close(one)
        _mapped.append(memories)
        return SymmetricBuffer(memories[group.rank()], tuple(memory.data_ptr() for memory in memories))

    from flashtrain import _core  # type: ignore[attr-defined]

    words = _core.flag_table_words(world)
    with SharedPages(world * words, group.rank(), exchange) as pages:
        table = allocate(words * 4)
        clear_flags(table.memory.view(torch.int32), world)
        exchange("")
    assert pages.words is not None
    made = Eager(
        group.rank(),
        world,
        30.0,
        host_tables=pages.words,
        device_table=table,
        allocate=allocate,
        exchange=exchange,
        quiesce=stream.synchronize,
        stream=lambda: stream.handle,
        buffers=buffers,
        driver=driver,
        **{"arena_bytes": 1 << 30, **options},
    )
    made.fake = stream
    return made
