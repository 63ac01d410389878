"""All-gather and reduce-scatter into tensors of the caller, prepared for their shapes: for data parallelism.

Not differentiable. On nvlink what is gathered lands in memory that all ranks map; ``output`` lends that to
the caller, so that nothing is copied on the way to who reads it. Elsewhere it lands in any tensor. Partials
are added where the caller wants their sum.
"""

from collections.abc import Callable
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from flashtrain.comm import bulk, chunked, groups, transport
from flashtrain.comm.products import plan_of, rows_per_rank
from flashtrain.comm.schedule import Schedule, split_rows
from flashtrain.comm.streamed import GatherInto, ScatterInto
from flashtrain.comm.transport.base import Transport, clock
from flashtrain.comm.transport.nvlink import NvlinkTransport


class _Gather(Protocol):
    own: slice

    def output(self, site: str, overdue: Callable[[], None]) -> Tensor | None: ...

    def __call__(self, out: Tensor, x_shard: Tensor, site: str) -> None: ...


class _Scatter(Protocol):
    def __call__(self, out: Tensor, x: Tensor, site: str, scale: float) -> None: ...


def output(
    shape: torch.Size,
    dtype: torch.dtype,
    device: torch.device,
    group: str,
    site: str,
    overdue: Callable[[], None],
    ahead: int = 1,
) -> Tensor | None:
    """An uninitialised ``out [M, ...]`` for ``all_gather``, which must be the next of ``group``.

    It is where the rows arrive. None if the transport has no such memory: then any tensor does. Own rows may
    be written at once on the current stream. Whoever drops it has seen to it that what reads it comes before
    all that the streams are given which gather later; a tensor held while more than ``ahead`` others are
    gathered moves at the cost of a wait, and ``overdue`` is called. Raises UserError if landing buffers would
    pass their budget, TransportError if a peer has failed.
    """
    return _gather(shape, dtype, device, group, ahead).output(site, overdue)


def all_gather(out: Tensor, x_shard: Tensor, group: str, site: str = "", ahead: int = 1) -> None:
    """Gather row shards into ``out [M, ...]``, while a reduce-scatter of the group may be under way.

    ``x_shard [M/W, ...]``, which may be the own rows of ``out``; ``ahead`` as in ``output``. Raises UserError
    if the shard does not fit M, TransportError if a peer fails.
    """
    if out.dtype != x_shard.dtype or not out.is_contiguous() or out.shape[1:] != x_shard.shape[1:]:
        whole = x_shard.new_empty(out.shape[0], *x_shard.shape[1:])
        all_gather(whole, x_shard, group, site, ahead)
        out.copy_(whole)
        return
    way = _gather(out.shape, out.dtype, x_shard.device, group, ahead)
    if x_shard.shape[0] != way.own.stop - way.own.start:
        rows_per_rank(x_shard, group, out.shape[0])  # raises
    way(out, x_shard, site)


def reduce_scatter(out: Tensor, x: Tensor, group: str, site: str = "", scale: float = 1.0) -> None:
    """Sum ``x [M, ...]`` over ranks and write the own rows to ``out [M/W, ...]``.

    Added in rank order in fp32, multiplied by ``scale``, rounded once. Raises TransportError if a peer fails.
    """
    if out.dtype != x.dtype or not out.is_contiguous():
        own = torch.empty_like(out, dtype=x.dtype, memory_format=torch.contiguous_format)
        reduce_scatter(own, x, group, site, scale)
        out.copy_(own)
        return
    x = x.contiguous()
    mover = transport.of(group, x.device, bulk.SCATTERS)
    key = ("reduce_scatter into", x.shape, x.dtype)
    found: _Scatter | None = mover.ways.get(key)
    if found is None:
        plan = plan_of("reduce_scatter", split_rows(x.shape[0], groups.resolve(group).size()), group)
        if plan.kind == "direct" and isinstance(mover, NvlinkTransport):
            found = mover.keep_way(key, ScatterInto(mover, plan, x.shape, x.dtype))
        else:
            found = mover.keep_way(key, _SteppedScatter(plan, group))
    found(out, x, site, scale)


def _gather(shape: torch.Size, dtype: torch.dtype, device: torch.device, group: str, ahead: int) -> _Gather:
    # Those that are being read, the one that is gathered, and those that are gathered meanwhile.
    mover = transport.of(group, device, bulk.LENT, 2 + ahead)
    key = ("all_gather into", shape, dtype)
    found: _Gather | None = mover.ways.get(key)
    if found is None:
        plan = plan_of("all_gather", split_rows(shape[0], groups.resolve(group).size()), group)
        if plan.kind == "direct" and isinstance(mover, NvlinkTransport):
            found = mover.keep_way(key, GatherInto(mover, plan, shape, dtype))
        else:
            found = mover.keep_way(key, _SteppedGather(mover, plan, group))
    return found


class _SteppedGather:
    """On any transport, through its exchanges."""

    def __init__(self, mover: Transport, plan: Schedule, group: str) -> None:
        self.mover, self.plan, self.group, self.own = mover, plan, group, plan.own_rows

    def output(self, site: str, overdue: Callable[[], None]) -> Tensor | None:
        return None

    def __call__(self, out: Tensor, x_shard: Tensor, site: str) -> None:
        if self.plan.kind == "ring":
            chunked.gather(self.plan, x_shard, self.group, site, out=out)
            return
        started = clock()
        with bulk.gathering(self.plan, x_shard, self.group, site, out, self.mover) as gathered:
            gathered()
        self.mover.traffic.operating += clock() - started


class _SteppedScatter:
    """The same for sums."""

    def __init__(self, plan: Schedule, group: str) -> None:
        self.plan, self.group = plan, group

    def __call__(self, out: Tensor, x: Tensor, site: str, scale: float) -> None:
        if self.plan.kind == "direct":
            started = clock()
            with bulk.scattering(self.plan, x, self.group, site, scale, out) as scattered:
                scattered()
            transport.of(self.group, x.device, bulk.SCATTERS).traffic.operating += clock() - started
            return
        columns = x.shape[1:].numel()
        flat, own = x.view(x.shape[0], columns), out.view(out.shape[0], columns)
        partial_of = partial(_copy_rows, self.plan, flat)
        chunked.reduce(self.plan, flat, columns, self.group, site, partial_of, scale, own)


def _copy_rows(plan: Schedule, flat: Tensor, chunk: int, out: Tensor) -> None:
    out.copy_(flat[plan.rows_in(chunk)])
