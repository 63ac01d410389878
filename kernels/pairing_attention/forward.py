"""Forward kernel: one tile of queries of one pair, over the keys and values of the pair's KV head.

Tensors come as TMA descriptors ``[B, heads, tokens, D]``, which fill what lies beyond the tokens, or beyond
the width of a head up to a power of two, with zeros.
"""

import triton
import triton.language as tl

from flashtrain.kernels.jit import kernel

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def rows_of(desc, batch, head, start, ROWS: tl.constexpr, D: tl.constexpr):  # type: ignore[no-untyped-def]
    """``[ROWS, D]`` of one head, from token ``start`` on."""
    return desc.load([batch, head, start, 0]).reshape(ROWS, D)


@triton.jit
def walk(  # type: ignore[no-untyped-def]
    total,
    weight,
    highest,
    queries,
    k_desc,
    v_desc,
    batch,
    head,
    row,
    first,
    last,
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
    """Keys ``[first, last)`` into the running sums; ``MASKED`` where some of them are not for some rows.

    ``row`` are the last keys that the rows see; ``scale`` is in units of log2.
    """
    for start in tl.range(first, last, BN, num_stages=STAGES):
        tile = rows_of(k_desc, batch, head, start, BN, D)
        scores = tl.dot(queries, tile.T, input_precision=PRECISION)
        if MASKED:
            column = start + tl.arange(0, BN)
            seen = column[None, :] < keys
            if CAUSAL:
                seen = seen & (column[None, :] <= row[:, None])
            scores = tl.where(seen, scores, float("-inf"))
        # Each row sees key 0, which comes first, so that ``higher`` is finite.
        higher = tl.maximum(highest, tl.max(scores, axis=1) * scale)
        part = tl.exp2(scores * scale - higher[:, None])
        decay = tl.exp2(highest - higher)
        weight = weight * decay + tl.sum(part, axis=1)
        total = total * decay[:, None]
        tile = rows_of(v_desc, batch, head, start, BN, D)
        total = tl.dot(part.to(v_desc.dtype), tile, total, input_precision=PRECISION)
        highest = higher
    return total, weight, highest


@kernel
def attention_kernel(  # type: ignore[no-untyped-def]
    q_desc,
    k_desc,
    v_desc,
    out,
    logsumexp,
    query_of,
    key_of,
    pairs,
    section,
    sequence,
    keys,
    width,
    scale,
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
    """``out`` and ``logsumexp`` of one tile of rows of one pair.

    The grid is (section, tiles, batch · sections): the pairs of a section work at the same time, and those
    tiles first that see the most keys.
    """
    sections = pairs // section
    batch = tl.program_id(2) // sections
    pair = tl.program_id(2) % sections * section + tl.program_id(0)
    tile = tl.program_id(1)
    if CAUSAL:
        tile = tl.num_programs(1) - 1 - tile
    first_row = tile * BM
    query_head = tl.load(query_of + pair)
    key_head = tl.load(key_of + pair)
    row = first_row + tl.arange(0, BM)
    before = keys - sequence
    queries = rows_of(q_desc, batch, query_head, first_row, BM, D)
    total = tl.zeros((BM, D), dtype=tl.float32)
    weight = tl.zeros((BM,), dtype=tl.float32)
    highest = tl.full((BM,), float("-inf"), dtype=tl.float32)
    if CAUSAL:
        whole = (first_row + before + 1) // BN * BN
        last = tl.minimum(first_row + before + BM, keys)
    else:
        whole = keys // BN * BN
        last = keys
    total, weight, highest = walk(
        total, weight, highest, queries, k_desc, v_desc, batch, key_head, row + before,
        0, whole, keys, scale, BM, BN, D, CAUSAL, False, PRECISION, STAGES,
    )  # fmt: skip
    total, weight, highest = walk(
        total, weight, highest, queries, k_desc, v_desc, batch, key_head, row + before,
        whole, last, keys, scale, BM, BN, D, CAUSAL, True, PRECISION, STAGES,
    )  # fmt: skip
    inside = row < sequence
    place = (batch * pairs + pair).to(tl.int64) * sequence + row
    tl.store(logsumexp + place, (highest + tl.log2(weight)) * LN2, mask=inside)
    total = total / weight[:, None]
    column = tl.arange(0, D)
    out += batch.to(tl.int64) * out_batch + pair.to(tl.int64) * out_head
    target = row.to(tl.int64)[:, None] * out_time + column[None, :]
    stored = inside[:, None] & (column < width)[None, :]
    tl.store(out + target, total.to(out.dtype.element_ty), mask=stored)
