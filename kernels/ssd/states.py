"""Kernels that carry the state from chunk to chunk: forward for states, backward for their gradients."""

import triton
import triton.language as tl

from flashtrain.kernels.jit import kernel


@triton.jit
def carry(  # type: ignore[no-untyped-def]
    x,
    b,
    delta,
    total,
    start,
    states,
    end,
    column,
    head,
    batch,
    sequence,
    chunks,
    heads,
    per_group,
    x_batch,
    x_time,
    b_batch,
    b_time,
    P: tl.constexpr,
    N: tl.constexpr,
    Q: tl.constexpr,
    REVERSE: tl.constexpr,
    HAS_START: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Columns of one head's state at every chunk border, in ``states`` ``[B, chunks, H, P, N]``.

    Forward, from x and B: the state before each chunk, and after the last in ``end``; a chunk adds
    Σ_s exp(total_Q - total_s) Δ_s x_s ⊗ B_s. REVERSE, from dy and C: the gradient of the state after each
    chunk, and of the one before the first in ``end``; a chunk adds Σ_t exp(total_t) dy_t ⊗ C_t.

    The state stays in fp32 registers for the whole sequence. Its columns do not depend on each other, so
    they are what other blocks share: no pass over chunks that have been summed up before is needed.
    """
    width = tl.arange(0, P)
    row = tl.arange(0, Q)
    tile = width[:, None] * N + column[None, :]
    x += batch * x_batch + head * P
    b += batch * b_batch + (head // per_group) * N
    x_tile = row[:, None] * x_time + width[None, :]
    b_tile = row[:, None] * b_time + column[None, :]
    line = (batch * heads + head) * (chunks * Q)
    if HAS_START:
        state = tl.load(start + (batch * heads + head) * (P * N) + tile)
    else:
        state = tl.zeros((P, column.shape[0]), dtype=tl.float32)
    for index in tl.range(0, chunks, num_stages=STAGES):
        chunk = chunks - 1 - index if REVERSE else index
        border = states + ((batch * chunks + chunk) * heads + head) * (P * N)
        tl.store(border + tile, state.to(states.dtype.element_ty))
        start_time = (chunk * Q).to(tl.int64)  # see backward.py for what is 64 and what 32 bits wide
        inside = (start_time + row < sequence)[:, None]
        inputs = tl.load(x + start_time * x_time + x_tile, mask=inside, other=0.0)
        keys = tl.load(b + start_time * b_time + b_tile, mask=inside, other=0.0)
        here = line + start_time
        sums = tl.load(total + here + row)
        last = tl.load(total + here + (Q - 1))
        weight = tl.exp2(sums) if REVERSE else tl.exp2(last - sums) * tl.load(delta + here + row)
        # Weights go on the operand that is not transposed: Triton 3.4 to 3.7.0 miscompiles products with a
        # transposed tile that was computed in registers (flash-linear-attention#640).
        keys = (keys.to(tl.float32) * weight[:, None]).to(x.dtype.element_ty)
        state *= tl.exp2(last)
        state = tl.dot(tl.trans(inputs), keys, state, input_precision=PRECISION)
    tl.store(end + (batch * heads + head) * (P * N) + tile, state)


@kernel
def states_kernel(  # type: ignore[no-untyped-def]
    x,
    b,
    delta,
    total,
    start,
    states,
    end,
    sequence,
    chunks,
    heads,
    per_group,
    x_batch,
    x_time,
    b_batch,
    b_time,
    P: tl.constexpr,
    N: tl.constexpr,
    BN: tl.constexpr,
    Q: tl.constexpr,
    HAS_START: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    """The states: ``BN`` columns of one head a block."""
    column = tl.program_id(0) * BN + tl.arange(0, BN)
    head = tl.program_id(1)
    batch = tl.program_id(2).to(tl.int64)
    carry(
        x,
        b,
        delta,
        total,
        start,
        states,
        end,
        column,
        head,
        batch,
        sequence,
        chunks,
        heads,
        per_group,
        x_batch,
        x_time,
        b_batch,
        b_time,
        P,
        N,
        Q,
        False,
        HAS_START,
        PRECISION,
        STAGES,
    )


@kernel
def both_states_kernel(  # type: ignore[no-untyped-def]
    x,
    b,
    dy,
    c,
    delta,
    total,
    start,
    d_end,
    states,
    d_states,
    end,
    d_start,
    sequence,
    chunks,
    heads,
    per_group,
    x_batch,
    x_time,
    b_batch,
    b_time,
    dy_batch,
    dy_time,
    c_batch,
    c_time,
    P: tl.constexpr,
    N: tl.constexpr,
    BN: tl.constexpr,
    Q: tl.constexpr,
    HAS_START: tl.constexpr,
    HAS_D_END: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    """States and gradients of states at once: each alone has too few blocks to fill the GPU."""
    column = (tl.program_id(0) // 2) * BN + tl.arange(0, BN)
    head = tl.program_id(1)
    batch = tl.program_id(2).to(tl.int64)
    if tl.program_id(0) % 2 == 0:
        carry(
            x,
            b,
            delta,
            total,
            start,
            states,
            end,
            column,
            head,
            batch,
            sequence,
            chunks,
            heads,
            per_group,
            x_batch,
            x_time,
            b_batch,
            b_time,
            P,
            N,
            Q,
            False,
            HAS_START,
            PRECISION,
            STAGES,
        )
    else:
        carry(
            dy,
            c,
            delta,
            total,
            d_end,
            d_states,
            d_start,
            column,
            head,
            batch,
            sequence,
            chunks,
            heads,
            per_group,
            dy_batch,
            dy_time,
            c_batch,
            c_time,
            P,
            N,
            Q,
            True,
            HAS_D_END,
            PRECISION,
            STAGES,
        )
