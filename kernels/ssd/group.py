"""Kernel of what the heads of a group share: the gradients of B and C."""

import triton.language as tl

from flashtrain.kernels.jit import kernel


@kernel
def group_gradient_kernel(  # type: ignore[no-untyped-def]
    x,
    own,
    other,
    states,
    d_states,
    mixed,
    delta,
    total,
    out,
    before,
    through,
    sequence,
    chunks,
    heads,
    groups,
    shares,
    x_batch,
    x_time,
    own_batch,
    own_time,
    other_batch,
    other_time,
    out_batch,
    out_time,
    P: tl.constexpr,
    N: tl.constexpr,
    Q: tl.constexpr,
    OF_B: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    """dB or dC of one group in one chunk: a sum over the group's heads in one order.

        dB_s = Σ_h e_s Δ_s dSᵀ x_s + Σ_t mixed_st C_t       x; own B; other C
        dC_t = Σ_h exp(total_t) Sᵀ dy_t + Σ_s mixed_st B_s  dy; own C; other B

    ``states`` S are those before chunks, ``d_states`` dS the gradients of those after.

    ``mixed`` ``[B, chunks, shares, Q, Q]`` holds ``shares / groups`` parts of a group's sum over heads; it
    is read transposed for dC, since no operand may be transposed in registers (see ``backward.py``). With dC
    come the paths of the decay that begin before the chunk: ``before`` those that end in it, ``through``
    those that do not, ``exp(total_Q) <S, dS>``.
    """
    chunk = tl.program_id(0)
    group = tl.program_id(1)
    batch = tl.program_id(2).to(tl.int64)
    per_group = heads // groups
    first = group * per_group
    row = tl.arange(0, Q)
    column = tl.arange(0, N)
    width = tl.arange(0, P)
    start = (chunk * Q).to(tl.int64)  # see backward.py for what is 64 and what 32 bits wide
    inside = (start + row < sequence)[:, None]
    x += batch * x_batch + start * x_time + first * P
    x_tile = row[:, None] * x_time + width[None, :]
    own += batch * own_batch + start * own_time + group * N
    own_rows = tl.load(own + row[:, None] * own_time + column[None, :], mask=inside, other=0.0)
    padded = chunks * Q
    line = (batch * heads + first) * padded + start
    per_head = (batch * chunks + chunk) * heads + first
    states += per_head * (P * N)
    d_states += per_head * (P * N)
    state_tile = width[:, None] * N + column[None, :]
    gradient = tl.zeros((Q, N), dtype=tl.float32)
    for head in tl.range(0, per_group, num_stages=STAGES):
        inputs = tl.load(x + head * P + x_tile, mask=inside, other=0.0)
        here = line + head * padded
        sums = tl.load(total + here + row)
        last = tl.load(total + here + (Q - 1))
        d_state = tl.load(d_states + head * (P * N) + state_tile)
        if OF_B:
            weight = tl.exp2(last - sums) * tl.load(delta + here + row)
            weighted = (inputs.to(tl.float32) * weight[:, None]).to(x.dtype.element_ty)
            gradient = tl.dot(weighted, d_state, gradient, input_precision=PRECISION)
        else:
            state = tl.load(states + head * (P * N) + state_tile)
            across = tl.sum(tl.sum(state.to(tl.float32) * d_state.to(tl.float32), axis=1), axis=0)
            tl.store(through + per_head + head, across * tl.exp2(last))
            arriving = tl.dot(inputs, state, input_precision=PRECISION) * tl.exp2(sums)[:, None]
            tl.store(before + here + row, tl.sum(arriving * own_rows.to(tl.float32), axis=1))
            gradient += arriving

    other += batch * other_batch + start * other_time + group * N
    other_rows = tl.load(other + row[:, None] * other_time + column[None, :], mask=inside, other=0.0)
    square = row[:, None] * Q + row[None, :] if OF_B else row[None, :] * Q + row[:, None]
    parts = shares // groups
    mixed += ((batch * chunks + chunk) * shares + group * parts) * (Q * Q)
    for part in range(parts):
        square_part = tl.load(mixed + part * (Q * Q) + square)
        gradient = tl.dot(square_part, other_rows, gradient, input_precision=PRECISION)
    out += batch * out_batch + start * out_time + group * N
    out_tile = row[:, None] * out_time + column[None, :]
    tl.store(out + out_tile, gradient.to(out.dtype.element_ty), mask=inside)
