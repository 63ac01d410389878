"""Backward in two parts: the values of every layer by itself, queries and keys once, at the source.

Square tiles are ``[key, query]``, so that none is transposed in registers: Triton 3.4 to 3.7.0 miscompiles
products with such an operand on Hopper (flash-linear-attention#640).
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def row_sums_kernel(  # type: ignore[no-untyped-def]
    slope,
    o,
    total,
    sequence,
    heads,
    s_batch,
    s_head,
    s_time,
    o_batch,
    o_head,
    o_time,
    D: tl.constexpr,
    BM: tl.constexpr,
    ADD: tl.constexpr,
):
    """``total (+)= rowsum(slope · o)`` of ``BM`` rows of one head."""
    head = tl.program_id(1)
    batch = tl.program_id(2).to(tl.int64)
    row = tl.program_id(0) * BM + tl.arange(0, BM)
    far = row.to(tl.int64)[:, None]
    width = tl.arange(0, D)[None, :]
    inside = (row < sequence)[:, None]
    slope += batch * s_batch + head.to(tl.int64) * s_head
    o += batch * o_batch + head.to(tl.int64) * o_head
    d_output = tl.load(slope + far * s_time + width, mask=inside, other=0.0).to(tl.float32)
    output = tl.load(o + far * o_time + width, mask=inside, other=0.0).to(tl.float32)
    line = total + (batch * heads + head) * sequence + row
    found = tl.sum(d_output * output, axis=1)
    if ADD:
        found += tl.load(line, mask=row < sequence, other=0.0)
    tl.store(line, found, mask=row < sequence)


@triton.jit
def _values_of(  # type: ignore[no-untyped-def]
    dv,
    keys,
    q,
    slope,
    lse,
    column,
    first,
    last,
    sequence,
    scale,
    q_time,
    s_time,
    D: tl.constexpr,
    BM: tl.constexpr,
    MASKED: tl.constexpr,
    EVEN: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    """One block of keys over the queries from ``first`` to before ``last``."""
    local = tl.arange(0, BM)
    width = tl.arange(0, D)
    q_tile = local[:, None] * q_time + width[None, :]
    s_tile = local[:, None] * s_time + width[None, :]
    for start in tl.range(first, last, BM, num_stages=STAGES):
        at = tl.cast(start, tl.int64)
        if EVEN:
            queries = tl.load(q + at * q_time + q_tile)
            d_output = tl.load(slope + at * s_time + s_tile)
            top = tl.load(lse + start + local) * LOG2E
        else:
            inside = start + local < sequence
            queries = tl.load(q + at * q_time + q_tile, mask=inside[:, None], other=0.0)
            d_output = tl.load(slope + at * s_time + s_tile, mask=inside[:, None], other=0.0)
            top = tl.load(lse + start + local, mask=inside, other=float("inf")) * LOG2E
        scores = tl.dot(keys, tl.trans(queries), input_precision=PRECISION) * scale
        shares = tl.exp2(scores - top[None, :])
        if MASKED:
            shares = tl.where(column[:, None] <= start + local[None, :], shares, 0.0)
        dv = tl.dot(shares.to(d_output.dtype), d_output, dv, input_precision=PRECISION)
    return dv


@triton.jit
def value_gradient_kernel(  # type: ignore[no-untyped-def]
    q,
    k,
    lse,
    slope,
    dv,
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
    s_batch,
    s_head,
    s_time,
    v_batch,
    v_head,
    v_time,
    D: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    EVEN: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    """dV of ``BN`` keys of one KV head: two products a tile, ``P = exp(K Qᵀ - lse)`` and ``P dO``."""
    first = tl.program_id(0) * BN  # the longest columns first
    kv_head = tl.program_id(1)
    batch = tl.program_id(2).to(tl.int64)
    column = first + tl.arange(0, BN)
    width = tl.arange(0, D)
    inside = (column < sequence)[:, None]
    far = column.to(tl.int64)[:, None]
    k += batch * k_batch + kv_head.to(tl.int64) * k_head
    keys = tl.load(k + far * k_time + width[None, :], mask=inside, other=0.0)
    total = tl.zeros((BN, D), dtype=tl.float32)
    for member in range(group):
        head = (kv_head * group + member).to(tl.int64)
        q_here = q + batch * q_batch + head * q_head
        s_here = slope + batch * s_batch + head * s_head
        line = lse + (batch * heads + head) * sequence
        total = _values_of(
            total, keys, q_here, s_here, line, column, first, tl.minimum(first + BN, sequence), sequence,
            scale, q_time, s_time,
            D=D, BM=BM, MASKED=True, EVEN=EVEN, PRECISION=PRECISION, STAGES=STAGES,
        )  # fmt: skip
        total = _values_of(
            total, keys, q_here, s_here, line, column, first + BN, sequence, sequence, scale, q_time, s_time,
            D=D, BM=BM, MASKED=False, EVEN=EVEN, PRECISION=PRECISION, STAGES=STAGES,
        )  # fmt: skip
    dv += batch * v_batch + kv_head.to(tl.int64) * v_head
    tl.store(dv + far * v_time + width[None, :], total.to(dv.dtype.element_ty), mask=inside)


@triton.jit
def tiles_before(  # type: ignore[no-untyped-def]
    block, rows, RATIO: tl.constexpr
):
    """Tiles of score gradients that are stored before those of the keys of ``block``.

    Block b of keys has those of ``rows - b · RATIO`` blocks of queries: none for queries before its keys.
    """
    return block * rows - RATIO * (block * (block - 1) // 2)


@triton.jit(do_not_specialize=["count", "first_pair", "first_member"])
def key_gradient_kernel(  # type: ignore[no-untyped-def]
    q,
    k,
    v,
    lse,
    sums,
    slope,
    slopes,
    values,
    places,
    count,
    scores_out,
    dk,
    dv,
    sequence,
    heads,
    group,
    kv_heads,
    first_pair,
    first_member,
    members,
    scale,
    sigma,
    q_batch,
    q_head,
    q_time,
    k_batch,
    k_head,
    k_time,
    v_batch,
    v_head,
    v_time,
    s_batch,
    s_head,
    s_time,
    c_batch,
    c_head,
    c_time,
    D: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    ADD: tl.constexpr,
    EVEN: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    """dK and dV of ``BN`` keys of one KV head, and its tiles of score gradients, over ``members`` heads.

    Layer c of the ``count`` that share has dO_c at ``slopes + places[2c]`` and V_c at ``values +
    places[2c+1]``, in elements. The tile of the score gradient is ``P · (Σ_c V_c dO_cᵀ - sums)``, in the
    inputs' dtype as the products need it. ``ADD``: dk and dv ``[B, kv heads, S, D]`` hold the sum of
    earlier members.
    """
    block = tl.program_id(0)  # the longest columns first
    pair = first_pair + tl.program_id(1)
    kv_head = (pair % kv_heads).to(tl.int64)
    batch = (pair // kv_heads).to(tl.int64)
    # Scalars in 64 bits move the pointers; offsets inside a tile are 32 bits, or each element's address would
    # take two registers of its own.
    start = tl.cast(block * BN, tl.int64)
    column = tl.arange(0, BN)
    local = tl.arange(0, BM)
    width = tl.arange(0, D)
    ahead = (block * BN + column < sequence)[:, None]
    k += batch * k_batch + kv_head * k_head + start * k_time
    v += batch * v_batch + kv_head * v_head + start * v_time
    values += batch * c_batch + kv_head * c_head + start * c_time
    keys = tl.load(k + (column[:, None] * k_time + width[None, :]), mask=ahead, other=0.0)
    own = tl.load(v + (column[:, None] * v_time + width[None, :]), mask=ahead, other=0.0)
    v_tile = column[:, None] * c_time + width[None, :]
    s_tile = local[:, None] * s_time + width[None, :]
    q_tile = local[:, None] * q_time + width[None, :]
    tile = column[:, None] * BM + local[None, :]
    shift = (batch * kv_heads + kv_head) * sequence * D + start * D
    dk += shift
    dv += shift
    if ADD:
        d_keys = tl.load(dk + (column[:, None] * D + width[None, :]), mask=ahead, other=0.0)
        d_values = tl.load(dv + (column[:, None] * D + width[None, :]), mask=ahead, other=0.0)
    else:
        d_keys = tl.zeros((BN, D), dtype=tl.float32)
        d_values = tl.zeros((BN, D), dtype=tl.float32)
    rows = tl.cdiv(sequence, BM)
    stored = tl.cast(tiles_before(tl.cdiv(sequence, BN), rows, RATIO=BN // BM), tl.int64)
    before = tiles_before(block, rows, RATIO=BN // BM)
    for member in range(members):
        head = kv_head * group + first_member + member
        line = (batch * heads + head) * sequence
        kept = scores_out + ((tl.program_id(1) * members + member) * stored + before) * (BM * BN)
        for row in range(block * (BN // BM), rows):
            at = tl.cast(row * BM, tl.int64)
            s_here = batch * s_batch + head * s_head + at * s_time
            inside = row * BM + local < sequence
            queries = tl.load(
                q + (batch * q_batch + head * q_head + at * q_time) + q_tile, mask=inside[:, None], other=0.0
            )
            d_output = tl.load(slope + s_here + s_tile, mask=inside[:, None], other=0.0)
            top = tl.load(lse + (line + at) + local, mask=inside, other=float("inf")) * LOG2E
            scores = tl.dot(keys, tl.trans(queries), input_precision=PRECISION) * scale
            shares = tl.exp2(scores - top[None, :])
            shares = tl.where((block * BN + column)[:, None] <= (row * BM + local)[None, :], shares, 0.0)
            d_values = tl.dot(shares.to(d_output.dtype), d_output, d_values, input_precision=PRECISION)
            inner = tl.dot(own, tl.trans(d_output), input_precision=PRECISION)
            # A layer's place is read a turn ahead of its tiles.
            d_place = tl.load(places)
            v_place = tl.load(places + 1)
            for c in tl.range(count, num_stages=STAGES):
                d_here = tl.multiple_of(slopes + (s_here + d_place), 16) + s_tile
                v_here = tl.multiple_of(values + v_place, 16) + v_tile
                if EVEN:
                    theirs = tl.load(d_here)
                    their_values = tl.load(v_here)
                else:
                    theirs = tl.load(d_here, mask=inside[:, None], other=0.0)
                    their_values = tl.load(v_here, mask=ahead, other=0.0)
                following = tl.minimum(c + 1, count - 1) * 2
                d_place = tl.load(places + following)
                v_place = tl.load(places + following + 1)
                inner = tl.dot(their_values, tl.trans(theirs), inner, input_precision=PRECISION)
            sum_here = tl.load(sums + (line + at) + local, mask=inside, other=0.0)
            d_scores = (shares * (inner - sum_here[None, :])).to(queries.dtype)
            tl.store(kept + tl.cast(row - block * (BN // BM), tl.int64) * (BM * BN) + tile, d_scores)
            d_keys = tl.dot(d_scores, queries, d_keys, input_precision=PRECISION)
    if first_member + members == group:
        d_keys *= sigma
    place = column[:, None] * D + width[None, :]
    tl.store(dk + place, d_keys.to(dk.dtype.element_ty), mask=ahead)
    tl.store(dv + place, d_values.to(dv.dtype.element_ty), mask=ahead)


@triton.jit(do_not_specialize=["first_pair", "first_member"])
def query_gradient_kernel(  # type: ignore[no-untyped-def]
    k,
    scores,
    dq,
    sequence,
    heads,
    group,
    kv_heads,
    first_pair,
    first_member,
    members,
    sigma,
    k_batch,
    k_head,
    k_time,
    D: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    """dQ of ``BM`` rows of one query head out of the tiles ``[key, query]`` of score gradients."""
    row = tl.num_programs(0) - 1 - tl.program_id(0)  # the longest rows first
    pair = first_pair + tl.program_id(1)
    member = tl.program_id(2)
    kv_head = (pair % kv_heads).to(tl.int64)
    batch = (pair // kv_heads).to(tl.int64)
    head = kv_head * group + first_member + member
    width = tl.arange(0, D)
    local = tl.arange(0, BM)
    column = tl.arange(0, BN)
    rows = tl.cdiv(sequence, BM)
    stored = tl.cast(tiles_before(tl.cdiv(sequence, BN), rows, RATIO=BN // BM), tl.int64)
    scores += (tl.program_id(1) * members + member) * stored * (BM * BN)
    k += batch * k_batch + kv_head * k_head
    tile = column[None, :] * BM + local[:, None]
    total = tl.zeros((BM, D), dtype=tl.float32)
    for block in tl.range(0, row // (BN // BM) + 1, num_stages=STAGES):
        spot = tiles_before(block, rows, RATIO=BN // BM) + row - block * (BN // BM)
        d_scores = tl.load(scores + tl.cast(spot, tl.int64) * (BM * BN) + tile)
        ahead = (block * BN + column < sequence)[:, None]
        far = tl.cast(block * BN, tl.int64)
        keys = tl.load(k + far * k_time + column[:, None] * k_time + width[None, :], mask=ahead, other=0.0)
        total = tl.dot(d_scores, keys, total, input_precision=PRECISION)
    place = row * BM + local
    out = ((batch * heads + head) * sequence + place.to(tl.int64)) * D
    tl.store(
        dq + out[:, None] + width[None, :],
        (total * sigma).to(dq.dtype.element_ty),
        mask=(place < sequence)[:, None],
    )
