"""Forward: the source's attention with its log-sum-exp, and that of a layer which is given it."""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _keys(  # type: ignore[no-untyped-def]
    queries,
    k,
    v,
    out,
    top,
    total,
    row,
    first,
    last,
    sequence,
    scale,
    k_time,
    v_time,
    D: tl.constexpr,
    BN: tl.constexpr,
    GIVEN: tl.constexpr,
    MASKED: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    """One block of queries over the keys from ``first`` to before ``last``."""
    column = tl.arange(0, BN)
    width = tl.arange(0, D)
    k_tile = column[:, None] * k_time + width[None, :]
    v_tile = column[:, None] * v_time + width[None, :]
    for start in tl.range(first, last, BN, num_stages=STAGES):
        here = tl.cast(start, tl.int64)
        if MASKED:
            inside = (start + column < sequence)[:, None]
            keys = tl.load(k + here * k_time + k_tile, mask=inside, other=0.0)
            values = tl.load(v + here * v_time + v_tile, mask=inside, other=0.0)
        else:
            keys = tl.load(k + here * k_time + k_tile)
            values = tl.load(v + here * v_time + v_tile)
        scores = tl.dot(queries, tl.trans(keys), input_precision=PRECISION) * scale
        if MASKED:
            scores = tl.where(row[:, None] >= start + column[None, :], scores, float("-inf"))
        if GIVEN:
            shares = tl.exp2(scores - top[:, None])
        else:
            # The first key is open to every query, so that the maximum is finite from the first block on.
            higher = tl.maximum(top, tl.max(scores, axis=1))
            shares = tl.exp2(scores - higher[:, None])
            fade = tl.exp2(top - higher)
            total = total * fade + tl.sum(shares, axis=1)
            out *= fade[:, None]
            top = higher
        out = tl.dot(shares.to(values.dtype), values, out, input_precision=PRECISION)
    return out, top, total


@triton.jit
def shared_attention_kernel(  # type: ignore[no-untyped-def]
    q,
    k,
    v,
    lse,
    o,
    sequence,
    heads,
    group,
    scale,
    q_batch,
    q_head,
    q_time,
    k_batch,
    k_head,
    k_time,
    v_batch,
    v_head,
    v_time,
    o_batch,
    o_head,
    o_time,
    D: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    GIVEN: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    """``BM`` rows of the output of one head. ``GIVEN``: ``lse`` is read, otherwise written.

    ``scale`` has log2(e) in it, so that exponentials are powers of two.
    """
    tile = tl.num_programs(0) - 1 - tl.program_id(0)  # the longest rows first
    head = tl.program_id(1)
    batch = tl.program_id(2).to(tl.int64)
    start = tile * BM
    row = start + tl.arange(0, BM)
    width = tl.arange(0, D)
    inside = row < sequence
    at = tl.cast(start, tl.int64)
    q += batch * q_batch + head.to(tl.int64) * q_head + at * q_time
    k += batch * k_batch + (head // group).to(tl.int64) * k_head
    v += batch * v_batch + (head // group).to(tl.int64) * v_head
    local = tl.arange(0, BM)
    queries = tl.load(q + local[:, None] * q_time + width[None, :], mask=inside[:, None], other=0.0)
    line = lse + (batch * heads + head) * sequence + row
    out = tl.zeros((BM, D), dtype=tl.float32)
    total = tl.zeros((BM,), dtype=tl.float32)
    if GIVEN:
        top = tl.load(line, mask=inside, other=0.0) * LOG2E
    else:
        top = tl.full((BM,), float("-inf"), dtype=tl.float32)
    whole = start // BN * BN  # keys that every query of the block may see
    out, top, total = _keys(
        queries, k, v, out, top, total, row, 0, whole, sequence, scale, k_time, v_time,
        D=D, BN=BN, GIVEN=GIVEN, MASKED=False, PRECISION=PRECISION, STAGES=STAGES,
    )  # fmt: skip
    out, top, total = _keys(
        queries, k, v, out, top, total, row, whole, tl.minimum(start + BM, sequence), sequence, scale,
        k_time, v_time,
        D=D, BN=BN, GIVEN=GIVEN, MASKED=True, PRECISION=PRECISION, STAGES=STAGES,
    )  # fmt: skip
    if not GIVEN:
        out /= total[:, None]
        tl.store(line, (top + tl.log2(total)) / LOG2E, mask=inside)
    o += batch * o_batch + head.to(tl.int64) * o_head + at * o_time
    place = local[:, None] * o_time + width[None, :]
    tl.store(o + place, out.to(o.dtype.element_ty), mask=inside[:, None])
