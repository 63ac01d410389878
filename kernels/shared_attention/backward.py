"""Backward in two parts: the values of every layer by itself, queries and keys once, at the source.

Tensors come as TMA descriptors ``[B, heads, tokens, values]``, which fill what lies beyond the tokens with
zeros, and log-sum-exps and row sums as ``[B · heads, tokens]``: rows beyond the sequence weigh something
finite, and their slopes and sums are 0. Products begin with what is to be taken off them, which needs no
registers of its own; a line loaded through TMA needs none for its addresses either.

Square tiles are ``[key, query]``, so that none is transposed in registers: Triton 3.4 to 3.7.0 miscompiles
products with such an operand on Hopper (flash-linear-attention#640).
"""

import triton
import triton.language as tl

from flashtrain.kernels.pairing_attention.forward import rows_of


@triton.jit
def take_slope_kernel(  # type: ignore[no-untyped-def]
    slope,
    o,
    total,
    kept,
    sequence,
    heads,
    s_batch,
    s_head,
    s_time,
    o_batch,
    o_head,
    o_time,
    kept_batch,
    kept_head,
    kept_time,
    D: tl.constexpr,
    BM: tl.constexpr,
    ADD: tl.constexpr,
):
    """``total (+)= rowsum(slope · o)`` of ``BM`` rows of one head, and the slope in ``kept`` as well."""
    head = tl.program_id(1)
    batch = tl.program_id(2).to(tl.int64)
    row = tl.program_id(0) * BM + tl.arange(0, BM)
    far = row.to(tl.int64)[:, None]
    width = tl.arange(0, D)[None, :]
    inside = (row < sequence)[:, None]
    slope += batch * s_batch + head.to(tl.int64) * s_head
    o += batch * o_batch + head.to(tl.int64) * o_head
    kept += batch * kept_batch + head.to(tl.int64) * kept_head
    d_output = tl.load(slope + far * s_time + width, mask=inside, other=0.0)
    tl.store(kept + far * kept_time + width, d_output, mask=inside)
    output = tl.load(o + far * o_time + width, mask=inside, other=0.0).to(tl.float32)
    line = total + (batch * heads + head) * sequence + row
    found = tl.sum(d_output.to(tl.float32) * output, axis=1)
    if ADD:
        found += tl.load(line, mask=row < sequence, other=0.0)
    tl.store(line, found, mask=row < sequence)


@triton.jit
def shares_of(  # type: ignore[no-untyped-def]
    keys,
    queries,
    lse_desc,
    line,
    start,
    column,
    scale,
    root,
    BM: tl.constexpr,
    MASKED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """``exp(K Qᵀ / root - lse)``, ``[keys, BM]`` of the queries from ``start`` on.

    ``scale`` is log2(e) / root.
    """
    begin = lse_desc.load([line, start]).reshape(BM) * -root
    begin = tl.broadcast_to(begin[None, :], (keys.shape[0], BM))
    shares = tl.exp2(tl.dot(keys, queries.T, begin, input_precision=PRECISION) * scale)
    if MASKED:
        shares = tl.where(column[:, None] <= start + tl.arange(0, BM)[None, :], shares, 0.0)
    return shares


@triton.jit
def _values_of(  # type: ignore[no-untyped-def]
    total,
    keys,
    q_desc,
    s_desc,
    lse_desc,
    batch,
    head,
    line,
    column,
    first,
    last,
    scale,
    root,
    D: tl.constexpr,
    BM: tl.constexpr,
    MASKED: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    """One block of keys over the queries from ``first`` to before ``last``."""
    for start in tl.range(first, last, BM, num_stages=STAGES):
        queries = rows_of(q_desc, batch, head, start, BM, D)
        shares = shares_of(keys, queries, lse_desc, line, start, column, scale, root, BM, MASKED, PRECISION)
        d_output = rows_of(s_desc, batch, head, start, BM, D)
        total = tl.dot(shares.to(s_desc.dtype), d_output, total, input_precision=PRECISION)
    return total


@triton.jit
def value_gradient_kernel(  # type: ignore[no-untyped-def]
    q_desc,
    k_desc,
    s_desc,
    lse_desc,
    dv,
    sequence,
    group,
    kv_heads,
    scale,
    root,
    v_batch,
    v_head,
    v_time,
    D: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    """dV of ``BN`` keys of one KV head: two products a tile, ``P = exp(K Qᵀ - lse)`` and ``P dO``."""
    kv_head = tl.program_id(0) % kv_heads
    batch = tl.program_id(0) // kv_heads
    first = tl.program_id(1) * BN  # the longest columns first
    column = first + tl.arange(0, BN)
    keys = rows_of(k_desc, batch, kv_head, first, BN, D)
    total = tl.zeros((BN, D), dtype=tl.float32)
    for member in range(group):
        head = kv_head * group + member
        line = batch * kv_heads * group + head
        total = _values_of(
            total, keys, q_desc, s_desc, lse_desc, batch, head, line, column, first,
            tl.minimum(first + BN, sequence), scale, root,
            D=D, BM=BM, MASKED=True, PRECISION=PRECISION, STAGES=STAGES,
        )  # fmt: skip
        total = _values_of(
            total, keys, q_desc, s_desc, lse_desc, batch, head, line, column, first + BN, sequence, scale,
            root, D=D, BM=BM, MASKED=False, PRECISION=PRECISION, STAGES=STAGES,
        )  # fmt: skip
    dv += batch.to(tl.int64) * v_batch + kv_head.to(tl.int64) * v_head
    place = column.to(tl.int64)[:, None] * v_time + tl.arange(0, D)[None, :]
    tl.store(dv + place, total.to(dv.dtype.element_ty), mask=(column < sequence)[:, None])


@triton.jit
def tiles_before(row):  # type: ignore[no-untyped-def]
    """Tiles of score gradients that are stored before those of ``row``: row r has r + 1 of them."""
    return row * (row + 1) // 2


@triton.jit(do_not_specialize=["depth", "first_pair", "first_member"])
def score_gradient_kernel(  # type: ignore[no-untyped-def]
    q_desc,
    k_desc,
    slopes_desc,
    values_desc,
    lse_desc,
    sums_desc,
    order,
    depth,
    tiles_out,
    sequence,
    group,
    kv_heads,
    first_pair,
    first_member,
    members,
    scale,
    root,
    D: tl.constexpr,
    TILE: tl.constexpr,
    BK: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    """One tile of the score gradients of one query head, ``P · (VV DOᵀ - sums)``, summed over all layers.

    ``slopes`` and ``values`` have the layers side by side, ``depth`` values a token, so that their sum is one
    product. Tiles come in the ``order`` of a table of ``key tile + row tile << 16``.
    """
    word = tl.load(order + tl.program_id(0))
    block = word & 0xFFFF
    row = word >> 16
    pair = first_pair + tl.program_id(1) // members
    kv_head = pair % kv_heads
    batch = pair // kv_heads
    head = kv_head * group + first_member + tl.program_id(1) % members
    line = batch * kv_heads * group + head
    column = tl.arange(0, TILE)
    keys = rows_of(k_desc, batch, kv_head, block * TILE, TILE, D)
    queries = rows_of(q_desc, batch, head, row * TILE, TILE, D)
    shares = shares_of(
        keys, queries, lse_desc, line, row * TILE, block * TILE + column, scale, root, TILE, True, PRECISION
    ).to(q_desc.dtype)  # half of the registers while the product goes on
    inner = tl.broadcast_to(-sums_desc.load([line, row * TILE]), (TILE, TILE))
    for start in tl.range(0, depth, BK, num_stages=STAGES):
        slopes = slopes_desc.load([batch, head, row * TILE, start]).reshape(TILE, BK)
        values = values_desc.load([batch, kv_head, block * TILE, start]).reshape(TILE, BK)
        inner = tl.dot(values, slopes.T, inner, input_precision=PRECISION)
    stored = tl.cast(tiles_before(tl.cdiv(sequence, TILE)), tl.int64)
    tiles_out += (tl.program_id(1) * stored + tiles_before(row) + block) * (TILE * TILE)
    place = column[:, None] * TILE + tl.arange(0, TILE)[None, :]
    tl.store(tiles_out + place, (shares * inner).to(tiles_out.dtype.element_ty))


@triton.jit(do_not_specialize=["first_pair", "first_member"])
def query_gradient_kernel(  # type: ignore[no-untyped-def]
    k_desc,
    tiles_desc,
    dq,
    sequence,
    group,
    kv_heads,
    first_pair,
    first_member,
    members,
    sigma,
    D: tl.constexpr,
    TILE: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    """dQ ``[B, H, S, D]`` of a tile of rows of one query head out of the tiles of score gradients."""
    row = tl.num_programs(0) - 1 - tl.program_id(0)  # the longest rows first
    pair = first_pair + tl.program_id(1)
    member = tl.program_id(2)
    kv_head = pair % kv_heads
    batch = pair // kv_heads
    stored = tiles_before(tl.cdiv(sequence, TILE))
    first = (tl.program_id(1) * members + member) * stored + tiles_before(row)
    total = tl.zeros((TILE, D), dtype=tl.float32)
    for block in tl.range(0, row + 1, num_stages=STAGES):
        d_scores = tiles_desc.load([(first + block) * TILE, 0])
        keys = rows_of(k_desc, batch, kv_head, block * TILE, TILE, D)
        total = tl.dot(d_scores.T, keys, total, input_precision=PRECISION)
    place = row * TILE + tl.arange(0, TILE)
    line = batch * kv_heads * group + kv_head * group + first_member + member
    dq += (line.to(tl.int64) * sequence + place)[:, None] * D + tl.arange(0, D)[None, :]
    tl.store(dq, (total * sigma).to(dq.dtype.element_ty), mask=(place < sequence)[:, None])


@triton.jit(do_not_specialize=["first_pair", "first_member"])
def key_gradient_kernel(  # type: ignore[no-untyped-def]
    q_desc,
    tiles_desc,
    dk,
    sequence,
    group,
    kv_heads,
    first_pair,
    first_member,
    members,
    sigma,
    D: tl.constexpr,
    TILE: tl.constexpr,
    ADD: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    """dK ``[B, kv heads, S, D]`` of a tile of keys of one KV head, over ``members`` query heads.

    ``ADD``: dk holds the sum of earlier members.
    """
    block = tl.program_id(0)  # the longest columns first
    pair = first_pair + tl.program_id(1)
    kv_head = pair % kv_heads
    batch = pair // kv_heads
    rows = tl.cdiv(sequence, TILE)
    place = block * TILE + tl.arange(0, TILE)
    inside = (place < sequence)[:, None]
    dk += (pair.to(tl.int64) * sequence + place)[:, None] * D + tl.arange(0, D)[None, :]
    total = tl.load(dk, mask=inside, other=0.0) if ADD else tl.zeros((TILE, D), dtype=tl.float32)
    count = rows - block
    for step in tl.range(0, count * members, num_stages=STAGES):
        member = step // count
        row = block + step % count
        head = kv_head * group + first_member + member
        tile = (tl.program_id(1) * members + member) * tiles_before(rows) + tiles_before(row) + block
        d_scores = tiles_desc.load([tile * TILE, 0])
        queries = rows_of(q_desc, batch, head, row * TILE, TILE, D)
        total = tl.dot(d_scores, queries, total, input_precision=PRECISION)
    if first_member + members == group:
        total *= sigma
    tl.store(dk, total.to(dk.dtype.element_ty), mask=inside)
