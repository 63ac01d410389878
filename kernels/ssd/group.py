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
    start = (chunk * Q).to(tl.int64)  # see backward.py for what is 64 and what 32 bits wide
    inside = (start + row < sequence)[:, None]
    x += batch * x_batch + start * x_time + first * P
    x_tile = row[:, None] * x_time + width[None, :]
    padded = chunks * Q
    line = (batch * heads + first) * padded + start
    states += ((batch * chunks + chunk) * heads + first) * (P * N)
    state_tile = width[:, None] * N + column[None, :]
    total_gradient = tl.zeros((Q, BN), dtype=tl.float32)
    for head in tl.range(0, per_group, num_stages=STAGES):
        inputs = tl.load(x + head * P + x_tile, mask=inside, other=0.0)
        state = tl.load(states + head * (P * N) + state_tile)
        here = line + head * padded
        sums = tl.load(total + here + row)
        if OF_B:
            step = tl.load(delta + here + row)
            weight = tl.exp2(tl.load(total + here + (Q - 1)) - sums) * step
        else:
            weight = tl.exp2(sums)
        weighted = (inputs.to(tl.float32) * weight[:, None]).to(x.dtype.element_ty)
        total_gradient = tl.dot(weighted, state, total_gradient, input_precision=PRECISION)

    other += batch * other_batch + start * other_time + group * N
    rows = tl.load(other + row[:, None] * other_time + column[None, :], mask=inside, other=0.0)
    if OF_B:
        square = row[:, None] * Q + row[None, :]
    else:
        square = row[None, :] * Q + row[:, None]
    parts = shares // groups
    mixed += ((batch * chunks + chunk) * shares + group * parts) * (Q * Q)
    for part in range(parts):
        total_gradient = tl.dot(
            tl.load(mixed + part * (Q * Q) + square), rows, total_gradient, input_precision=PRECISION
        )
    out += ((batch * sequence + start) * groups + group) * N
    tl.store(
        out + row[:, None] * (groups * N) + column[None, :],
        total_gradient.to(out.dtype.element_ty),
        mask=inside,
    )
