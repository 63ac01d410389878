"""Gradients of the overlapped products, with their transfers beneath whole products."""

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, Protocol

from torch import Tensor

from flashtrain.comm import bulk, chunked, groups, transport
from flashtrain.comm.products import check_device, gather_way, plan_of, rows_per_rank, scatter_way
from flashtrain.comm.schedule import Schedule, split_rows
from flashtrain.comm.streamed import StreamedColumn
from flashtrain.comm.transport.base import Transport, capturing, clock
from flashtrain.comm.transport.nvlink import NvlinkTransport

# Takes the gathered operand of a weight's gradient: it may be gone when this returns, and what reads it must
# be on the stream by then.
Multiply = Callable[[Tensor], object]


class Column(Protocol):
    """``dx_shard [M/W, K] = RS(dy [M, N] · w [N, K])``, and ``multiply`` for ``dw = dyᵀ · AG(x)``."""

    def __call__(
        self, dy: Tensor, x: Tensor, w: Tensor, site: str, multiply: Multiply, settled: bool = False
    ) -> Tensor: ...


def column(
    dy: Tensor,
    x: Tensor,
    w: Tensor,
    group: str,
    site: str,
    gathered: bool,
    multiply: Multiply,
    settled: bool = False,
) -> Tensor:
    """``dx_shard [M/W, K] = RS(dy [M, N] · w [N, K])``, and beside it ``multiply`` for the weight's gradient.

    That is ``dw = dyᵀ · AG(x [M/W, K])``; ``x`` is ``[M, K]`` where ``gathered``. ``settled``: x was an
    operand of an earlier operation of ``group`` and is as it was. Raises UserError if the shard does not fit
    M or is on another device than the transport, TransportError if a peer fails.
    """
    mover = transport.of(group, dy.device)
    key = ("column", gathered, x.shape, dy.shape, dy.dtype, w.shape)
    way: Column | None = mover.ways.get(key)
    if way is None:
        if dy.is_cuda and capturing():
            raise mover.uncaptured(site)
        check_device(mover, site, dy, x, w)
        way = _column_way(mover, key, dy, x, w, group, gathered)
    return way(dy, x, w, site, multiply, settled)


def _column_way(
    mover: Transport, key: tuple[Any, ...], dy: Tensor, x: Tensor, w: Tensor, group: str, gathered: bool
) -> Column:
    """How it is computed for tensors as these, kept in ``mover`` and in what takes its place in captures."""
    scatter = plan_of("reduce_scatter", split_rows(dy.shape[0], groups.resolve(group).size()), group)
    gather = None if gathered else plan_of("all_gather", rows_per_rank(x, group, dy.shape[0]), group)
    lane = mover if gather is None else transport.of(group, dy.device, bulk.GATHERS)

    def make(scatters: Transport | None, gathers: Transport | None) -> Column:
        at_once = scatter.kind == "direct"
        if at_once and isinstance(scatters, NvlinkTransport) and isinstance(gathers, NvlinkTransport):
            return StreamedColumn(scatters, scatter, gathers, gather, dy, w)
        return WholeColumn(scatter, gather, group)

    if mover.captured is not None:
        mover.captured.keep_way(key, make(mover.captured, lane.captured))
    way: Column = mover.keep_way(key, make(mover, lane))
    return way


class WholeColumn:
    """The gather under the product for dx, whose scatter is under the product for dw; on any transport.

    Schedules that pass from rank to rank cannot send all at once, and go before and after the products.
    """

    def __init__(self, scatter: Schedule, gather: Schedule | None, group: str) -> None:
        self.scatter, self.gather, self.group = scatter, gather, group

    def __call__(
        self, dy: Tensor, x: Tensor, w: Tensor, site: str, multiply: Multiply, settled: bool = False
    ) -> Tensor:
        """``dx_shard [M/W, K]``; ``multiply`` gets the gathered x. Raises TransportError if a peer fails."""
        started, mover = clock(), transport.of(self.group, dy.device)
        if self.scatter.kind == "ring":
            x_full = x if self.gather is None else chunked.gather(self.gather, x, self.group, site)
            dx_shard = scatter_way(dy, w.t(), self.group, site)(dy, w.t(), site)
            multiply(x_full)
            return dx_shard
        with ExitStack() as under_way:
            arrived = None
            if self.gather is not None:
                arrived = under_way.enter_context(bulk.gathering(self.gather, x, self.group, site))
            computing = clock()
            partials = dy.new_empty(dy.shape[0], w.shape[1])
            chunked.product(dy, w.t(), partials)
            computed = clock() - computing
            total = under_way.enter_context(bulk.scattering(self.scatter, partials, self.group, site))
            x_full = x if arrived is None else arrived()
            computing = clock()
            multiply(x_full)
            mover.traffic.computing += computed + clock() - computing
            dx_shard = total()
        mover.traffic.operating += clock() - started
        return dx_shard


def row(dy_shard: Tensor, rows: int, w: Tensor, group: str, site: str, multiply: Multiply) -> Tensor:
    """``dx [M, K] = AG(dy_shard [M/W, N]) · w [N, K]``, and ``multiply`` for ``dw = AG(dy_shard)ᵀ · x``.

    Gathered once for both; ``rows`` is M. Raises UserError if the shard does not fit M, TransportError if a
    peer fails.
    """

    def landed(dy: Tensor, _: bool) -> None:
        multiply(dy)

    way = gather_way(dy_shard, w.t(), group, rows, site)
    return way(dy_shard, w.t(), site, landed)
