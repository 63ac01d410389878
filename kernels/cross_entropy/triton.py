"""Cross-entropy of a chunk of logits: one pass for its statistics, one that writes its gradient in place."""

import torch
import triton.language as tl
from torch import Tensor

from flashtrain.kernels.cross_entropy.reference import IGNORED
from flashtrain.kernels.jit import kernel
from flashtrain.kernels.sizes import cdiv, next_power_of_2

_READ, _WRITTEN = 8192, 4096  # columns of a block
_LOWEST = torch.finfo(torch.float32).min


@kernel
def statistics_kernel(  # type: ignore[no-untyped-def]
    logits, targets, numbers, rows, width, first, stride, LOWEST: tl.constexpr, BLOCK: tl.constexpr
):
    """The three numbers of one row, its sum kept relative to the largest logit so far."""
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride
    place = tl.arange(0, BLOCK)
    # -inf minus -inf would be no number: a row of nothing else starts from the lowest finite one.
    largest = tl.full((), LOWEST, tl.float32)
    total = tl.full((), 0.0, tl.float32)
    ahead = tl.load(logits + place, mask=place < width, other=float("-inf"))
    for begin in range(0, width, BLOCK):
        values = ahead.to(tl.float32)
        column = begin + BLOCK + place
        ahead = tl.load(logits + column, mask=column < width, other=float("-inf"))
        higher = tl.maximum(largest, tl.max(values, axis=0))
        total = total * tl.exp(largest - higher) + tl.sum(tl.exp(values - higher), axis=0)
        largest = higher
    index = tl.load(targets + row) - first
    own = (index >= 0) & (index < width)
    target = tl.load(logits + index, mask=own, other=0.0).to(tl.float32)
    tl.store(numbers + row, largest)
    tl.store(numbers + rows + row, total)
    tl.store(numbers + 2 * rows + row, target)


@kernel
def slopes_kernel(  # type: ignore[no-untyped-def]
    logits,
    targets,
    everyone,
    share,
    losses,
    rows,
    width,
    first,
    rank,
    stride,
    RANKS: tl.constexpr,
    IGNORE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One block of columns of a row: (p - 1 at the target) · share; the first block writes the row's loss."""
    row = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    top = tl.load(everyone + row)
    for peer in tl.static_range(1, RANKS):
        top = tl.maximum(top, tl.load(everyone + 3 * peer * rows + row))
    denominator = tl.full((), 0.0, tl.float32)
    hit = tl.full((), 0.0, tl.float32)
    for peer in tl.static_range(RANKS):
        numbers = everyone + 3 * peer * rows + row
        denominator += tl.load(numbers + rows) * tl.exp(tl.load(numbers) - top)
        hit += tl.load(numbers + 2 * rows)
    target = tl.load(targets + row)
    counts = target != IGNORE
    if block == 0:
        tl.store(losses + row, tl.where(counts, tl.log(denominator) + top - hit, 0.0))
    largest = tl.load(everyone + 3 * rank * rows + row)
    factor = tl.exp(largest - top) / denominator
    column = block * BLOCK + tl.arange(0, BLOCK)
    logits += row * stride + column
    values = tl.load(logits, mask=column < width, other=float("-inf")).to(tl.float32)
    # The 1 goes off in fp32: p - 1 of a confident row would be lost to a rounding of p.
    slope = tl.exp(values - largest) * factor - tl.where(column == target - first, 1.0, 0.0)
    slope = tl.where(counts, slope * tl.load(share), 0.0)
    tl.store(logits, slope.to(logits.dtype.element_ty), mask=column < width)


def statistics(logits: Tensor, targets: Tensor, first: int) -> Tensor:
    """See ``reference.statistics``: ``[3, R]`` fp32; rows of logits may lie apart, columns not."""
    rows, width = logits.shape
    numbers = torch.empty(3, rows, dtype=torch.float32, device=logits.device)
    if rows:
        block = min(_READ, next_power_of_2(width))
        statistics_kernel[(rows,)](
            logits,
            targets,
            numbers,
            rows,
            width,
            first,
            logits.stride(0),
            LOWEST=_LOWEST,
            BLOCK=block,
            num_warps=8 if block > 1024 else 4,
        )
    return numbers


def slopes_(
    logits: Tensor, targets: Tensor, first: int, everyone: Tensor, rank: int, share: Tensor
) -> Tensor:
    """See ``reference.slopes_``: writes the gradient over ``logits [R, V/W]``, gives losses ``[R]`` fp32."""
    rows, width = logits.shape
    losses = torch.empty(rows, dtype=torch.float32, device=logits.device)
    if rows:
        block = min(_WRITTEN, next_power_of_2(width))
        slopes_kernel[(rows, cdiv(width, block))](
            logits,
            targets,
            everyone,
            share,
            losses,
            rows,
            width,
            first,
            rank,
            logits.stride(0),
            RANKS=everyone.shape[0],
            IGNORE=IGNORED,
            BLOCK=block,
            num_warps=8 if block > 1024 else 4,
        )
    return losses
