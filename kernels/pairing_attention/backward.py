"""Backward kernels: a tile of keys over all queries of its pairs; ``queries.py`` has the other way round.

With ``S = scale Q Kᵀ``, ``P = exp(S - logsumexp)``, ``D = rowsum(dO ∘ O) - dlogsumexp``:

    dV = Σ Pᵀ dO      dS = P ∘ (dO Vᵀ - D)      dK = scale Σ dSᵀ Q      dQ = scale Σ dS K

The sums run over rows and over the pairs of a head, in one block or, where blocks would not fill the GPU, in
``splits`` blocks whose parts are added afterwards: in one order, so without atomics, at the price of S and
dO Vᵀ twice. Scores of keys are computed as ``[keys, rows]``: no product has an operand that was transposed in
registers, which Triton 3.4 to 3.7.0 miscompiles on Hopper (flash-linear-attention#640).
"""

import triton
import triton.language as tl

from flashtrain.kernels.pairing_attention.forward import LOG2E, rows_of


@triton.jit
def delta_kernel(  # type: ignore[no-untyped-def]
    d_out,
    out,
    d_logsumexp,
    delta,
    sequence,
    width,
    heads,
    d_batch,
    d_head,
    d_time,
    out_batch,
    out_head,
    out_time,
    BM: tl.constexpr,
    D: tl.constexpr,
    HAS_SLOPE: tl.constexpr,
):
    """``delta [B, pairs, S]`` = rowsum(dO ∘ O) - dlogsumexp."""
    row = tl.program_id(0) * BM + tl.arange(0, BM)
    pair = tl.program_id(1).to(tl.int64)
    batch = tl.program_id(2).to(tl.int64)
    column = tl.arange(0, D)
    inside = (row < sequence)[:, None] & (column < width)[None, :]
    long = row.to(tl.int64)[:, None]
    slope = tl.load(
        d_out + batch * d_batch + pair * d_head + long * d_time + column[None, :], mask=inside, other=0.0
    ).to(tl.float32)
    value = tl.load(
        out + batch * out_batch + pair * out_head + long * out_time + column[None, :], mask=inside, other=0.0
    ).to(tl.float32)
    total = tl.sum(slope * value, axis=1)
    place = (batch * heads + pair) * sequence + row
    if HAS_SLOPE:
        total -= tl.load(d_logsumexp + place, mask=row < sequence, other=0.0)
    tl.store(delta + place, total, mask=row < sequence)


@triton.jit
def share_of(lists, head, heads, split, splits):  # type: ignore[no-untyped-def]
    """Where the pairs of ``head`` lie in ``lists`` (offsets of all heads, then pairs): this split's own."""
    first = tl.load(lists + head)
    count = tl.load(lists + head + 1) - first
    first += heads + 1
    return first + count * split // splits, first + count * (split + 1) // splits


@triton.jit
def over_rows(  # type: ignore[no-untyped-def]
    d_keys,
    d_values,
    keys_tile,
    values_tile,
    q_desc,
    do_desc,
    logsumexp,
    delta,
    batch,
    query_head,
    pair,
    column,
    first,
    last,
    sequence,
    before,
    scale,
    BM: tl.constexpr,
    D: tl.constexpr,
    MASKED: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Rows ``[first, last)`` of one pair into dK and dV of one tile; ``MASKED`` where some do not see it."""
    for start in tl.range(first, last, BM, num_stages=STAGES):
        row = start + tl.arange(0, BM)
        queries = rows_of(q_desc, batch, query_head, start, BM, D)
        scores = tl.dot(keys_tile, queries.T, input_precision=PRECISION)
        # Rows beyond the sequence weigh something finite, and their dO and delta are 0.
        norm = tl.load(logsumexp + row, mask=row < sequence, other=0.0) * LOG2E
        weights = tl.exp2(scores * scale - norm[None, :])
        if MASKED:
            weights = tl.where(column[:, None] <= row[None, :] + before, weights, 0.0)
        d_out = rows_of(do_desc, batch, pair, start, BM, D)
        d_values = tl.dot(weights.to(do_desc.dtype), d_out, d_values, input_precision=PRECISION)
        slope = tl.dot(values_tile, d_out.T, input_precision=PRECISION)
        mean = tl.load(delta + row, mask=row < sequence, other=0.0)
        d_scores = (weights * (slope - mean[None, :])).to(q_desc.dtype)
        d_keys = tl.dot(d_scores, queries, d_keys, input_precision=PRECISION)
    return d_keys, d_values


@triton.jit
def keys_gradient_kernel(  # type: ignore[no-untyped-def]
    q_desc,
    k_desc,
    v_desc,
    do_desc,
    logsumexp,
    delta,
    d_key,
    d_value,
    query_of,
    lists,
    pairs,
    heads,
    section,
    splits,
    sequence,
    keys,
    width,
    scale,
    out_split,
    out_batch,
    out_head,
    out_time,
    BM: tl.constexpr,
    BN: tl.constexpr,
    D: tl.constexpr,
    CAUSAL: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    """dK and dV of a tile of ``BN`` keys of one KV head; grid (section, tiles · splits, batch · sections)."""
    sections = heads // section
    batch = tl.program_id(2) // sections
    head = tl.program_id(2) % sections * section + tl.program_id(0)
    split = tl.program_id(1) % splits
    start = tl.program_id(1) // splits * BN
    column = start + tl.arange(0, BN)
    before = keys - sequence
    keys_tile = rows_of(k_desc, batch, head, start, BN, D)
    values_tile = rows_of(v_desc, batch, head, start, BN, D)
    d_keys = tl.zeros((BN, D), dtype=tl.float32)
    d_values = tl.zeros((BN, D), dtype=tl.float32)
    if CAUSAL:
        # Rows from ``first`` on see some of the tile, rows from ``whole`` on all of it.
        first = tl.maximum(start - before, 0) // BM * BM
        whole = tl.minimum((tl.maximum(start + BN - 1 - before, 0) + BM - 1) // BM * BM, sequence)
    else:
        first = 0
        whole = 0
    at, end = share_of(lists, head, heads, split, splits)
    for place in range(at, end):
        pair = tl.load(lists + place)
        query_head = tl.load(query_of + pair)
        line = (batch * pairs + pair).to(tl.int64) * sequence
        if CAUSAL:
            d_keys, d_values = over_rows(
                d_keys, d_values, keys_tile, values_tile, q_desc, do_desc, logsumexp + line, delta + line,
                batch, query_head, pair, column, first, whole, sequence, before, scale,
                BM, D, True, PRECISION, STAGES,
            )  # fmt: skip
        d_keys, d_values = over_rows(
            d_keys, d_values, keys_tile, values_tile, q_desc, do_desc, logsumexp + line, delta + line,
            batch, query_head, pair, column, whole, sequence, sequence, before, scale,
            BM, D, False, PRECISION, STAGES,
        )  # fmt: skip
    wide = tl.arange(0, D)
    target = (
        split.to(tl.int64) * out_split
        + batch.to(tl.int64) * out_batch
        + head.to(tl.int64) * out_head
        + column.to(tl.int64)[:, None] * out_time
        + wide[None, :]
    )
    inside = (column < keys)[:, None] & (wide < width)[None, :]
    # ``scale`` has log2(e) in it, for the scores.
    tl.store(d_key + target, (d_keys * (scale / LOG2E)).to(d_key.dtype.element_ty), mask=inside)
    tl.store(d_value + target, d_values.to(d_value.dtype.element_ty), mask=inside)
