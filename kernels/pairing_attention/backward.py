"""Backward kernels: one of five products, between one that prepares its sums and one that rounds dQ.

With ``S = scale Q Kᵀ``, ``P = exp(S - logsumexp)``, ``D = rowsum(dO ∘ O) - dlogsumexp``:

    dV = Σ Pᵀ dO      dS = P ∘ (dO Vᵀ - D)      dK = scale Σ dSᵀ Q      dQ = scale Σ dS K

A block holds a tile of keys and meets all rows of all pairs of its head that see it, tile by tile; dK and dV
add up in its registers. dQ is the sum over blocks: each adds its part in fp32 in global memory when its turn
has come (``turns.py``), in the order of the tiles of keys, so that bits do not depend on timing. Blocks take
their numbers from a ticket and wait for lower numbers alone, which are at work or done: no deadlock. All walk
from the last rows down to their diagonal, the pairs of a head in turn, so that those that start together
follow each other through the same rows one step apart, and read them from the L2 cache.

Scores of keys are computed as ``[keys, rows]`` and dQ as ``[D, rows]``: no product has an operand that was
transposed in registers, which Triton 3.4 to 3.7.0 miscompiles on Hopper (flash-linear-attention#640).
"""

import triton
import triton.language as tl

from flashtrain.kernels.pairing_attention.forward import LOG2E, rows_of
from flashtrain.kernels.pairing_attention.turns import add_tile, await_turn, done_before, pass_turn


@triton.jit
def attention_prepare_kernel(  # type: ignore[no-untyped-def]
    d_out,
    out,
    d_logsumexp,
    logsumexp,
    norms,
    means,
    sums,
    counters,
    visits,
    sequence,
    width,
    scale,
    pairs,
    queries,
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
    """What products begin with, ``[B, pairs, tiles · BM]``: -logsumexp as ``scale`` makes it, and -D.

    Also zeros in dQ's sums and in the counters. The grid is (tiles, pairs in the order of ``visits``, batch).
    """
    tile = tl.program_id(0)
    tiles = tl.num_programs(0)
    visit = tl.load(visits + heads + 1 + tl.program_id(1))
    pair = visit & 0xFFFF
    batch = tl.program_id(2).to(tl.int64)
    row = tile * BM + tl.arange(0, BM)
    column = tl.arange(0, D)
    within = row < sequence
    inside = within[:, None] & (column < width)[None, :]
    long = row.to(tl.int64)[:, None]
    slope = tl.load(
        d_out + batch * d_batch + pair * d_head + long * d_time + column[None, :], mask=inside, other=0.0
    ).to(tl.float32)
    value = tl.load(
        out + batch * out_batch + pair * out_head + long * out_time + column[None, :], mask=inside, other=0.0
    ).to(tl.float32)
    mean = tl.sum(slope * value, axis=1)
    line = (batch * pairs + pair) * sequence + row
    if HAS_SLOPE:
        mean -= tl.load(d_logsumexp + line, mask=within, other=0.0)
    norm = tl.load(logsumexp + line, mask=within, other=0.0) * (LOG2E / scale)
    line = ((batch * pairs + pair) * tiles + tile) * BM + tl.arange(0, BM)
    tl.store(norms + line, -norm)
    tl.store(means + line, -mean)
    if visit >> 32 & 0xFFFF == 0:  # the first of its query head
        slot = (batch * queries + (visit >> 16 & 0xFFFF)) * tiles + tile
        tl.store(counters + 1 + slot, 0)
        tl.store(sums + slot * (BM * D) + tl.arange(0, BM * D), tl.zeros((BM * D,), dtype=tl.float32))
    if (tl.program_id(0) == 0) & (tl.program_id(1) == 0) & (tl.program_id(2) == 0):
        tl.store(counters, 0)


@triton.jit
def over_rows(  # type: ignore[no-untyped-def]
    d_keys,
    d_values,
    adding,
    done,
    keys_tile,
    values_tile,
    q_desc,
    do_desc,
    dq_desc,
    norms,
    means,
    counters,
    visits,
    count,
    tile_of_keys,
    column,
    batch,
    low,
    high,
    pairs,
    queries,
    sequence,
    keys,
    scale,
    BM: tl.constexpr,
    BN: tl.constexpr,
    D: tl.constexpr,
    CAUSAL: tl.constexpr,
    MASKED: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Tiles of rows ``[low, high)``, the last first, of ``count`` pairs into dK, dV and dQ.

    ``MASKED`` where some rows do not see some keys. The turn at a tile is passed on in the next step, when
    the addition has long arrived: ``done`` is what the counter of the tile ``adding`` becomes then. Both are
    returned for the last one.
    """
    tiles = tl.cdiv(sequence, BM)
    following = tl.load(visits)
    for step in tl.range(0, (high - low) * count, num_stages=STAGES):
        visit = following
        following = tl.load(visits + (step + 1) % count)  # a step ahead, for the loads that need it
        tile = high - 1 - step // count
        pair = (visit & 0xFFFF).to(tl.int32)
        head = (visit >> 16 & 0xFFFF).to(tl.int32)
        turn = tile_of_keys * (visit >> 48 & 0xFFFF).to(tl.int32) + (visit >> 32 & 0xFFFF).to(tl.int32)
        start = tile * BM
        slot = (batch * queries + head) * tiles + tile
        line = ((batch * pairs + pair) * tiles + tile).to(tl.int64) * BM + tl.arange(0, BM)
        # Products begin with what is to be taken off them: that needs no registers of its own.
        norm = tl.broadcast_to(tl.load(norms + line)[None, :], (BN, BM))
        rows = rows_of(q_desc, batch, head, start, BM, D)
        scores = tl.dot(keys_tile, rows.T, norm, input_precision=PRECISION)
        mean = tl.broadcast_to(tl.load(means + line)[None, :], (BN, BM))
        d_out = rows_of(do_desc, batch, pair, start, BM, D)
        slope = tl.dot(values_tile, d_out.T, mean, input_precision=PRECISION)
        found = done_before(counters + slot)
        # Rows beyond the sequence weigh something finite, and their dO and mean are 0.
        weights = tl.exp2(scores * scale)
        if MASKED:
            if CAUSAL:
                row = start + tl.arange(0, BM)
                seen = column[:, None] <= row[None, :] + (keys - sequence)
            else:
                seen = (column < keys)[:, None]
            weights = tl.where(seen, weights, 0.0)
        d_values = tl.dot(weights.to(do_desc.dtype), d_out, d_values, input_precision=PRECISION)
        d_scores = (weights * slope).to(q_desc.dtype)
        pass_turn(counters + adding, done)
        d_keys = tl.dot(d_scores, rows, d_keys, input_precision=PRECISION)
        d_rows = tl.dot(keys_tile.T, d_scores, input_precision=PRECISION)
        add_tile(dq_desc, slot * D + await_turn(counters + slot, turn, found), d_rows)
        adding = slot
        done = turn + 1
    return d_keys, d_values, adding, done


@triton.jit
def attention_gradient_kernel(  # type: ignore[no-untyped-def]
    q_desc,
    k_desc,
    v_desc,
    do_desc,
    dq_desc,
    norms,
    means,
    d_key,
    d_value,
    counters,
    visits,
    pairs,
    queries,
    heads,
    splits,
    blocks,
    section,
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
    """dK and dV of a tile of ``BN`` keys of one KV head, and its part of dQ.

    ``blocks`` have a tile of keys of all heads; ``section`` of them at a time are at work, on all tiles. A
    section's first keys, which the most rows see, have its lowest numbers.
    """
    number = tl.atomic_add(counters, 1)
    counters += 1
    before = number // (section * tl.cdiv(keys, BN)) * section
    number -= before * tl.cdiv(keys, BN)
    section = tl.minimum(section, blocks - before)
    tile_of_keys = number // section
    place = before + number % section
    split = place % splits
    head = place // splits % heads
    batch = place // splits // heads
    start = tile_of_keys * BN
    column = start + tl.arange(0, BN)
    keys_tile = rows_of(k_desc, batch, head, start, BN, D)
    values_tile = rows_of(v_desc, batch, head, start, BN, D)
    d_keys = tl.zeros((BN, D), dtype=tl.float32)
    d_values = tl.zeros((BN, D), dtype=tl.float32)
    # Tiles of rows from ``low`` on see some of the keys, those from ``whole`` on all of them.
    high = tl.cdiv(sequence, BM)
    if CAUSAL:
        before = keys - sequence
        low = tl.maximum(start - before, 0) // BM
        whole = tl.minimum(tl.cdiv(tl.maximum(start + BN - 1 - before, 0), BM), high)
    else:
        low = 0
        whole = tl.where(start + BN > keys, high, 0)
    first = tl.load(visits + head).to(tl.int32)
    met = tl.load(visits + head + 1).to(tl.int32) - first
    at = first + met * split // splits
    count = first + met * (split + 1) // splits - at
    visits += heads + 1 + at
    adding = 0
    done = 0
    d_keys, d_values, adding, done = over_rows(
        d_keys, d_values, adding, done, keys_tile, values_tile, q_desc, do_desc, dq_desc, norms, means,
        counters, visits, count, tile_of_keys, column, batch, whole, high, pairs, queries, sequence, keys,
        scale, BM, BN, D, CAUSAL, False, PRECISION, STAGES,
    )  # fmt: skip
    d_keys, d_values, adding, done = over_rows(
        d_keys, d_values, adding, done, keys_tile, values_tile, q_desc, do_desc, dq_desc, norms, means,
        counters, visits, count, tile_of_keys, column, batch, low, whole, pairs, queries, sequence, keys,
        scale, BM, BN, D, CAUSAL, True, PRECISION, STAGES,
    )  # fmt: skip
    pass_turn(counters + adding, done)
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


@triton.jit
def attention_round_kernel(  # type: ignore[no-untyped-def]
    sums,
    d_query,
    sequence,
    width,
    scale,
    out_batch,
    out_head,
    out_time,
    BM: tl.constexpr,
    D: tl.constexpr,
):
    """dQ from its sums ``[B, n_q, tiles, D, BM]``; the grid is (tiles, n_q, batch)."""
    slot = (tl.program_id(2) * tl.num_programs(1) + tl.program_id(1)) * tl.num_programs(0) + tl.program_id(0)
    row = tl.arange(0, BM)
    column = tl.arange(0, D)
    found = tl.load(sums + slot.to(tl.int64) * (BM * D) + column[:, None] * BM + row[None, :])
    row += tl.program_id(0) * BM
    d_query += tl.program_id(2).to(tl.int64) * out_batch + tl.program_id(1).to(tl.int64) * out_head
    target = row.to(tl.int64)[:, None] * out_time + column[None, :]
    inside = (row < sequence)[:, None] & (column < width)[None, :]
    tl.store(d_query + target, (found * (scale / LOG2E)).T.to(d_query.dtype.element_ty), mask=inside)
