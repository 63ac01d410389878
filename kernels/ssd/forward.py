"""Kernel of the outputs: every chunk by itself, given the states at its border."""

import triton
import triton.language as tl


@triton.jit
def rows_of_heads(  # type: ignore[no-untyped-def]
    x,
    b,
    c,
    delta,
    total,
    states,
    skip,
    y,
    begin,
    sequence,
    padded,
    x_time,
    b_time,
    c_time,
    y_time,
    P: tl.constexpr,
    N: tl.constexpr,
    R: tl.constexpr,
    HEADS: tl.constexpr,
    LATER: tl.constexpr,
    SKIP: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    """``R`` rows of ``HEADS`` heads, all pointers at row ``begin``; LATER: R rows of their chunk lie before."""
    row = tl.arange(0, R)
    column = tl.arange(0, N)
    width = tl.arange(0, P)
    inside = (begin + row < sequence)[:, None]
    queries = tl.load(c + row[:, None] * c_time + column[None, :], mask=inside, other=0.0)
    b_tile = row[:, None] * b_time + column[None, :]
    scores = tl.dot(queries, tl.trans(tl.load(b + b_tile, mask=inside, other=0.0)), input_precision=PRECISION)
    if LATER:
        earlier_scores = tl.dot(
            queries, tl.trans(tl.load(b - R * b_time + b_tile)), input_precision=PRECISION
        )
    causal = row[:, None] >= row[None, :]
    x_tile = row[:, None] * x_time + width[None, :]
    y_tile = row[:, None] * y_time + width[None, :]
    state_tile = width[:, None] * N + column[None, :]
    for head in tl.range(0, HEADS, num_stages=STAGES):
        inputs = tl.load(x + head * P + x_tile, mask=inside, other=0.0)
        state = tl.load(states + head * (P * N) + state_tile)
        here = head * padded
        sums = tl.load(total + here + row)
        step = tl.load(delta + here + row)
        out = tl.dot(queries, tl.trans(state), input_precision=PRECISION) * tl.exp2(sums)[:, None]
        if LATER:
            # Both factors of the decay are at most 1 when it is cut at the border between the rows.
            border = tl.load(total + here - 1)
            weight = tl.exp2(border - tl.load(total + here - R + row)) * tl.load(delta + here - R + row)
            mixing = earlier_scores * tl.exp2(sums - border)[:, None] * weight[None, :]
            earlier = tl.load(x - R * x_time + head * P + x_tile)
            out = tl.dot(mixing.to(x.dtype.element_ty), earlier, out, input_precision=PRECISION)
        decay = tl.exp2(tl.where(causal, sums[:, None] - sums[None, :], float("-inf")))
        mixing = scores * decay * step[None, :]
        out = tl.dot(mixing.to(x.dtype.element_ty), inputs, out, input_precision=PRECISION)
        if SKIP:
            out += inputs.to(tl.float32) * tl.load(skip + head).to(tl.float32)
        tl.store(y + head * P + y_tile, out.to(y.dtype.element_ty), mask=inside)


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
    R: tl.constexpr,
    HEADS: tl.constexpr,
    SKIP: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    """``y`` of ``HEADS`` heads of one group in ``R`` rows, which are a chunk or half of one.

    y_t = exp(total_t) state C_t + Σ_{s<=t} (C_t·B_s) exp(total_t - total_s) Δ_s x_s + D x_t; the products
    C·Bᵀ are the same for all heads of a group and are formed once.
    """
    block = tl.program_id(0)
    first = tl.program_id(1) * HEADS
    batch = tl.program_id(2).to(tl.int64)
    group = first // (heads // groups)
    begin = (block * R).to(tl.int64)  # see backward.py for what is 64 and what 32 bits wide
    chunk = block // (Q // R)
    padded = chunks * Q
    x += batch * x_batch + begin * x_time + first * P
    b += batch * b_batch + begin * b_time + group * N
    c += batch * c_batch + begin * c_time + group * N
    y += batch * y_batch + begin * y_time + first * P
    delta += (batch * heads + first) * padded + begin
    total += (batch * heads + first) * padded + begin
    states += ((batch * chunks + chunk) * heads + first) * (P * N)
    if SKIP:
        skip += first
    if (R < Q) & (block % (Q // R) > 0):
        rows_of_heads(
            x,
            b,
            c,
            delta,
            total,
            states,
            skip,
            y,
            begin,
            sequence,
            padded,
            x_time,
            b_time,
            c_time,
            y_time,
            P,
            N,
            R,
            HEADS,
            True,
            SKIP,
            PRECISION,
            STAGES,
        )
    else:
        rows_of_heads(
            x,
            b,
            c,
            delta,
            total,
            states,
            skip,
            y,
            begin,
            sequence,
            padded,
            x_time,
            b_time,
            c_time,
            y_time,
            P,
            N,
            R,
            HEADS,
            False,
            SKIP,
            PRECISION,
            STAGES,
        )
