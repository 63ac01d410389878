"""Gradients of the overlapped products, with their transfers beneath whole products."""

from contextlib import ExitStack

import torch
from torch import Tensor

from flashtrain.comm import bulk, chunked, groups, transport
from flashtrain.comm.products import gather_way, plan_of, rows_per_rank, scatter_way
from flashtrain.comm.schedule import split_rows
from flashtrain.comm.transport.base import clock


def column(dy: Tensor, x: Tensor, w: Tensor, group: str, site: str, gathered: bool) -> tuple[Tensor, Tensor]:
    """``dx_shard [M/W, K] = RS(dy [M, N] · w [N, K])`` and ``dw [N, K] = dyᵀ · AG(x [M/W, K])``.

    ``x`` is ``[M, K]`` where ``gathered``. Raises UserError if the shard does not fit M, TransportError
    if a peer fails.
    """
    started, mover = clock(), transport.of(group, dy.device)
    scatter = plan_of("reduce_scatter", split_rows(dy.shape[0], groups.resolve(group).size()), group)
    gather = None if gathered else plan_of("all_gather", rows_per_rank(x, group, dy.shape[0]), group)
    if scatter.kind == "ring":
        # What passes from rank to rank cannot all leave at once.
        x_full = x if gather is None else chunked.gather(gather, x, group, site)
        return scatter_way(dy, w.t(), group, site)(dy, w.t(), site), torch.mm(dy.t(), x_full)
    with ExitStack() as under_way:
        arrived = None
        if gather is not None:
            arrived = under_way.enter_context(bulk.gathering(gather, x, group, site))
        computing = clock()
        partials = dy.new_empty(dy.shape[0], w.shape[1])
        chunked.product(dy, w.t(), partials)
        computed = clock() - computing
        total = under_way.enter_context(bulk.scattering(scatter, partials, group, site))
        x_full = x if arrived is None else arrived()
        computing = clock()
        dw = torch.mm(dy.t(), x_full)
        mover.traffic.computing += computed + clock() - computing
        dx_shard = total()
    mover.traffic.operating += clock() - started
    return dx_shard, dw


def row(dy_shard: Tensor, x: Tensor, w: Tensor, group: str, site: str) -> tuple[Tensor, Tensor]:
    """``dx [M, K] = AG(dy_shard [M/W, N]) · w [N, K]`` and ``dw [N, K] = AG(dy_shard)ᵀ · x [M, K]``.

    Gathered once for both. Raises UserError if the shard does not fit M, TransportError if a peer fails.
    """
    dw = torch.empty_like(w)

    def landed(dy: Tensor, _: bool) -> None:
        torch.mm(dy.t(), x, out=dw)

    way = gather_way(dy_shard, w.t(), group, x.shape[0], site)
    return way(dy_shard, w.t(), site, landed), dw
