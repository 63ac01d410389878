"""A gather with a product a chunk, as ``chunked`` does it, but prepared: on nvlink, for less host time.

The stream that computes waits for each chunk before its product; all copies are enqueued by one call.
"""

from typing import TYPE_CHECKING

from torch import Tensor

from flashtrain.comm.chunked import Landed, product
from flashtrain.comm.schedule import Schedule
from flashtrain.comm.transport.base import clock

if TYPE_CHECKING:
    from flashtrain.comm.transport.nvlink import NvlinkTransport


class StreamedGather:
    """``y [M, N] = AG(x_shard [M/W, K]) · w [N, K]ᵀ`` for shards shaped as the one that it is made with."""

    def __init__(self, mover: "NvlinkTransport", plan: Schedule, x_shard: Tensor) -> None:
        row_bytes = x_shard.shape[1] * x_shard.itemsize
        self.mover, self.plan, self.own = mover, plan, plan.own_rows
        self.messages = mover.plan(plan, row_bytes)
        self._sends = list(range(len(self.messages.sends)))
        first = self.own.start
        self._offsets = [(plan.chunks[send.chunk].offset - first) * row_bytes for send in self.messages.sends]
        arriving = {expect.chunk: number for expect, number in self.messages.arrivals.items()}
        # The rows of each chunk in schedule order, and the number of its arrival; none of the own.
        self._chunks = [(plan.rows_in(s.compute), arriving.get(s.compute)) for s in plan.steps]

    def on(self, mover: "NvlinkTransport", x_shard: Tensor, w: Tensor) -> "StreamedGather":
        """The same on another transport, for ``x_shard [M/W, K]`` and ``w [N, K]`` as those before."""
        return StreamedGather(mover, self.plan, x_shard)

    def __call__(self, x_shard: Tensor, w: Tensor, site: str, landed: Landed | None = None) -> Tensor:
        """``y [M, N]``; ``landed`` gets the gathered rows. Raises TransportError if a peer has failed."""
        started, mover, first = clock(), self.mover, self.own.start
        x_shard = x_shard.contiguous()
        y = x_shard.new_empty(self.plan.rows, w.shape[0])
        epoch = mover.begin(self.messages, site)
        try:
            gathered = mover.arena.view(epoch, x_shard.dtype, (self.plan.rows, x_shard.shape[1]))
            source = x_shard.data_ptr()
            mover.push_early(self._sends, [source + offset for offset in self._offsets], site)
            for rows, arrival in self._chunks:
                if arrival is None:
                    product(x_shard[rows.start - first : rows.stop - first], w, y[rows])
                else:
                    mover.wait(arrival, site)
                    product(gathered[rows], w, y[rows])
            if landed is not None:
                gathered[self.own] = x_shard
                landed(gathered, False)
        except BaseException:
            mover.abandon()
            raise
        mover.finish(site)
        mover.traffic.operating += clock() - started
        return y
