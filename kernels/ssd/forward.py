"""Kernel of the outputs: every chunk by itself, given the states at its border."""

import triton.language as tl

from flashtrain.kernels.jit import kernel
from flashtrain.kernels.ssd.decay import LARGEST_EXPONENT


@kernel
def output_kernel(  # type: ignore[no-untyped-def]
    x,
    b,
    c,
    delta,
    total,
    states,
    skip,
    y,
    sequence,
    chunks,
    heads,
    groups,
    x_batch,
    x_time,
    b_batch,
    b_time,
    c_batch,
    c_time,
    y_batch,
    y_time,
    P: tl.constexpr,
    N: tl.constexpr,
    Q: tl.constexpr,
    HEADS: tl.constexpr,
    SKIP: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    """``y`` of ``HEADS`` heads of one group in one chunk.

    y_t = exp(total_t) state C_t + Σ_{s<=t} (C_t·B_s) exp(total_t - total_s) Δ_s x_s + D x_t; the products
    C·Bᵀ are the same for all heads of a group and are formed once.
    """
    chunk = tl.program_id(0)
    first = tl.program_id(1) * HEADS
    batch = tl.program_id(2).to(tl.int64)
    group = first // (heads // groups)
    row = tl.arange(0, Q)
    state_column = tl.arange(0, N)
    width = tl.arange(0, P)
    start = (chunk * Q).to(tl.int64)  # see backward.py for what is 64 and what 32 bits wide
    inside = (start + row < sequence)[:, None]
    state_tile = width[:, None] * N + state_column[None, :]
    b_tile = row[:, None] * b_time + state_column[None, :]
    keys = tl.load(b + batch * b_batch + start * b_time + group * N + b_tile, mask=inside, other=0.0)
    c_tile = row[:, None] * c_time + state_column[None, :]
    queries = tl.load(c + batch * c_batch + start * c_time + group * N + c_tile, mask=inside, other=0.0)
    scores = tl.dot(queries, tl.trans(keys), input_precision=PRECISION)
    scores = tl.where(row[:, None] >= row[None, :], scores, 0.0)
    x += batch * x_batch + start * x_time + first * P
    y += batch * y_batch + start * y_time + first * P
    x_tile = row[:, None] * x_time + width[None, :]
    y_tile = row[:, None] * y_time + width[None, :]
    padded = chunks * Q
    line = (batch * heads + first) * padded + start
    states += ((batch * chunks + chunk) * heads + first) * (P * N)
    for head in tl.range(0, HEADS, num_stages=STAGES):
        inputs = tl.load(x + head * P + x_tile, mask=inside, other=0.0)
        state = tl.load(states + head * (P * N) + state_tile)
        sums = tl.load(total + line + head * padded + row)
        step = tl.load(delta + line + head * padded + row)
        # Above the diagonal the scores are 0, and remain so if only no factor is infinite.
        decay = tl.exp2(tl.minimum(sums[:, None] - sums[None, :], LARGEST_EXPONENT))
        mixing = (scores * decay * step[None, :]).to(x.dtype.element_ty)
        out = tl.dot(queries, tl.trans(state), input_precision=PRECISION) * tl.exp2(sums)[:, None]
        out = tl.dot(mixing, inputs, out, input_precision=PRECISION)
        if SKIP:
            out += inputs.to(tl.float32) * tl.load(skip + first + head).to(tl.float32)
        tl.store(y + head * P + y_tile, out.to(y.dtype.element_ty), mask=inside)
