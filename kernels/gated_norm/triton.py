"""Gate and RMSNorm in one pass each way; nothing is kept between the passes but the inputs."""

import torch
import triton.language as tl
from torch import Tensor

from flashtrain.kernels.column_sums import column_sums
from flashtrain.kernels.jit import kernel
from flashtrain.kernels.layout import rows_of
from flashtrain.kernels.sizes import next_power_of_2, processors

_BLOCKS_PER_PROCESSOR = 4


@kernel
def forward_kernel(  # type: ignore[no-untyped-def]
    x, z, weight, y, size, groups, epsilon, x_row, z_row, BLOCK: tl.constexpr
):
    """One group of one row of ``y``."""
    row = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1)
    place = tl.arange(0, BLOCK)
    inside = place < size
    column = group * size + place
    values = tl.load(x + row * x_row + column, mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(z + row * z_row + column, mask=inside, other=0.0).to(tl.float32)
    values *= gate * tl.sigmoid(gate)
    values *= tl.rsqrt(tl.sum(values * values, axis=0) / size + epsilon)
    values *= tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + row * (groups * size) + column, values.to(y.dtype.element_ty), mask=inside)


@kernel
def backward_kernel(  # type: ignore[no-untyped-def]
    x,
    z,
    weight,
    dy,
    dx,
    dz,
    d_weight,
    rows,
    size,
    groups,
    epsilon,
    x_row,
    z_row,
    dy_row,
    dz_row,
    BLOCK: tl.constexpr,
):
    """Every num_programs-th row of one group: dx, dz, and the block's part of dweight in one order."""
    group = tl.program_id(1)
    blocks = tl.num_programs(0)
    place = tl.arange(0, BLOCK)
    inside = place < size
    column = group * size + place
    factor = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    x += column
    z += column
    dy += column
    row = tl.program_id(0).to(tl.int64)
    next_values = tl.load(x + row * x_row, mask=inside, other=0.0)
    next_gate = tl.load(z + row * z_row, mask=inside, other=0.0)
    next_slope = tl.load(dy + row * dy_row, mask=inside, other=0.0)
    for index in range(tl.program_id(0), rows, blocks):
        row = tl.cast(index, tl.int64)
        values, gate, slope = next_values.to(tl.float32), next_gate.to(tl.float32), next_slope.to(tl.float32)
        # A row ahead: a load may not pass the stores below.
        later = inside & (row + blocks < rows)
        next_values = tl.load(x + (row + blocks) * x_row, mask=later, other=0.0)
        next_gate = tl.load(z + (row + blocks) * z_row, mask=later, other=0.0)
        next_slope = tl.load(dy + (row + blocks) * dy_row, mask=later, other=0.0)
        share = tl.sigmoid(gate)
        opened = gate * share
        gated = values * opened
        scale = tl.rsqrt(tl.sum(gated * gated, axis=0) / size + epsilon)
        normal = gated * scale
        total += slope * normal
        slope *= factor
        slope = scale * (slope - normal * (tl.sum(slope * normal, axis=0) / size))
        out = row * (groups * size) + column
        tl.store(dx + out, (slope * opened).to(dx.dtype.element_ty), mask=inside)
        d_gate = slope * values * share * (1.0 + gate * (1.0 - share))
        tl.store(dz + row * dz_row + column, d_gate.to(dz.dtype.element_ty), mask=inside)
    tl.store(d_weight + tl.program_id(0) * (groups * size) + column, total, mask=inside)


def forward(x: Tensor, z: Tensor, weight: Tensor, groups: int, epsilon: float) -> Tensor:
    """See ``reference.gated_norm``: x and z ``[..., D]`` -> ``[..., D]``."""
    flat, gate = rows_of(x), rows_of(z)
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    size = x.shape[-1] // groups
    forward_kernel[(flat.shape[0], groups)](
        flat,
        gate,
        weight,
        y,
        size,
        groups,
        epsilon,
        flat.stride(0),
        gate.stride(0),
        BLOCK=next_power_of_2(size),
        num_warps=_warps(size),
    )
    return y


def backward(
    dy: Tensor,
    x: Tensor,
    z: Tensor,
    weight: Tensor,
    groups: int,
    epsilon: float,
    dz: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x and z ``[..., D]`` and of weight ``[D]``.

    That of z goes to ``dz`` if there is one, in which rows may lie apart.
    """
    flat, gate, slope = rows_of(x), rows_of(z), rows_of(dy)
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    dz = torch.empty_like(z, memory_format=torch.contiguous_format) if dz is None else dz
    size = x.shape[-1] // groups
    blocks = min(flat.shape[0], _blocks(x.device))
    parts = torch.empty(blocks, x.shape[-1], dtype=torch.float32, device=x.device)
    backward_kernel[(blocks, groups)](
        flat,
        gate,
        weight,
        slope,
        dx,
        dz,
        parts,
        flat.shape[0],
        size,
        groups,
        epsilon,
        flat.stride(0),
        gate.stride(0),
        slope.stride(0),
        dz.view(flat.shape).stride(0),
        BLOCK=next_power_of_2(size),
        num_warps=_warps(size),
    )
    d_weight = torch.empty_like(weight, memory_format=torch.contiguous_format)
    column_sums(parts, d_weight)
    return dx, dz, d_weight


def _warps(size: int) -> int:
    return min(16, max(1, next_power_of_2(size) // 512))


def _blocks(device: torch.device) -> int:
    if device.type != "cuda":
        return 4
    return _BLOCKS_PER_PROCESSOR * processors(device)
