"""RMSNorm and the residual addition before it in one pass each way.

Blocks stay on their processor and take every n-th row, so that the weight is read, and the weight's gradient
written, once a block; rows ahead are on their way into shared memory meanwhile. The root of a row's mean
square is computed again in the backward pass: nothing but the sum is kept.
"""

from dataclasses import dataclass
from functools import cache, cached_property

import torch
import triton.language as tl
from torch import Tensor

from flashtrain.kernels.column_sums import column_sums
from flashtrain.kernels.jit import kernel
from flashtrain.kernels.layout import rows_of
from flashtrain.kernels.sizes import next_power_of_2, processors

# Of a Hopper processor; of the shared memory, what is left beside the sums over a row.
_REGISTERS, _SHARED_BYTES = 65536, 216 * 1024


@dataclass(frozen=True)
class Launch:
    """How a kernel runs: warps of a block, blocks that share a processor, rows under way at once."""

    warps: int
    blocks: int
    stages: int

    @cached_property
    def registers(self) -> int:
        """The most that a thread may take if all blocks are to be on the processor at once."""
        return min(255, _REGISTERS // (self.blocks * self.warps * 32) // 8 * 8)


@kernel
def forward_kernel(  # type: ignore[no-untyped-def]
    x,
    residual,
    weight,
    y,
    total,
    rows,
    width,
    epsilon,
    x_row,
    residual_row,
    ADD: tl.constexpr,
    STAGES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Every num_programs-th row of ``y``, and of ``total`` = x + residual where there is a residual."""
    place = tl.arange(0, BLOCK)
    inside = place < width
    factor = tl.load(weight + place, mask=inside, other=0.0).to(tl.float32)
    for index in tl.range(tl.program_id(0), rows, tl.num_programs(0), num_stages=STAGES):
        row = tl.cast(index, tl.int64)
        values = tl.load(x + row * x_row + place, mask=inside, other=0.0).to(tl.float32)
        if ADD:
            values += tl.load(residual + row * residual_row + place, mask=inside, other=0.0).to(tl.float32)
            rounded = values.to(total.dtype.element_ty)
            tl.store(total + row * width + place, rounded, mask=inside)
            values = rounded.to(tl.float32)
        values *= tl.rsqrt(tl.sum(values * values, axis=0) / width + epsilon)
        tl.store(y + row * width + place, (values * factor).to(y.dtype.element_ty), mask=inside)


@kernel
def backward_kernel(  # type: ignore[no-untyped-def]
    dy,
    d_total,
    total,
    weight,
    dx,
    d_weight,
    rows,
    width,
    epsilon,
    dy_row,
    d_total_row,
    total_row,
    ADD: tl.constexpr,
    STAGES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Every num_programs-th row of ``dx``, and the block's part of the weight's gradient in that order."""
    place = tl.arange(0, BLOCK)
    inside = place < width
    factor = tl.load(weight + place, mask=inside, other=0.0).to(tl.float32)
    gathered = tl.zeros((BLOCK,), dtype=tl.float32)
    for index in tl.range(tl.program_id(0), rows, tl.num_programs(0), num_stages=STAGES):
        row = tl.cast(index, tl.int64)
        values = tl.load(total + row * total_row + place, mask=inside, other=0.0).to(tl.float32)
        slope = tl.load(dy + row * dy_row + place, mask=inside, other=0.0).to(tl.float32)
        scale = tl.rsqrt(tl.sum(values * values, axis=0) / width + epsilon)
        values *= scale
        gathered += slope * values
        slope *= factor
        slope = scale * (slope - values * (tl.sum(slope * values, axis=0) / width))
        if ADD:
            slope += tl.load(d_total + row * d_total_row + place, mask=inside, other=0.0).to(tl.float32)
        tl.store(dx + row * width + place, slope.to(dx.dtype.element_ty), mask=inside)
    tl.store(d_weight + tl.program_id(0).to(tl.int64) * width + place, gathered, mask=inside)


def forward(
    x: Tensor, residual: Tensor | None, weight: Tensor, epsilon: float, launch: Launch | None = None
) -> tuple[Tensor, Tensor]:
    """See ``reference``: the normed rows ``[..., D]``, and what was normed (x itself without a residual)."""
    rows = rows_of(x)
    added = None if residual is None else rows_of(residual)
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    total = x if added is None else torch.empty_like(y)
    width = x.shape[-1]
    launch = launch or forward_launch(width, x.element_size(), added is not None)
    forward_kernel[(_blocks(rows, launch),)](
        rows,
        added,
        weight,
        y,
        total,
        rows.shape[0],
        width,
        epsilon,
        rows.stride(0),
        0 if added is None else added.stride(0),
        ADD=added is not None,
        STAGES=launch.stages,
        BLOCK=next_power_of_2(width),
        num_warps=launch.warps,
        maxnreg=launch.registers,
    )
    return y, total


def backward(
    dy: Tensor,
    d_total: Tensor | None,
    total: Tensor,
    weight: Tensor,
    epsilon: float,
    launch: Launch | None = None,
) -> tuple[Tensor, Tensor]:
    """Gradients of ``total [..., D]`` (``d_total``, if there is one, added) and of weight ``[D]``."""
    rows, slope = rows_of(total), rows_of(dy)
    straight = None if d_total is None else rows_of(d_total)
    dx = torch.empty_like(total, memory_format=torch.contiguous_format)
    width = total.shape[-1]
    launch = launch or backward_launch(width, total.element_size(), straight is not None)
    blocks = _blocks(rows, launch)
    parts = torch.empty(blocks, width, dtype=torch.float32, device=total.device)
    backward_kernel[(blocks,)](
        slope,
        straight,
        rows,
        weight,
        dx,
        parts,
        rows.shape[0],
        width,
        epsilon,
        slope.stride(0),
        0 if straight is None else straight.stride(0),
        rows.stride(0),
        ADD=straight is not None,
        STAGES=launch.stages,
        BLOCK=next_power_of_2(width),
        num_warps=launch.warps,
        maxnreg=launch.registers,
    )
    d_weight = torch.empty_like(weight, memory_format=torch.contiguous_format)
    column_sums(parts, d_weight)
    return dx, d_weight


def forward_launch(width: int, itemsize: int, add: bool) -> Launch:
    """16 values a thread; as many blocks as registers are for, and three rows under way where they fit."""
    return _launch(width, 4, itemsize * (1 + add))


def backward_launch(width: int, itemsize: int, add: bool) -> Launch:
    """As ``forward_launch``; the weight's gradient takes registers, so that fewer blocks fit."""
    return _launch(width, 3 if itemsize == 2 else 2, itemsize * (2 + add))


@cache
def _launch(width: int, blocks: int, bytes_a_column: int) -> Launch:
    """A launch that has ``blocks`` blocks of 4096 columns at a time on a processor, or as much of others."""
    columns = next_power_of_2(width)
    blocks = max(1, blocks * 4096 // max(512, columns))
    ahead = min(2, _SHARED_BYTES // (blocks * columns * bytes_a_column))
    return Launch(min(16, max(1, columns // 512)), blocks, 1 + ahead)


def _blocks(rows: Tensor, launch: Launch) -> int:
    """Blocks of a launch; how many there are decides the order in which the weight's gradient is summed."""
    if rows.device.type != "cuda":
        return min(rows.shape[0], 4)
    return min(rows.shape[0], processors(rows.device) * launch.blocks)
