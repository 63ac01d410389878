"""Output projection and cross-entropy in chunks of rows: whole logits exist neither forward nor backward."""

from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from flashtrain.errors import UserError
from flashtrain.kernels.cross_entropy import reference
from flashtrain.kernels.weight_gradient import WeightGradient

# Logits of a chunk. Each chunk reads and writes the fp32 gradient of the weight once more, so fewer are
# faster: of a vocabulary of 128,256 and hidden size 4096, 4096 rows are 1 GiB, and the gradient's passes
# hide under a product of 5 ms.
CHUNK_BYTES = 1 << 30
_TILE = 128  # rows that a product computes together


class Projection(Protocol):
    """How the logits of a chunk come to be, on one rank or on several."""

    rank: int
    world: int

    def logits(self, rows: slice, keep: bool) -> tuple[Tensor, Tensor]:
        """Logits ``[R, V/W]`` of ``rows`` of every rank, and with ``keep`` their inputs ``[R, H]``."""

    def targets(self, rows: slice) -> Tensor:
        """Targets ``[R]`` of ``rows`` of every rank."""

    def everyone(self, numbers: Tensor) -> Tensor:
        """``numbers [3, R]`` of all ranks: ``[W, 3, R]``."""

    def gradients(self, slopes: Tensor, x: Tensor, dx: Tensor | None, dw: WeightGradient | None) -> None:
        """From ``slopes [R, V/W]``: write the own rows' ``dx [R/W, H]``, add to ``dw [V/W, H]``."""


class Local:
    """All logits on this device: ``x [R, H] · weight [V, H]ᵀ``."""

    rank, world = 0, 1

    def __init__(self, x: Tensor, weight: Tensor, targets: Tensor) -> None:
        self.x, self.weight, self._targets = x, weight, targets

    def logits(self, rows: slice, keep: bool) -> tuple[Tensor, Tensor]:
        """``[R, V]``, and ``[R, H]``."""
        return torch.mm(self.x[rows], self.weight.t()), self.x[rows]

    def targets(self, rows: slice) -> Tensor:
        """``[R]``."""
        return self._targets[rows]

    def everyone(self, numbers: Tensor) -> Tensor:
        """``[1, 3, R]``."""
        return numbers.unsqueeze(0)

    def gradients(self, slopes: Tensor, x: Tensor, dx: Tensor | None, dw: WeightGradient | None) -> None:
        """``dx [R, H]`` and ``dw [V, H]``."""
        if dx is not None:
            torch.mm(slopes, self.weight, out=dx)
        if dw is not None:
            dw.add_product(slopes.t(), x)


def loss_of(
    projection: Projection,
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    most: int,
    main: WeightGradient | None = None,
    chunk_bytes: int = CHUNK_BYTES,
) -> Tensor:
    """Mean cross-entropy of ``projection``, differentiable in ``x [R/W, H]`` and ``weight [V/W, H]``.

    ``targets`` are those of all rows; ``most`` is the number of rows of the rank that has most. The weight's
    gradient goes to ``main`` where there is one. Raises UserError for a loss over no rows.
    """
    if not targets.numel():
        raise UserError("the loss of no targets has no value: give at least one row")
    wanted = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    most_rows = max(1, chunk_bytes // max(1, projection.world * weight.shape[0] * weight.element_size()))
    chunks = -(-most // most_rows)
    step = -(-most // chunks)
    if step > _TILE:
        step = min(-(-step // _TILE) * _TILE, max(_TILE, most_rows // _TILE * _TILE))
    bounds = [slice(begin, min(begin + step, most)) for begin in range(0, most, step)]
    count = (targets != reference.IGNORED).sum()
    if not wanted:
        return _forward(projection, bounds, weight, count)
    loss: Tensor = _LinearCrossEntropy.apply(x, weight, projection, bounds, count, main)
    return loss


def _pieces(weight: Tensor) -> Any:
    if weight.is_cuda and weight.dtype != torch.float64:
        from flashtrain.kernels.cross_entropy import triton

        return triton
    return reference


def _forward(projection: Projection, bounds: list[slice], weight: Tensor, count: Tensor) -> Tensor:
    pieces, found = _pieces(weight), []
    for rows in bounds:
        logits, _ = projection.logits(rows, False)
        targets = projection.targets(rows)
        numbers = pieces.statistics(logits, targets, projection.rank * weight.shape[0])
        found.append(reference.losses(projection.everyone(numbers), targets))
    return torch.cat(found).sum() / count


class _LinearCrossEntropy(torch.autograd.Function):
    """The gradients are computed in the forward pass, up to the factor that comes from behind the loss.

    Logits that were computed again in the backward pass would cost a third more products. What is kept
    instead, dx and an fp32 dw, lives no longer than from here to the backward pass of the last layer.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        projection: Projection,
        bounds: list[slice],
        count: Tensor,
        main: WeightGradient | None,
    ) -> Tensor:
        pieces, losses = _pieces(weight), []
        first = projection.rank * weight.shape[0]
        wants_dx, wants_dw = ctx.needs_input_grad[:2]
        dx = torch.empty_like(x) if wants_dx else None
        dw = WeightGradient(weight) if wants_dw else None
        # 1 / count without its power of two, which would carry most of p out of fp16's range and comes last.
        share, power = torch.frexp(1.0 / count.to(reference.wide(weight.dtype)))
        for rows in bounds:
            logits, inputs = projection.logits(rows, True)
            targets = projection.targets(rows)
            everyone = projection.everyone(pieces.statistics(logits, targets, first))
            losses.append(pieces.slopes_(logits, targets, first, everyone, projection.rank, share))
            projection.gradients(logits, inputs, None if dx is None else dx[rows], dw)
            del logits, inputs  # before the next chunk's come to be
        ctx.main = main
        ctx.save_for_backward(
            dx, None if dw is None else dw.total, torch.ldexp(torch.ones_like(share), power)
        )
        return torch.cat(losses).sum() / count

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, factor: Tensor) -> tuple[Tensor | None, ...]:
        dx, dw, scale = ctx.saved_tensors
        factor = factor * scale
        # In place: a second pass backward would be refused by autograd.
        dx = None if dx is None else dx.mul_(factor)
        if dw is not None and ctx.main is not None:
            ctx.main.add(dw, factor)
            dw = None
        elif dw is not None:
            dw.mul_(factor)
        return dx, dw, None, None, None, None
