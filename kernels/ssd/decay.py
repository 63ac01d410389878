"""Kernels of the step sizes: their softplus, their running sums over a chunk, and the way back.

Tensors of the kernels are head-major and padded to whole chunks, ``[B, H, chunks · Q]``, so that a kernel
that works on one head reads its chunk without gaps and without masks. Filler has step size 0, which neither
decays nor adds. Sums are in units of log2, because the hardware has 2**x and nothing else.
"""

import triton
import triton.language as tl

from flashtrain.kernels.jit import kernel

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
# A decay over negative time must be finite, so that a zero beside it makes it zero.
LARGEST_EXPONENT = tl.constexpr(126.0)


@triton.jit
def softplus(x):  # type: ignore[no-untyped-def]
    # log(1 + exp(x)); above 20 it is x to fp32, and exp would run over from 88 on.
    return tl.where(x > 20.0, x, tl.log2(1.0 + tl.exp2(tl.minimum(x, 20.0) * LOG2E)) * LN2)


@kernel
def decay_kernel(  # type: ignore[no-untyped-def]
    raw,
    bias,
    rate,
    delta,
    total,
    sequence,
    padded,
    heads,
    raw_batch,
    raw_time,
    Q: tl.constexpr,
    BH: tl.constexpr,
    SOFTPLUS: tl.constexpr,
):
    """``delta`` = Δ and ``total`` = inclusive sum of Δ A log2(e) within the chunk, of ``BH`` heads."""
    chunk = tl.program_id(0)
    batch = tl.program_id(2).to(tl.int64)
    time = chunk * Q + tl.arange(0, Q)
    head = tl.program_id(1) * BH + tl.arange(0, BH)
    inside = (time < sequence)[:, None] & (head < heads)[None, :]
    step = tl.load(
        raw + batch * raw_batch + time.to(tl.int64)[:, None] * raw_time + head[None, :],
        mask=inside,
        other=0.0,
    ).to(tl.float32)
    if SOFTPLUS:
        step = softplus(step + tl.load(bias + head, mask=head < heads, other=0.0).to(tl.float32)[None, :])
    step = tl.where(inside, step, 0.0)
    a = tl.load(rate + head, mask=head < heads, other=0.0).to(tl.float32)
    place = (batch * heads + head)[None, :] * padded + time[:, None]
    tl.store(delta + place, step, mask=(head < heads)[None, :])
    tl.store(total + place, tl.cumsum(step * (a * LOG2E)[None, :], axis=0), mask=(head < heads)[None, :])


@kernel
def decay_backward_kernel(  # type: ignore[no-untyped-def]
    raw,
    bias,
    rate,
    delta,
    at_read,
    before,
    at_write,
    within,
    through,
    d_out_x,
    d_raw,
    sums,
    sequence,
    padded,
    heads,
    chunks,
    raw_batch,
    raw_time,
    out_batch,
    out_time,
    Q: tl.constexpr,
    BH: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    SKIP: tl.constexpr,
):
    """Gradients of the raw steps, and ``sums`` of those of A, the bias and D, from sums over paths.

    The log decay of step t lies on every path from a write before t to a read at or after t, so its gradient
    is the sum over these paths. ``at_read`` holds at τ the paths inside the chunk that end there less those
    that begin there, ``before`` those from earlier chunks that end there, ``at_write`` times Δ those that
    begin there and leave the chunk, ``through`` those that cross all of it; ``within`` plus ``at_write`` is
    the gradient of Δ as a factor of x. Sums stay inside the chunk: no error grows with the sequence.
    """
    chunk = tl.program_id(0)
    batch = tl.program_id(2).to(tl.int64)
    time = chunk * Q + tl.arange(0, Q)
    head = tl.program_id(1) * BH + tl.arange(0, BH)
    known = (head < heads)[None, :]
    inside = (time < sequence)[:, None] & known
    place = (batch * heads + head)[None, :] * padded + time[:, None]
    step = tl.load(delta + place, mask=known, other=0.0)
    reads = tl.load(at_read + place, mask=known, other=0.0)
    reads += tl.load(before + place, mask=known, other=0.0)
    leaving = tl.load(at_write + place, mask=known, other=0.0)
    crossing = tl.load(through + (batch * chunks + chunk) * heads + head, mask=head < heads, other=0.0)
    writes = step * leaving
    d_log = tl.cumsum(reads, axis=0, reverse=True) + tl.cumsum(writes, axis=0) - writes + crossing[None, :]
    a = tl.load(rate + head, mask=head < heads, other=0.0).to(tl.float32)
    d_step = tl.load(within + place, mask=known, other=0.0) + leaving + a[None, :] * d_log
    if SOFTPLUS:
        x = tl.load(
            raw + batch * raw_batch + time.to(tl.int64)[:, None] * raw_time + head[None, :],
            mask=inside,
            other=0.0,
        ).to(tl.float32)
        x += tl.load(bias + head, mask=head < heads, other=0.0).to(tl.float32)[None, :]
        d_step *= tl.sigmoid(x)
    d_step = tl.where(inside, d_step, 0.0)
    tl.store(
        d_raw + batch * out_batch + time.to(tl.int64)[:, None] * out_time + head[None, :],
        d_step.to(d_raw.dtype.element_ty),
        mask=inside,
    )
    sums += (batch * chunks + chunk) * (3 * heads) + head
    tl.store(sums, tl.sum(d_log * step, axis=0), mask=head < heads)
    tl.store(sums + heads, tl.sum(d_step, axis=0), mask=head < heads)
    if SKIP:
        products = tl.load(d_out_x + place, mask=known, other=0.0)
        tl.store(sums + 2 * heads, tl.sum(products, axis=0), mask=head < heads)
