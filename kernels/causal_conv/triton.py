"""Causal depthwise convolution, bias and SiLU in one pass each way: inputs are read from memory once.

Neighbouring rows of a tile come from the first-level cache, W times forward. Backward recomputes the sums
before SiLU at the W places that an input feeds into, which costs loads from that cache instead of a buffer in
memory.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from flashtrain.kernels.layout import dense_like

_ROWS, _COLUMNS = 32, 128
_BACKWARD_ROWS = 16


@triton.jit
def load_rows(x, tail, time, column, sequence, width, x_time, TAPS: tl.constexpr, HAS_TAIL: tl.constexpr):  # type: ignore[no-untyped-def]
    """Inputs ``[rows, columns]`` at ``time``, which may lie before the sequence (``tail``, or zeros)."""
    known = (column < width)[None, :]
    inside = (time >= 0) & (time < sequence)
    values = tl.load(
        x + time.to(tl.int64)[:, None] * x_time + column[None, :], mask=inside[:, None] & known, other=0.0
    ).to(tl.float32)
    if HAS_TAIL:
        before = (time < 0) & (time > -TAPS)
        place = (TAPS - 1 + time)[:, None] * width + column[None, :]
        values += tl.load(tail + place, mask=before[:, None] & known, other=0.0).to(tl.float32)
    return values


@triton.jit
def before_silu(  # type: ignore[no-untyped-def]
    x,
    weight,
    bias,
    tail,
    time,
    column,
    sequence,
    width,
    x_time,
    TAPS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_TAIL: tl.constexpr,
):
    """The sums ``bias + Σ weight · x`` at ``time``."""
    total = tl.zeros((time.shape[0], column.shape[0]), dtype=tl.float32)
    if HAS_BIAS:
        total += tl.load(bias + column, mask=column < width, other=0.0).to(tl.float32)[None, :]
    for tap in tl.static_range(TAPS):
        factor = tl.load(weight + column * TAPS + tap, mask=column < width, other=0.0).to(tl.float32)
        rows = load_rows(x, tail, time - (TAPS - 1) + tap, column, sequence, width, x_time, TAPS, HAS_TAIL)
        total += rows * factor[None, :]
    return total


@triton.jit
def forward_kernel(  # type: ignore[no-untyped-def]
    x,
    weight,
    bias,
    tail,
    y,
    sequence,
    width,
    x_batch,
    x_time,
    y_batch,
    y_time,
    TAPS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_TAIL: tl.constexpr,
    BT: tl.constexpr,
    BD: tl.constexpr,
):
    """``BT`` rows and ``BD`` columns of y."""
    batch = tl.program_id(2).to(tl.int64)
    time = tl.program_id(1) * BT + tl.arange(0, BT)
    column = tl.program_id(0) * BD + tl.arange(0, BD)
    if HAS_TAIL:
        tail += batch * (TAPS - 1) * width
    total = before_silu(
        x + batch * x_batch,
        weight,
        bias,
        tail,
        time,
        column,
        sequence,
        width,
        x_time,
        TAPS,
        HAS_BIAS,
        HAS_TAIL,
    )
    place = batch * y_batch + time.to(tl.int64)[:, None] * y_time + column[None, :]
    inside = (time < sequence)[:, None] & (column < width)[None, :]
    tl.store(y + place, (total * tl.sigmoid(total)).to(y.dtype.element_ty), mask=inside)


@triton.jit
def backward_kernel(  # type: ignore[no-untyped-def]
    x,
    weight,
    bias,
    tail,
    dy,
    dx,
    d_tail,
    d_weight,
    d_bias,
    sequence,
    width,
    x_batch,
    x_time,
    dy_batch,
    dy_time,
    dx_batch,
    dx_time,
    TAPS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_TAIL: tl.constexpr,
    BT: tl.constexpr,
    BD: tl.constexpr,
):
    """``BT`` rows of dx (and of the tail's gradient, which lies before row 0); parts of dweight and dbias."""
    batch = tl.program_id(2).to(tl.int64)
    block = tl.program_id(1)
    column = tl.program_id(0) * BD + tl.arange(0, BD)
    known = (column < width)[None, :]
    time = block * BT + tl.arange(0, BT)
    if HAS_TAIL:
        time -= TAPS - 1
        tail += batch * (TAPS - 1) * width
    x += batch * x_batch
    gradient = tl.zeros((BT, BD), dtype=tl.float32)
    parts = (batch * tl.num_programs(1) + block) * width
    for ahead in tl.static_range(TAPS):
        later = time + ahead
        total = before_silu(
            x, weight, bias, tail, later, column, sequence, width, x_time, TAPS, HAS_BIAS, HAS_TAIL
        )
        inside = ((later >= 0) & (later < sequence))[:, None] & known
        place = batch * dy_batch + later.to(tl.int64)[:, None] * dy_time + column[None, :]
        share = tl.sigmoid(total)
        slope = tl.load(dy + place, mask=inside, other=0.0).to(tl.float32)
        slope *= share * (1.0 + total * (1.0 - share))
        tap = TAPS - 1 - ahead
        factor = tl.load(weight + column * TAPS + tap, mask=column < width, other=0.0).to(tl.float32)
        gradient += slope * factor[None, :]
        # Every input meets every tap once, so dweight needs no further loads: x at ``time``, slope later.
        rows = load_rows(x, tail, time, column, sequence, width, x_time, TAPS, HAS_TAIL)
        tl.store(
            d_weight + parts * TAPS + tap * width + column, tl.sum(slope * rows, axis=0), mask=column < width
        )
        if ahead == 0 and HAS_BIAS:
            tl.store(d_bias + parts + column, tl.sum(slope, axis=0), mask=column < width)
    place = batch * dx_batch + time.to(tl.int64)[:, None] * dx_time + column[None, :]
    inside = ((time >= 0) & (time < sequence))[:, None] & known
    tl.store(dx + place, gradient.to(dx.dtype.element_ty), mask=inside)
    if HAS_TAIL:
        place = (batch * (TAPS - 1) + TAPS - 1 + time)[:, None] * width + column[None, :]
        tl.store(d_tail + place, gradient.to(d_tail.dtype.element_ty), mask=(time < 0)[:, None] & known)


def forward(x: Tensor, weight: Tensor, bias: Tensor | None, tail: Tensor | None) -> Tensor:
    """See ``reference.causal_conv``: x ``[B, S, D]`` (any stride but of the last dimension) -> y ``[B, S, D]``."""
    batch, sequence, width = x.shape
    x, y = _columns(x), dense_like(x)
    grid = (triton.cdiv(width, _COLUMNS), triton.cdiv(sequence, _ROWS), batch)
    forward_kernel[grid](
        x,
        weight.contiguous(),
        bias,
        None if tail is None else tail.contiguous(),
        y,
        sequence,
        width,
        *x.stride()[:2],
        *y.stride()[:2],
        TAPS=weight.shape[1],
        HAS_BIAS=bias is not None,
        HAS_TAIL=tail is not None,
        BT=_ROWS,
        BD=_COLUMNS,
        num_warps=4,
    )
    return y


def backward(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, tail: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Gradients of x ``[B, S, D]``, weight, bias and tail, given that of y ``[B, S, D]``."""
    batch, sequence, width = x.shape
    taps = weight.shape[1]
    x, dy, dx = _columns(x), _columns(dy), dense_like(x)
    d_tail = None if tail is None else torch.empty_like(tail, memory_format=torch.contiguous_format)
    blocks = triton.cdiv(sequence + (0 if tail is None else taps - 1), _BACKWARD_ROWS)
    d_weight = x.new_empty(batch, blocks, taps, width, dtype=torch.float32)
    d_bias = x.new_empty(batch, blocks, width, dtype=torch.float32)
    backward_kernel[(triton.cdiv(width, _COLUMNS), blocks, batch)](
        x,
        weight.contiguous(),
        bias,
        None if tail is None else tail.contiguous(),
        dy,
        dx,
        d_tail,
        d_weight,
        d_bias,
        sequence,
        width,
        *x.stride()[:2],
        *dy.stride()[:2],
        *dx.stride()[:2],
        TAPS=taps,
        HAS_BIAS=bias is not None,
        HAS_TAIL=tail is not None,
        BT=_BACKWARD_ROWS,
        BD=_COLUMNS,
        num_warps=4,
    )
    return (
        dx,
        d_weight.sum((0, 1)).t().to(weight.dtype),
        None if bias is None else d_bias.sum((0, 1)).to(bias.dtype),
        d_tail,
    )


def _columns(x: Tensor) -> Tensor:
    return x if x.stride(2) == 1 else x.contiguous()
