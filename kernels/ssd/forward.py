"""Kernel of the outputs: every chunk by itself, given the states at its border."""

import triton
import triton.language as tl


@triton.jit
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

    y_t = exp(total_t) state C_t + Σ_{s<=t} (C_t·B_s) exp(total_t - total_s) Δ_s x_s + D x_t; the products C·Bᵀ
    are the same for all heads of a group and are formed once.
    """
    chunk = tl.program_id(0)
    first = tl.program_id(1) * HEADS
    batch = tl.program_id(2).to(tl.int64)
    group = first // (heads // groups)
    row = tl.arange(0, Q)
    state_column = tl.arange(0, N)
    width = tl.arange(0, P)
    time = chunk * Q + row
    inside = (time < sequence)[:, None]
    at = time.to(tl.int64)[:, None]
    keys = tl.load(b + batch * b_batch + at * b_time + group * N + state_column[None, :], mask=inside, other=0.0)
    queries = tl.load(
        c + batch * c_batch + at * c_time + group * N + state_column[None, :], mask=inside, other=0.0
    )
    scores = tl.dot(queries, tl.trans(keys), input_precision=PRECISION)
    causal = row[:, None] >= row[None, :]
    x += batch * x_batch + at * x_time + first * P + width[None, :]
    y += batch * y_batch + at * y_time + first * P + width[None, :]
    line = (batch * heads + first) * (chunks * Q) + time
    border = ((batch * chunks + chunk) * heads + first) * (P * N)
    states += border + width[:, None] * N + state_column[None, :]
    for head in tl.range(0, HEADS, num_stages=STAGES):
        inputs = tl.load(x + head * P, mask=inside, other=0.0)
        state = tl.load(states + head * (P * N))
        sums = tl.load(total + line + head * (chunks * Q))
        step = tl.load(delta + line + head * (chunks * Q))
        decay = tl.exp2(tl.where(causal, sums[:, None] - sums[None, :], float("-inf")))
        mixing = (scores * decay * step[None, :]).to(x.dtype.element_ty)
        out = tl.dot(queries, tl.trans(state), input_precision=PRECISION) * tl.exp2(sums)[:, None]
        out = tl.dot(mixing, inputs, out, input_precision=PRECISION)
        if SKIP:
            out += inputs.to(tl.float32) * tl.load(skip + first + head).to(tl.float32)
        tl.store(y + head * P, out.to(y.dtype.element_ty), mask=inside)
