"""Kernel of the gradients: every chunk by itself, given states and gradients of states at its borders."""

import triton
import triton.language as tl


@triton.jit
def gradients_kernel(  # type: ignore[no-untyped-def]
    x,
    b,
    c,
    dy,
    delta,
    total,
    states,
    d_states,
    skip,
    dx,
    db,
    dc,
    at_read,
    at_write,
    within,
    through,
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
    """dx and the parts of dΔ of ``HEADS`` heads of one group in one chunk; their share of dB and dC.

    With ``L_ts = exp(total_t - total_s)`` for s <= t, S the state before the chunk, dS the gradient of the
    state after it, and e_s = exp(total_Q - total_s):

        dx_s = Δ_s (Σ_t (C_t·B_s) L_ts dy_t + e_s dS B_s) + D dy_s
        dB_s = Σ_t M_st C_t + e_s Δ_s dSᵀ x_s        M_st = L_ts Δ_s (dy_t·x_s), summed over heads first
        dC_t = Σ_s M_st B_s + exp(total_t) Sᵀ dy_t

    Square tiles are ``[s, t]`` and dC is kept transposed, so that no product has a transposed operand that
    was computed in registers, which Triton 3.4 to 3.7.0 miscompiles (flash-linear-attention#640). ``db`` and
    ``dc`` are fp32 ``[B, S, H/HEADS, N]``, added up by the caller in one order. See
    ``decay.decay_backward_kernel`` for ``at_read``, ``at_write``, ``within`` and ``through``.
    """
    chunk = tl.program_id(0)
    share = tl.program_id(1)
    batch = tl.program_id(2).to(tl.int64)
    first = share * HEADS
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
    queries_t = tl.trans(queries)
    keys_t = tl.trans(keys)
    scores = tl.dot(keys, queries_t, input_precision=PRECISION)
    causal = row[:, None] <= row[None, :]
    x += batch * x_batch + at * x_time + first * P + width[None, :]
    dy += batch * dy_batch + at * dy_time + first * P + width[None, :]
    dx += batch * dx_batch + at * dx_time + first * P + width[None, :]
    line = (batch * heads + first) * (chunks * Q) + time
    last_place = (batch * heads + first) * (chunks * Q) + chunk * Q + Q - 1
    per_head = (batch * chunks + chunk) * heads + first
    border = per_head * (P * N) + width[:, None] * N + state_column[None, :]
    mixed = tl.zeros((Q, Q), dtype=tl.float32)
    d_keys = tl.zeros((Q, N), dtype=tl.float32)
    d_queries_t = tl.zeros((N, Q), dtype=tl.float32)
    for head in tl.range(0, HEADS, num_stages=STAGES):
        inputs = tl.load(x + head * P, mask=inside, other=0.0)
        d_out = tl.load(dy + head * P, mask=inside, other=0.0)
        state = tl.load(states + border + head * (P * N))
        d_state = tl.load(d_states + border + head * (P * N))
        sums = tl.load(total + line + head * (chunks * Q))
        step = tl.load(delta + line + head * (chunks * Q))
        last = tl.load(total + last_place + head * (chunks * Q))
        since = tl.exp2(sums)
        until = tl.exp2(last - sums)

        # Inside the chunk.
        decay = tl.exp2(tl.where(causal, sums[None, :] - sums[:, None], float("-inf")))
        d_mixing = tl.dot(inputs, tl.trans(d_out), input_precision=PRECISION)
        mixing = scores * decay
        paths = d_mixing * mixing
        mixed += d_mixing * decay * step[:, None]
        from_write = tl.sum(paths, axis=1)
        to_read = tl.sum(paths * step[:, None], axis=0)

        # Over its borders.
        d_inputs = tl.dot(keys, tl.trans(d_state), input_precision=PRECISION) * until[:, None]
        d_inputs = tl.dot(mixing.to(x.dtype.element_ty), d_out, d_inputs, input_precision=PRECISION)
        d_inputs *= step[:, None]
        if SKIP:
            d_inputs += d_out.to(tl.float32) * tl.load(skip + first + head).to(tl.float32)
            # The diagonal of x·dyᵀ is what D sees.
            diagonal = tl.where(row[:, None] == row[None, :], d_mixing, 0.0)
            tl.store(d_skip + per_head + head, tl.sum(tl.sum(diagonal, axis=1), axis=0))
        tl.store(dx + head * P, d_inputs.to(dx.dtype.element_ty), mask=inside)
        leaving = tl.dot(inputs, d_state, input_precision=PRECISION)
        beyond = tl.sum(leaving * keys.to(tl.float32), axis=1) * until
        d_keys += leaving * (until * step)[:, None]
        arriving = tl.dot(tl.trans(state), tl.trans(d_out), input_precision=PRECISION) * since[None, :]
        before = tl.sum(arriving * queries_t.to(tl.float32), axis=0)
        d_queries_t += arriving
        across = tl.sum(tl.sum(state.to(tl.float32) * d_state.to(tl.float32), axis=1), axis=0)

        place = line + head * (chunks * Q)
        tl.store(within + place, from_write)
        tl.store(at_write + place, beyond)
        tl.store(at_read + place, to_read + before - from_write * step)
        tl.store(through + per_head + head, across * tl.exp2(last))

    mixed_low = mixed.to(x.dtype.element_ty)
    d_keys = tl.dot(mixed_low, queries, d_keys, input_precision=PRECISION)
    d_queries_t = tl.dot(keys_t, mixed_low, d_queries_t, input_precision=PRECISION)
    shares = heads // HEADS
    out = ((batch * sequence + time) * shares + share) * N
    tl.store(db + out[:, None] + state_column[None, :], d_keys, mask=inside)
    tl.store(dc + out[None, :] + state_column[:, None], d_queries_t, mask=(time < sequence)[None, :])
