"""Kernel of the gradients: every chunk by itself, given states and gradients of states at its borders."""

import triton.language as tl

from flashtrain.kernels.jit import kernel
from flashtrain.kernels.ssd.decay import LARGEST_EXPONENT


@kernel
def inputs_gradient_kernel(  # type: ignore[no-untyped-def]
    x,
    b,
    c,
    dy,
    delta,
    total,
    d_states,
    skip,
    dx,
    mixed,
    at_read,
    at_write,
    within,
    d_skip,
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
    dy_batch,
    dy_time,
    dx_batch,
    dx_time,
    P: tl.constexpr,
    N: tl.constexpr,
    Q: tl.constexpr,
    HEADS: tl.constexpr,
    SKIP: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    """dx, parts of dΔ and the products that dB and dC share, of ``HEADS`` heads of one group in one chunk.

    With ``L_ts = exp(total_t - total_s)`` for s <= t, dS the gradient of the state after the chunk, and
    ``e_s = exp(total_Q - total_s)``:

        dx_s     = Δ_s (Σ_t (C_t·B_s) L_ts dy_t + e_s dS B_s) + D dy_s
        mixed_st = L_ts Δ_s (dy_t·x_s), summed over the heads: ``[B, chunks, H/HEADS, Q, Q]``

    Square tiles are ``[s, t]``, so that none is transposed in registers: Triton 3.4 to 3.7.0 miscompiles
    products with such an operand on Hopper (flash-linear-attention#640). See ``decay.decay_backward_kernel``
    for ``at_read``, ``at_write`` and ``within``;
    ``d_skip`` holds dy_t·x_t.
    """
    chunk = tl.program_id(0)
    share = tl.program_id(1)
    batch = tl.program_id(2).to(tl.int64)
    first = share * HEADS
    group = first // (heads // groups)
    row = tl.arange(0, Q)
    state_column = tl.arange(0, N)
    width = tl.arange(0, P)
    # Scalars in 64 bits move the pointers; offsets inside a tile are 32 bits, or each element's address would
    # take two registers of its own.
    start = (chunk * Q).to(tl.int64)
    inside = (start + row < sequence)[:, None]
    state_tile = width[:, None] * N + state_column[None, :]
    b_tile = row[:, None] * b_time + state_column[None, :]
    keys = tl.load(b + batch * b_batch + start * b_time + group * N + b_tile, mask=inside, other=0.0)
    c_tile = row[:, None] * c_time + state_column[None, :]
    queries = tl.load(c + batch * c_batch + start * c_time + group * N + c_tile, mask=inside, other=0.0)
    scores = tl.dot(keys, tl.trans(queries), input_precision=PRECISION)
    causal = row[:, None] <= row[None, :]
    scores = tl.where(causal, scores, 0.0)
    x += batch * x_batch + start * x_time + first * P
    dy += batch * dy_batch + start * dy_time + first * P
    dx += batch * dx_batch + start * dx_time + first * P
    x_tile = row[:, None] * x_time + width[None, :]
    dy_tile = row[:, None] * dy_time + width[None, :]
    dx_tile = row[:, None] * dx_time + width[None, :]
    padded = chunks * Q
    line = (batch * heads + first) * padded + start
    d_states += ((batch * chunks + chunk) * heads + first) * (P * N)
    sum_mixed = tl.zeros((Q, Q), dtype=tl.float32)
    for head in tl.range(0, HEADS, num_stages=STAGES):
        inputs = tl.load(x + head * P + x_tile, mask=inside, other=0.0)
        d_out = tl.load(dy + head * P + dy_tile, mask=inside, other=0.0)
        d_state = tl.load(d_states + head * (P * N) + state_tile)
        here = line + head * padded
        sums = tl.load(total + here + row)
        step = tl.load(delta + here + row)
        last = tl.load(total + here + (Q - 1))
        until = tl.exp2(last - sums)

        # Inside the chunk.
        decay = tl.exp2(tl.minimum(sums[None, :] - sums[:, None], LARGEST_EXPONENT))
        d_mixing = tl.dot(inputs, tl.trans(d_out), input_precision=PRECISION)
        if SKIP:
            # The diagonal of x·dyᵀ is what D sees.
            diagonal = tl.where(row[:, None] == row[None, :], d_mixing, 0.0)
            tl.store(d_skip + here + row, tl.sum(diagonal, axis=1))
        mixing = scores * decay
        paths = d_mixing * mixing
        sum_mixed += d_mixing * decay * step[:, None]
        from_write = tl.sum(paths, axis=1)
        to_read = tl.sum(paths * step[:, None], axis=0)

        # From after the chunk.
        d_inputs = tl.dot(keys, tl.trans(d_state), input_precision=PRECISION) * until[:, None]
        beyond = tl.sum(d_inputs * inputs.to(tl.float32), axis=1)
        d_inputs = tl.dot(mixing.to(x.dtype.element_ty), d_out, d_inputs, input_precision=PRECISION)
        d_inputs *= step[:, None]
        if SKIP:
            d_inputs += d_out.to(tl.float32) * tl.load(skip + first + head).to(tl.float32)
        tl.store(dx + head * P + dx_tile, d_inputs.to(dx.dtype.element_ty), mask=inside)

        tl.store(within + here + row, from_write)
        tl.store(at_write + here + row, beyond)
        tl.store(at_read + here + row, to_read - from_write * step)
    mixed += ((batch * chunks + chunk) * (heads // HEADS) + share) * (Q * Q)
    sum_mixed = tl.where(causal, sum_mixed, 0.0)
    tl.store(mixed + row[:, None] * Q + row[None, :], sum_mixed.to(mixed.dtype.element_ty))
