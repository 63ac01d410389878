"""Kernel of what the heads of a group share: the gradients of B and C."""

import triton
import triton.language as tl


@triton.jit
def group_gradient_kernel(  # type: ignore[no-untyped-def]
    x,
    other,
    states,
    mixed,
    delta,
    total,
    out,
    sequence,
    chunks,
    heads,
    groups,
    shares,
    x_batch,
    x_time,
    other_batch,
    other_time,
    P: tl.constexpr,
    N: tl.constexpr,
    BN: tl.constexpr,
    Q: tl.constexpr,
    OF_B: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    """``BN`` columns of dB or dC of one group in one chunk: a sum over the group's heads in one order.

        dB_s = Σ_h e_s Δ_s dSᵀ x_s + Σ_t mixed_st C_t       from x, C, the gradients of the states after chunks
        dC_t = Σ_h exp(total_t) Sᵀ dy_t + Σ_s mixed_st B_s  from dy, B, the states before chunks

    ``mixed`` ``[B, chunks, shares, Q, Q]`` holds ``shares / groups`` parts of a group's sum over heads; it is
    read transposed for dC, since no operand may be transposed in registers (see ``backward.py``).
    """
    chunk = tl.program_id(0)
    column = tl.program_id(1) * BN + tl.arange(0, BN)
    batch = tl.program_id(2).to(tl.int64) // groups
    group = tl.program_id(2) % groups
    per_group = heads // groups
    first = group * per_group
    row = tl.arange(0, Q)
    width = tl.arange(0, P)
    time = chunk * Q + row
    inside = (time < sequence)[:, None]
    at = time.to(tl.int64)[:, None]
    x += batch * x_batch + at * x_time + first * P + width[None, :]
    line = (batch * heads + first) * (chunks * Q) + time
    last_place = (batch * heads + first) * (chunks * Q) + chunk * Q + Q - 1
    states += ((batch * chunks + chunk) * heads + first) * (P * N) + width[:, None] * N + column[None, :]
    total_gradient = tl.zeros((Q, BN), dtype=tl.float32)
    for head in tl.range(0, per_group, num_stages=STAGES):
        inputs = tl.load(x + head * P, mask=inside, other=0.0)
        state = tl.load(states + head * (P * N))
        sums = tl.load(total + line + head * (chunks * Q))
        if OF_B:
            step = tl.load(delta + line + head * (chunks * Q))
            weight = tl.exp2(tl.load(total + last_place + head * (chunks * Q)) - sums) * step
        else:
            weight = tl.exp2(sums)
        weighted = (inputs.to(tl.float32) * weight[:, None]).to(x.dtype.element_ty)
        total_gradient = tl.dot(weighted, state, total_gradient, input_precision=PRECISION)

    rows = tl.load(
        other + batch * other_batch + at * other_time + group * N + column[None, :], mask=inside, other=0.0
    )
    if OF_B:
        square = row[:, None] * Q + row[None, :]
    else:
        square = row[None, :] * Q + row[:, None]
    parts = shares // groups
    mixed += ((batch * chunks + chunk) * shares + group * parts) * (Q * Q) + square
    for part in range(parts):
        total_gradient = tl.dot(
            tl.load(mixed + part * (Q * Q)), rows, total_gradient, input_precision=PRECISION
        )
    place = ((batch * sequence + at) * groups + group) * N + column[None, :]
    tl.store(out + place, total_gradient.to(out.dtype.element_ty), mask=inside)
