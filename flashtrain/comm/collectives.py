"""All-gather, reduce-scatter and all-reduce of rows by their schedules, as torch.library ops.

Partials are added in rank order in fp32 and rounded once, as those of the overlapped products (``ops``).
Every op takes the process group by name, for torch.compile; ``site`` names the place in reports and errors.
"""

import torch
from torch import Tensor

from flashtrain.comm import chunked, groups, into
from flashtrain.comm.products import plan_of, rows_per_rank

TAGS = (torch.Tag.needs_fixed_stride_order,)


@torch.library.custom_op("flashtrain::all_gather", mutates_args=(), tags=TAGS)
def all_gather(x_shard: Tensor, group: str, site: str = "", rows: int | None = None) -> Tensor:
    """Gather row shards: ``x_shard [M/W, ...]`` -> ``x_full [M, ...]``, equal bits on every rank.

    Backward is reduce-scatter: right where each rank consumes the result differently (its own columns,
    its own heads). A consumer that does the same on every rank would count its gradient W times.
    Raises UserError if the shard does not fit ``rows``, TransportError if a peer fails.
    """
    plan = plan_of("all_gather", rows_per_rank(x_shard, group, rows), group)
    return chunked.gather(plan, x_shard, group, site)


@torch.library.custom_op("flashtrain::reduce_scatter", mutates_args=(), tags=TAGS)
def reduce_scatter(x: Tensor, group: str, site: str = "", scale: float = 1.0) -> Tensor:
    """Sum over ranks and keep the own rows: ``x [M, ...]`` -> ``x_shard [M/W, ...]``.

    The fp32 sum is multiplied by ``scale`` before it is rounded (1/W makes a mean). Backward is
    all-gather. Raises TransportError if a peer fails.
    """
    out = x.new_empty(own_rows(x, group), *x.shape[1:])
    into.reduce_scatter(out, x, group, site, scale)
    return out


def all_reduce(x: Tensor, group: str, site: str = "", scale: float = 1.0) -> Tensor:
    """Sum ``x`` over the ranks in rank order, times ``scale``: reduce-scatter, then all-gather.

    ``x [...]`` of any shape -> the same shape, equal bits on every rank. Not differentiable. Raises
    TransportError if a peer fails.
    """
    flat = x.detach().reshape(-1)
    return all_gather(reduce_scatter(flat, group, site, scale), group, site, flat.shape[0]).reshape(x.shape)


# Fakes: what torch.compile, meta tensors and opcheck see. Shapes are those of the real ops.


@all_gather.register_fake
def _(x_shard: Tensor, group: str, site: str = "", rows: int | None = None) -> Tensor:
    return x_shard.new_empty(gathered_rows(x_shard, group, rows), *x_shard.shape[1:])


@reduce_scatter.register_fake
def _(x: Tensor, group: str, site: str = "", scale: float = 1.0) -> Tensor:
    return x.new_empty(own_rows(x, group), *x.shape[1:])


def gathered_rows(x_shard: Tensor, group: str, rows: int | None) -> int:
    """Rows M of a gather: ``rows`` where they are given, else W times those of ``x_shard [M/W, ...]``."""
    return x_shard.shape[0] * groups.resolve(group).size() if rows is None else rows


def own_rows(x: Tensor, group: str) -> int:
    """Rows of ``x [M, ...]`` that this rank keeps in a scatter."""
    process_group = groups.resolve(group)
    world, rank = process_group.size(), process_group.rank()
    return (x.shape[0] + world - 1 - rank) // world  # torch.tensor_split: the first M mod W get one more


# Gradients. Each op's backward is the other.


def _all_gather_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    _, ctx.group, ctx.site, _ = inputs


def _all_gather_backward(ctx, grad: Tensor):  # type: ignore[no-untyped-def]
    return reduce_scatter(grad.contiguous(), ctx.group, ctx.site), None, None, None


def _reduce_scatter_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    x, ctx.group, ctx.site, ctx.scale = inputs
    ctx.rows = x.shape[0]


def _reduce_scatter_backward(ctx, grad: Tensor):  # type: ignore[no-untyped-def]
    dx = all_gather(grad.contiguous(), ctx.group, ctx.site, ctx.rows)
    return dx * ctx.scale if ctx.scale != 1.0 else dx, None, None, None


all_gather.register_autograd(_all_gather_backward, setup_context=_all_gather_context)
reduce_scatter.register_autograd(_reduce_scatter_backward, setup_context=_reduce_scatter_context)
