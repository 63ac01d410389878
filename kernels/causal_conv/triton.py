"""Causal depthwise convolution, bias and SiLU in one pass each way.

Forward, the W inputs of a place come from the first-level cache all but once. Backward recomputes the sums
before SiLU, walks along time, and reads every input and every slope once.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from flashtrain.kernels.column_sums import column_sums
from flashtrain.kernels.jit import kernel
from flashtrain.kernels.layout import dense_like
from flashtrain.kernels.sizes import cdiv

_ROWS, _COLUMNS = 32, 128
_BACKWARD_ROWS, _BACKWARD_COLUMNS = 64, 256


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


@kernel
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
def taps_of(weight, column, inside, TAPS: tl.constexpr, BACK: tl.constexpr):  # type: ignore[no-untyped-def]
    """The factors of the input ``BACK`` places before the newest, zero where there are fewer taps."""
    if BACK < TAPS:
        return tl.load(weight + column * TAPS + (TAPS - 1 - BACK), mask=inside, other=0.0).to(tl.float32)
    else:
        return tl.zeros((column.shape[0],), dtype=tl.float32)


@triton.jit
def input_at(  # type: ignore[no-untyped-def]
    x, tail, time, column, inside, sequence, width, x_time, TAPS: tl.constexpr, HAS_TAIL: tl.constexpr
):
    """Inputs at one ``time``, from ``tail`` (or zeros) before the sequence and zeros after it."""
    here = inside & (time >= 0) & (time < sequence)
    values = tl.load(x + time.to(tl.int64) * x_time + column, mask=here, other=0.0).to(tl.float32)
    if HAS_TAIL:
        before = inside & (time < 0) & (time > -TAPS)
        values += tl.load(tail + (TAPS - 1 + time) * width + column, mask=before, other=0.0).to(tl.float32)
    return values


@kernel
def backward_kernel(  # type: ignore[no-untyped-def]
    x,
    weight,
    bias,
    tail,
    dy,
    dx,
    d_tail,
    sums,
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
    """``BT`` rows of dx in order of time, block 0 also the tail's gradient; ``sums`` has parts of
    dweight, tap by tap, and of dbias.

    A thread keeps its columns: the last three inputs and slopes are in registers, every row is read once, and
    nothing is added across threads. Rows are loaded two steps ahead, since a load may not pass a store.
    """
    batch = tl.program_id(2).to(tl.int64)
    block = tl.program_id(1)
    column = tl.program_id(0) * BD + tl.arange(0, BD)
    inside = column < width
    x += batch * x_batch
    dy += batch * dy_batch
    dx += batch * dx_batch
    if HAS_TAIL:
        tail += batch * (TAPS - 1) * width
        d_tail += batch * (TAPS - 1) * width
    w0 = taps_of(weight, column, inside, TAPS, 0)
    w1 = taps_of(weight, column, inside, TAPS, 1)
    w2 = taps_of(weight, column, inside, TAPS, 2)
    w3 = taps_of(weight, column, inside, TAPS, 3)
    offset = tl.zeros((BD,), dtype=tl.float32)
    if HAS_BIAS:
        offset += tl.load(bias + column, mask=inside, other=0.0).to(tl.float32)
    begin = block * BT
    x3 = input_at(x, tail, begin - 3, column, inside, sequence, width, x_time, TAPS, HAS_TAIL)
    x2 = input_at(x, tail, begin - 2, column, inside, sequence, width, x_time, TAPS, HAS_TAIL)
    x1 = input_at(x, tail, begin - 1, column, inside, sequence, width, x_time, TAPS, HAS_TAIL)
    # A value of its own each: of names that begin as one value and hand it on in turn, Triton takes all but
    # one for constants of the loop.
    g1 = tl.zeros((BD,), dtype=tl.float32)
    g2 = tl.zeros((BD,), dtype=tl.float32)
    g3 = tl.zeros((BD,), dtype=tl.float32)
    dw0, dw1, dw2, dw3, db = g1, g1, g1, g1, g1
    xa = input_at(x, tail, begin, column, inside, sequence, width, x_time, TAPS, False)
    xb = input_at(x, tail, begin + 1, column, inside, sequence, width, x_time, TAPS, False)
    ya = input_at(dy, tail, begin, column, inside, sequence, width, dy_time, TAPS, False)
    yb = input_at(dy, tail, begin + 1, column, inside, sequence, width, dy_time, TAPS, False)
    for step in tl.range(0, BT + 3, loop_unroll_factor=4):
        time = begin + step
        x0, slope = xa, ya
        xa, ya = xb, yb
        xb = input_at(x, tail, time + 2, column, inside, sequence, width, x_time, TAPS, False)
        yb = input_at(dy, tail, time + 2, column, inside, sequence, width, dy_time, TAPS, False)
        total = offset + w3 * x3 + w2 * x2 + w1 * x1 + w0 * x0
        share = tl.sigmoid(total)
        g0 = slope * share * (1.0 + total * (1.0 - share))
        if step < BT:  # the three rows that follow belong to the next block
            db += g0
            dw0 += g0 * x0
            dw1 += g0 * x1
            dw2 += g0 * x2
            dw3 += g0 * x3
        gradient = w3 * g0 + w2 * g1 + w1 * g2 + w0 * g3
        row = time - 3
        here = inside & (step >= 3) & (row < sequence)
        tl.store(dx + row.to(tl.int64) * dx_time + column, gradient.to(dx.dtype.element_ty), mask=here)
        if HAS_TAIL:
            here = inside & (row < 0) & (row > -TAPS)
            place = (TAPS - 1 + row) * width + column
            tl.store(d_tail + place, gradient.to(d_tail.dtype.element_ty), mask=here)
        x3, x2, x1 = x2, x1, x0
        g3, g2, g1 = g2, g1, g0
    sums += (batch * tl.num_programs(1) + block) * width * (TAPS + HAS_BIAS) + column
    tl.store(sums + (TAPS - 1) * width, dw0, mask=inside)
    if TAPS > 1:
        tl.store(sums + (TAPS - 2) * width, dw1, mask=inside)
    if TAPS > 2:
        tl.store(sums + (TAPS - 3) * width, dw2, mask=inside)
    if TAPS > 3:
        tl.store(sums, dw3, mask=inside)
    if HAS_BIAS:
        tl.store(sums + TAPS * width, db, mask=inside)


def forward(x: Tensor, weight: Tensor, bias: Tensor | None, tail: Tensor | None) -> Tensor:
    """See ``reference.causal_conv``: x ``[B, S, D]``, of any strides -> y ``[B, S, D]``."""
    batch, sequence, width = x.shape
    x, y = _columns(x), dense_like(x)
    grid = (cdiv(width, _COLUMNS), cdiv(sequence, _ROWS), batch)
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
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    tail: Tensor | None,
    dx: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Gradients of x ``[B, S, D]``, weight, bias and tail, given that of y ``[B, S, D]``.

    That of x goes to ``dx`` if there is one, which has a dense last dimension.
    """
    batch, sequence, width = x.shape
    taps = weight.shape[1]
    x, dy, dx = _columns(x), _columns(dy), dense_like(x) if dx is None else dx
    d_tail = None if tail is None else torch.empty_like(tail, memory_format=torch.contiguous_format)
    blocks = cdiv(sequence, _BACKWARD_ROWS)
    sums = x.new_empty(batch, blocks, taps + (bias is not None), width, dtype=torch.float32)
    backward_kernel[(cdiv(width, _BACKWARD_COLUMNS), blocks, batch)](
        x,
        weight.contiguous(),
        bias,
        None if tail is None else tail.contiguous(),
        dy,
        dx,
        d_tail,
        sums,
        sequence,
        width,
        *x.stride()[:2],
        *dy.stride()[:2],
        *dx.stride()[:2],
        TAPS=taps,
        HAS_BIAS=bias is not None,
        HAS_TAIL=tail is not None,
        BT=_BACKWARD_ROWS,
        BD=_BACKWARD_COLUMNS,
        num_warps=4,
    )
    d_weight = weight.new_empty(taps, width)
    d_bias = None if bias is None else bias.new_empty(width)
    column_sums(sums, d_weight, *(() if d_bias is None else (d_bias,)))
    return dx, d_weight.t(), d_bias, d_tail


def _columns(x: Tensor) -> Tensor:
    return x if x.stride(2) == 1 else x.contiguous()
