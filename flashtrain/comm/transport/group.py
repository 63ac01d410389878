"""Transport over torch.distributed point-to-point: any device, any backend, any number of hosts."""

from collections.abc import Mapping
from datetime import timedelta

import torch.distributed as dist
from torch import Tensor

from flashtrain.comm import groups
from flashtrain.comm.schedule import Expect, Schedule, Send
from flashtrain.comm.transport.base import Exchange, Transport, capturing, clock
from flashtrain.errors import TransportError, first_line


class GroupTransport(Transport):
    """Sends with ``torch.distributed.batch_isend_irecv`` on ``group`` (gloo, NCCL, or the fake backend).

    The sends and receives of one step form one batch. In every schedule they are a permutation of the
    ranks, so NCCL, which runs batches in order, cannot deadlock. Give it a group of its own: point-to-point
    calls on an NCCL group wait for every collective issued on it before. ``timeout`` is in seconds; on NCCL
    the watchdog of the group keeps the time instead.
    """

    def __init__(self, group: dist.ProcessGroup, timeout: float, device_type: str = "cpu") -> None:
        super().__init__(group.rank(), group.size(), timeout)
        self.group = group
        backend = groups.backend(group, device_type)
        self.name = f"group over {backend}"
        self.host_side = backend == "gloo"
        self.asynchronous = backend == "nccl"
        self._operations = 0

    def open(self, schedule: Schedule, site: str) -> Exchange:
        if self.asynchronous and capturing():
            raise self.uncaptured(site)
        self._operations += 1
        return _GroupExchange(self, schedule, site, tag=self._operations % 2**20)

    def shutdown(self) -> None:
        """The process group belongs to the caller: there is nothing to free."""


class _GroupExchange(Exchange):
    transport: GroupTransport

    def __init__(self, transport: GroupTransport, schedule: Schedule, site: str, tag: int) -> None:
        super().__init__(transport, schedule, site)
        self._tag = tag
        self._arriving: dict[Expect, dist.Work] = {}
        self._leaving: list[tuple[int, Send, dist.Work]] = []

    def describe(self, step: int, chunk: int, peer: int) -> str:
        """As in the base class, with the numbers that ranks have in the whole run.

        Those of a group repeat in every group, and over a network the peer is on another host.
        """
        ranks = dist.get_process_group_ranks(self.transport.group)
        return (
            f"rank {ranks[self.transport.rank]}: {self.site or 'unnamed site'}: {self.schedule.op} "
            f"step {step} of {len(self.schedule.steps)}, chunk {chunk}, peer rank {ranks[peer]}"
        )

    def _transfer(self, step: int, sends: Mapping[Send, Tensor], expects: Mapping[Expect, Tensor]) -> None:
        # Both sides know that an empty chunk is empty, so there is nothing to say about it.
        leaving = [send for send, payload in sends.items() if payload.numel()]
        arriving = [expect for expect, landing in expects.items() if landing.numel()]
        group, tag = self.transport.group, self._tag
        batch = [dist.P2POp(dist.isend, sends[s], group=group, tag=tag, group_peer=s.dst) for s in leaving]
        batch += [
            dist.P2POp(dist.irecv, expects[e], group=group, tag=tag, group_peer=e.src) for e in arriving
        ]
        if not batch:
            return
        peers = [(send.chunk, send.dst) for send in leaving] + [(e.chunk, e.src) for e in arriving]
        # On gloo one by one, which is what a batch comes to there: so it is known whose message cannot begin.
        size = 1 if self.transport.host_side else len(batch)
        works: list[dist.Work] = []
        for begin in range(0, len(batch), size):
            try:
                works += dist.batch_isend_irecv(batch[begin : begin + size])
            except RuntimeError as error:
                raise TransportError(f"{self.describe(step, *peers[begin])}: {first_line(error)}") from error
        if len(works) < len(batch):
            works = works * len(batch)  # NCCL answers for the whole batch with one handle
        self._leaving += [(step, send, work) for send, work in zip(leaving, works, strict=False)]
        self._arriving |= dict(zip(arriving, works[len(leaving) :], strict=False))

    def _wait(self, step: int, expect: Expect) -> float:
        work = self._arriving.pop(expect, None)
        if work is not None:
            self._finish(work, step, expect.chunk, expect.src)
        return clock()

    def _finish(self, work: dist.Work, step: int, chunk: int, peer: int) -> None:
        try:
            # On NCCL this only orders the current stream; its own watchdog keeps the time.
            if self.transport.host_side:
                work.wait(timedelta(seconds=self.transport.timeout))
            else:
                work.wait()
        except RuntimeError as error:
            raise TransportError(f"{self.describe(step, chunk, peer)}: {first_line(error)}") from error

    def _close(self) -> None:
        for step, send, work in self._leaving:
            self._finish(work, step, send.chunk, send.dst)
        self._leaving.clear()

    def _abort(self) -> None:
        # torch.distributed holds references to the tensors of unfinished work.
        self._leaving.clear()
        self._arriving.clear()
