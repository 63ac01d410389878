"""All-gather, reduce-scatter and all-reduce of rows by their schedules, as torch.library ops.

Partials are added in rank order in fp32 and rounded once, as those of the overlapped products (``ops``).
Every op takes the process group by name, for torch.compile; ``site`` names the place in reports and errors.
"""

import torch
from torch import Tensor

from flashtrain.comm import bulk, chunked, groups
from flashtrain.comm.products import plan_of, rows_per_rank
from flashtrain.comm.schedule import split_rows

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


def all_gather_into(out: Tensor, x_shard: Tensor, group: str, site: str = "") -> None:
    """Gather row shards into ``out [M, ...]``, while a reduce-scatter of the group may be under way.

    ``x_shard [M/W, ...]``; not differentiable. Raises UserError if the shard does not fit M, TransportError
    if a peer fails.
    """
    plan = plan_of("all_gather", rows_per_rank(x_shard, group, out.shape[0]), group)
    if plan.kind == "direct":
        with bulk.gathering(plan, x_shard, group, site) as gathered:
            out.copy_(gathered())
    else:
        out.copy_(chunked.gather(plan, x_shard, group, site))


@torch.library.custom_op("flashtrain::reduce_scatter", mutates_args=(), tags=TAGS)
def reduce_scatter(x: Tensor, group: str, site: str = "", scale: float = 1.0) -> Tensor:
    """Sum over ranks and keep the own rows: ``x [M, ...]`` -> ``x_shard [M/W, ...]``.

    The fp32 sum is multiplied by ``scale`` before it is rounded (1/W makes a mean). Backward is
    all-gather. Raises TransportError if a peer fails.
    """
    world = groups.resolve(group).size()
    plan = plan_of("reduce_scatter", split_rows(x.shape[0], world), group)
    x = x.contiguous()
    if plan.kind == "direct":
        with bulk.scattering(plan, x, group, site, scale) as scattered:
            return scattered()
    flat = x.reshape(x.shape[0], -1) if x.numel() else x.new_empty(x.shape[0], x[:1].numel())

    def partial(chunk: int, out: Tensor) -> None:
        out.copy_(flat[plan.rows_in(chunk)])

    own = chunked.reduce(plan, flat, flat.shape[1], group, site, partial, scale)
    return own.reshape(own.shape[0], *x.shape[1:])


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
