"""Backward kernel of the queries: a tile of queries over all keys of its pairs (see ``backward.py``)."""

import triton
import triton.language as tl

from flashtrain.kernels.pairing_attention.backward import share_of
from flashtrain.kernels.pairing_attention.forward import LOG2E, rows_of


@triton.jit
def over_keys(  # type: ignore[no-untyped-def]
    d_queries,
    queries,
    d_out,
    norm,
    mean,
    k_desc,
    v_desc,
    batch,
    head,
    row,
    first,
    last,
    keys,
    scale,
    BN: tl.constexpr,
    D: tl.constexpr,
    CAUSAL: tl.constexpr,
    MASKED: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Keys ``[first, last)`` into dQ of one tile; ``row`` are the last keys that its rows see."""
    for start in tl.range(first, last, BN, num_stages=STAGES):
        tile = rows_of(k_desc, batch, head, start, BN, D)
        scores = tl.dot(queries, tile.T, input_precision=PRECISION)
        weights = tl.exp2(scores * scale - norm[:, None])
        if MASKED:
            column = start + tl.arange(0, BN)
            seen = column[None, :] < keys
            if CAUSAL:
                seen = seen & (column[None, :] <= row[:, None])
            weights = tl.where(seen, weights, 0.0)
        values = rows_of(v_desc, batch, head, start, BN, D)
        slope = tl.dot(d_out, values.T, input_precision=PRECISION)
        d_scores = (weights * (slope - mean[:, None])).to(k_desc.dtype)
        d_queries = tl.dot(d_scores, tile, d_queries, input_precision=PRECISION)
    return d_queries


@triton.jit
def queries_gradient_kernel(  # type: ignore[no-untyped-def]
    q_desc,
    k_desc,
    v_desc,
    do_desc,
    logsumexp,
    delta,
    d_query,
    key_of,
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
    """dQ of a tile of ``BM`` rows of one query head; grid (section, tiles · splits, batch · sections)."""
    sections = heads // section
    batch = tl.program_id(2) // sections
    head = tl.program_id(2) % sections * section + tl.program_id(0)
    split = tl.program_id(1) % splits
    tile = tl.program_id(1) // splits
    if CAUSAL:
        tile = tl.num_programs(1) // splits - 1 - tile
    first_row = tile * BM
    row = first_row + tl.arange(0, BM)
    before = keys - sequence
    queries = rows_of(q_desc, batch, head, first_row, BM, D)
    d_queries = tl.zeros((BM, D), dtype=tl.float32)
    if CAUSAL:
        whole = (first_row + before + 1) // BN * BN
        last = tl.minimum(first_row + before + BM, keys)
    else:
        whole = keys // BN * BN
        last = keys
    at, end = share_of(lists, head, heads, split, splits)
    for place in range(at, end):
        pair = tl.load(lists + place)
        key_head = tl.load(key_of + pair)
        line = (batch * pairs + pair).to(tl.int64) * sequence + row
        norm = tl.load(logsumexp + line, mask=row < sequence, other=0.0) * LOG2E
        mean = tl.load(delta + line, mask=row < sequence, other=0.0)
        d_out = rows_of(do_desc, batch, pair, first_row, BM, D)
        d_queries = over_keys(
            d_queries, queries, d_out, norm, mean, k_desc, v_desc, batch, key_head, row + before,
            0, whole, keys, scale, BN, D, CAUSAL, False, PRECISION, STAGES,
        )  # fmt: skip
        d_queries = over_keys(
            d_queries, queries, d_out, norm, mean, k_desc, v_desc, batch, key_head, row + before,
            whole, last, keys, scale, BN, D, CAUSAL, True, PRECISION, STAGES,
        )  # fmt: skip
    wide = tl.arange(0, D)
    target = (
        split.to(tl.int64) * out_split
        + batch.to(tl.int64) * out_batch
        + head.to(tl.int64) * out_head
        + row.to(tl.int64)[:, None] * out_time
        + wide[None, :]
    )
    inside = (row < sequence)[:, None] & (wide < width)[None, :]
    tl.store(d_query + target, (d_queries * (scale / LOG2E)).to(d_query.dtype.element_ty), mask=inside)
