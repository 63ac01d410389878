"""What competes on one product: the plain product, collectives around it, and the overlapped op.

Every system computes the same from the same tensors, under autograd as a training step does. A column
site in the notation of ``flashtrain.comm.ops``: y = AG(x_shard) · wᵀ; backward dx_shard = RS(dy · w) and
dw = dyᵀ · AG(x_shard), gathered again or kept. A row site: y_shard = RS(x · wᵀ); backward
dx = AG(dy_shard) · w, dw = AG(dy_shard)ᵀ · x.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from shapes import Site
from torch import Tensor

from flashtrain.comm import ops

# torch 2.13 renamed both and warns at every call of the old names.
_gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_scatter_single = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor

Collective = Callable[[Tensor, dist.ProcessGroup], Tensor]


class Inputs:
    """Random tensors of one site, the same on no two ranks except where a gather makes them so.

    ``x`` and ``w`` are leaves that need gradients. ``number`` tells sets apart that calls use in turn.
    """

    def __init__(
        self, site: Site, rank: int, world: int, number: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        rows, outputs, inputs = site.local(world)
        random = torch.Generator(device).manual_seed(1000 * number + rank)
        column = site.style == "column"

        def draw(*size: int) -> Tensor:
            return torch.randn(*size, generator=random, device=device).to(dtype)

        self.x = draw(rows // world if column else rows, inputs).requires_grad_()
        self.w = draw(outputs, inputs).mul_(site.inputs**-0.5).requires_grad_()
        self.dy = draw(rows if column else rows // world, outputs)
        # The plain products see what a gather would have brought.
        self.x_full = draw(rows, inputs) if column else self.x.detach()
        self.dy_full = self.dy if column else draw(rows, outputs)


def gather_tensor(shard: Tensor, group: dist.ProcessGroup) -> Tensor:
    full = shard.new_empty(group.size() * shard.shape[0], *shard.shape[1:])
    _gather_single(full, shard, group=group)
    return full


def gather_list(shard: Tensor, group: dist.ProcessGroup) -> Tensor:
    full = shard.new_empty(group.size() * shard.shape[0], *shard.shape[1:])
    dist.all_gather(list(full.chunk(group.size())), shard, group=group)
    return full


def scatter_tensor(partial: Tensor, group: dist.ProcessGroup) -> Tensor:
    shard = partial.new_empty(partial.shape[0] // group.size(), *partial.shape[1:])
    _scatter_single(shard, partial, group=group)
    return shard


def scatter_list(partial: Tensor, group: dist.ProcessGroup) -> Tensor:
    shard = partial.new_empty(partial.shape[0] // group.size(), *partial.shape[1:])
    dist.reduce_scatter(shard, list(partial.chunk(group.size())), group=group)
    return shard


def scatter_by_all_reduce(partial: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Changes ``partial``, which nobody needs afterwards; returns a view of it."""
    dist.all_reduce(partial, group=group)
    return partial.chunk(group.size())[group.rank()]


GATHERS: dict[str, Collective] = {
    "all_gather_into_tensor": gather_tensor,
    "all_gather of a list": gather_list,
}
SCATTERS: dict[str, Collective] = {
    "reduce_scatter_tensor": scatter_tensor,
    "reduce_scatter of a list": scatter_list,
    "all_reduce and slice": scatter_by_all_reduce,
}


class CollectiveColumn(torch.autograd.Function):
    """Gather, then multiply, with the collectives given."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        w: Tensor,
        group: dist.ProcessGroup,
        gather: Collective,
        scatter: Collective,
        keep: bool,
    ) -> Tensor:
        x_full = gather(x, group)
        ctx.save_for_backward(x_full if keep else x, w)
        ctx.how = group, gather, scatter, keep
        return torch.mm(x_full, w.t())

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, w = ctx.saved_tensors
        group, gather, scatter, keep = ctx.how
        dx = scatter(torch.mm(dy, w), group)
        dw = torch.mm(dy.t(), x if keep else gather(x, group))
        return dx, dw, None, None, None, None


class CollectiveRow(torch.autograd.Function):
    """Multiply, then reduce-scatter, with the collectives given."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, w: Tensor, group: dist.ProcessGroup, gather: Collective, scatter: Collective
    ) -> Tensor:
        ctx.save_for_backward(x, w)
        ctx.how = group, gather
        return scatter(torch.mm(x, w.t()), group)

    @staticmethod
    def backward(ctx: Any, dy_shard: Tensor) -> tuple[Tensor | None, ...]:
        x, w = ctx.saved_tensors
        group, gather = ctx.how
        dy = gather(dy_shard, group)
        return torch.mm(dy, w), torch.mm(dy.t(), x), None, None, None


def collectives(
    style: str, group: dist.ProcessGroup, gather: Collective, scatter: Collective, keep: bool
) -> Callable[[Tensor, Tensor], Tensor]:
    """``f(x, w) -> y`` by collectives around whole products."""
    if style == "column":
        return lambda x, w: CollectiveColumn.apply(x, w, group, gather, scatter, keep)
    return lambda x, w: CollectiveRow.apply(x, w, group, gather, scatter)


def overlapped(
    style: str, group: dist.ProcessGroup, site: str, keep: bool
) -> Callable[[Tensor, Tensor], Tensor]:
    """``f(x, w) -> y`` by the op, over the transport that ``group`` has."""
    name = group.group_name
    if style == "column":
        # Nobody here reads the gathered input.
        return lambda x, w: ops.all_gather_matmul(x, w, name, site, None, keep, False)[0]
    return lambda x, w: ops.matmul_reduce_scatter(x, w, name, site)


def plain_forward(x_full: Tensor, w: Tensor) -> Tensor:
    """The product alone, all rows at once."""
    return torch.mm(x_full, w.t())


def plain_backward(x_full: Tensor, w: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
    """Both products of the backward pass alone."""
    return torch.mm(dy, w), torch.mm(dy.t(), x_full)
