"""What ``chunked`` and ``bulk`` do, but prepared for fixed shapes: on nvlink, for less host time.

The stream that computes waits for arrivals between its products; every other step is one call into C++.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from flashtrain.comm.chunked import Landed, plain, product
from flashtrain.comm.schedule import Schedule
from flashtrain.comm.transport.base import clock
from flashtrain.kernels.ordered_sum import choice

if TYPE_CHECKING:
    from flashtrain.comm.transport.nvlink import NvlinkTransport


class _Sending:
    """Chunks with rows of ``row_bytes`` that leave from a tensor which begins at row ``first`` of all."""

    def __init__(self, mover: "NvlinkTransport", plan: Schedule, row_bytes: int, first: int) -> None:
        self.mover, self.plan, self.rows, self.own = mover, plan, plan.rows, plan.own_rows
        self.messages = mover.plan(plan, row_bytes)
        self.sends = list(range(len(self.messages.sends)))
        self.offsets = [(plan.chunks[send.chunk].offset - first) * row_bytes for send in self.messages.sends]
        self.own_offset = self.own.start * row_bytes
        self.nbytes = sum(plan.chunks[send.chunk].rows * row_bytes for send in self.messages.sends)

    def begin(self, site: str) -> None:
        self.mover.begin(self.messages, site)

    def sources(self, tensor: Tensor) -> list[int]:
        begin = tensor.data_ptr()
        return [begin + offset for offset in self.offsets]


class StreamedGather(_Sending):
    """``y [M, N] = AG(x_shard [M/W, K]) · w [N, K]ᵀ`` for operands shaped as those that it is made with."""

    def __init__(self, mover: "NvlinkTransport", plan: Schedule, x_shard: Tensor, w: Tensor) -> None:
        first = plan.own_rows.start
        super().__init__(mover, plan, x_shard.shape[1] * x_shard.itemsize, first)
        arriving = {expect.chunk: number for expect, number in self.messages.arrivals.items()}
        # The rows of each chunk in schedule order; of own ones their place among these, where there are more;
        # of others the number of their arrival.
        self._chunks: list[tuple[slice, slice | None, int | None]] = []
        for step in plan.steps:
            rows = plan.rows_in(step.compute)
            inside = None if rows == self.own else slice(rows.start - first, rows.stop - first)
            self._chunks.append((rows, inside, arriving.get(step.compute)))
        self._plain = all(
            plain(rows.stop - rows.start, w.shape[0], w.shape[1]) for rows, _, _ in self._chunks
        )

    def on(self, mover: "NvlinkTransport", x_shard: Tensor, w: Tensor) -> "StreamedGather":
        """The same on another transport, for ``x_shard [M/W, K]`` and ``w [N, K]`` as those before."""
        return StreamedGather(mover, self.plan, x_shard, w)

    def __call__(self, x_shard: Tensor, w: Tensor, site: str, landed: Landed | None = None) -> Tensor:
        """``y [M, N]``; ``landed`` gets the gathered rows. Raises TransportError if a peer has failed."""
        started, mover = clock(), self.mover
        x_shard = x_shard.contiguous()
        y = x_shard.new_empty(self.rows, w.shape[0])
        mover.begin_early(self.messages, self.sources(x_shard), site)
        try:
            gathered = mover.landed(x_shard.dtype, (self.rows, x_shard.shape[1]))
            if landed is not None:
                mover.keep(x_shard.data_ptr(), self.own_offset, x_shard.nbytes, site)
            turned = w.t()
            for rows, inside, arrival in self._chunks:
                if arrival is not None:
                    mover.wait(arrival, site)
                    x = gathered[rows]
                else:
                    x = x_shard if inside is None else x_shard[inside]
                if self._plain:
                    torch.mm(x, turned, out=y[rows])
                else:
                    product(x, w, y[rows])
            if landed is not None:
                mover.wait_for_all(site)
                landed(gathered, False)
        except BaseException:
            mover.abandon()
            raise
        mover.finish(site)
        mover.traffic.operating += clock() - started
        return y


class GatherInto(_Sending):
    """``out [M, ...] = AG(x_shard [M/W, ...])`` for an ``out`` of this shape and dtype.

    Where ``out`` is what ``output`` gave, nothing is copied on the way: it is the landing buffer.
    """

    def __init__(
        self, mover: "NvlinkTransport", plan: Schedule, shape: torch.Size, dtype: torch.dtype
    ) -> None:
        super().__init__(mover, plan, shape[1:].numel() * dtype.itemsize, plan.own_rows.start)
        self.shape, self.dtype = shape, dtype
        around = slice(0, self.own.start), slice(self.own.stop, plan.rows)
        self._others = [rows for rows in around if rows.stop > rows.start]

    def output(self, site: str, overdue: Callable[[], None]) -> Tensor | None:
        """An ``out [M, ...]`` for the next gather of the transport, or None: see ``NvlinkTransport.lend``."""
        return self.mover.lend(self.messages, self.dtype, self.shape, site, overdue)

    def __call__(self, out: Tensor, x_shard: Tensor, site: str) -> None:
        """Fill ``out [M, ...]``; ``x_shard`` may be its own rows. Raises TransportError if a peer failed."""
        started, mover = clock(), self.mover
        x_shard = x_shard.contiguous()
        lent = mover.begin_early(self.messages, self.sources(x_shard), site, out)
        try:
            if x_shard.data_ptr() != out.data_ptr() + self.own_offset:
                out[self.own] = x_shard
            if not lent:
                mover.wait_for_all(site)
                landed = mover.landed(self.dtype, self.shape)
                for rows in self._others:
                    out[rows] = landed[rows]
        except BaseException:
            mover.abandon()
            raise
        mover.finish(site)
        mover.traffic.bytes_sent += self.nbytes
        mover.traffic.operating += clock() - started


class ScatterInto(_Sending):
    """``out [M/W, ...] = RS(x [M, ...])`` for an ``x`` of this shape and dtype, contiguous as ``out``."""

    def __init__(
        self, mover: "NvlinkTransport", plan: Schedule, shape: torch.Size, dtype: torch.dtype
    ) -> None:
        super().__init__(mover, plan, shape[1:].numel() * dtype.itemsize, 0)
        self._dtype, self._slots = dtype, (plan.world, self.own.stop - self.own.start, *shape[1:])

    def __call__(self, out: Tensor, x: Tensor, site: str, scale: float) -> None:
        """Added in rank order in fp32, times ``scale``. Raises TransportError if a peer has failed."""
        started, mover = clock(), self.mover
        mover.begin_early(self.messages, self.sources(x), site)
        try:
            mover.wait_for_all(site)
            slots = mover.landed(self._dtype, self._slots)
            choice.ordered_sum(slots, scale, own=(self.plan.rank, x[self.own]), out=out)
        except BaseException:
            mover.abandon()
            raise
        mover.finish(site)
        mover.traffic.bytes_sent += self.nbytes
        mover.traffic.operating += clock() - started


class StreamedColumn:
    """Both gradients of a column product, as ``gradients.WholeColumn``; made for shapes, by their plans.

    ``gather`` is None where x comes gathered; else it goes by ``gathers``, a transport of its own. The sum of
    what is scattered, bound by memory, runs beside the product for dw, which is not.
    """

    def __init__(
        self,
        scatters: "NvlinkTransport",
        scatter: Schedule,
        gathers: "NvlinkTransport",
        gather: Schedule | None,
        dy: Tensor,
        w: Tensor,
    ) -> None:
        row_bytes = w.shape[1] * w.itemsize
        self._scatter = _Sending(scatters, scatter, row_bytes, 0)
        self._gather: _Sending | None = None
        if gather is not None:
            self._gather = _Sending(gathers, gather, row_bytes, gather.own_rows.start)
        self._columns, self._plain = w.shape[1], plain(dy.shape[0], w.shape[1], w.shape[0])
        own = scatter.own_rows
        self._slots = scatter.world, own.stop - own.start, w.shape[1]
        self._stream: torch.cuda.Stream | None = None

    def _beside(self, handle: int, device: torch.device) -> torch.cuda.Stream:
        if self._stream is None:
            self._stream = torch.cuda.ExternalStream(handle, device)
        return self._stream

    def __call__(
        self,
        dy: Tensor,
        x: Tensor,
        w: Tensor,
        site: str,
        multiply: Callable[[Tensor], object],
        settled: bool = False,
    ) -> Tensor:
        """``dx_shard [M/W, K]``; ``multiply`` gets the gathered x. Raises TransportError if a peer fails."""
        started, scatter, gather = clock(), self._scatter, self._gather
        # Then it leaves while the device is still busy with what comes before: the host is ahead of it.
        since = scatter.mover if settled and x.is_contiguous() else None
        x = x.contiguous()
        partials = dy.new_empty(dy.shape[0], self._columns)
        # Before the pushes: it is written on their stream, which comes after whatever used this memory.
        dx_shard = dy.new_empty(self._slots[1:])
        under_way = []
        try:
            if gather is not None:
                gather.begin(site)
                under_way.append(gather.mover)
            # The product goes to the device before the copies, which need not wait for it.
            if self._plain:
                torch.mm(dy, w, out=partials)
            else:
                product(dy, w.t(), partials)
            if gather is not None:
                gather.mover.push_early(gather.sends, gather.sources(x), site, since)
                gather.mover.keep(x.data_ptr(), gather.own_offset, x.nbytes, site)
            scatter.begin(site)
            under_way.append(scatter.mover)
            scatter.mover.push(scatter.sends, scatter.sources(partials), site)
            slots = scatter.mover.landed(partials.dtype, self._slots)
            with torch.cuda.stream(self._beside(scatter.mover.wait_beside(site), dy.device)):
                choice.ordered_sum(slots, own=(scatter.plan.rank, partials[scatter.own]), out=dx_shard)
            if gather is not None:
                gather.mover.wait_for_all(site)
                x = gather.mover.landed(x.dtype, (dy.shape[0], self._columns))
            multiply(x)
            while under_way:
                under_way[-1].finish(site)
                under_way.pop()
        except BaseException:
            for mover in under_way:
                mover.abandon()
            raise
        scatter.mover.traffic.operating += clock() - started
        return dx_shard
