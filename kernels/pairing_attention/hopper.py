"""The backward kernel of five products for Hopper, in warps that each do one thing (Gluon).

What it computes, for which blocks and in which order of additions is ``attention_gradient_kernel``'s, whose
neighbours in ``backward.py`` prepare its sums and round dQ. Here a block has four partitions that meet at
barriers in shared memory alone, so that exponentials of one run under products of another, as in
FlashAttention-3 (arXiv 2407.08608):

- two ``consume``: each owns half of the keys, so its scores, weights, dK and dV stay in its registers. Its
  half of dS goes to shared memory, where both read all of it: each makes half of dQ's part, one step later,
  so that neither waits for the other's exponentials.
- ``produce``, a warp that loads keys and values once, then tiles of queries and of dO ahead through TMA.
- ``add``, a warp that adds each part to dQ in global memory, when its turn has come (``turns.py``).

Of a buffer, ``full`` is a barrier where those who fill it arrive, ``empty`` where those who read it do. The
nth use of a buffer is phase n of both: who reads waits for ``full`` of n, who fills for ``empty`` of n - 1.
What was written by threads and is read by TMA or by products is fenced by the writer, before it arrives.
"""

from triton._C.libtriton import ir
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language._core import builtin
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.tools.tensor_descriptor import TensorDescriptor as PlainDescriptor

from flashtrain.kernels.pairing_attention import config

HALF = gl.constexpr(config.HALF)  # what a consumer owns of the keys, and of dQ's part
KEYS = gl.constexpr(2 * config.HALF)  # of a block
STAGES = gl.constexpr(2)
LOG2E = gl.constexpr(1.4426950408889634)


def with_layout(plain: PlainDescriptor) -> TensorDescriptor:
    """``plain`` with the layout that the kernel wants in shared memory: swizzled lines of 128 bytes."""
    swizzle = 128 if len(plain.shape) > 1 else 0
    layout = gl.NVMMASharedLayout(swizzle, 8 * plain.base.element_size(), len(plain.shape))
    return TensorDescriptor(plain.base, plain.shape, plain.strides, plain.block_shape, layout)


@builtin
def add_shared(desc, place, source, _semantic=None):  # type: ignore[no-untyped-def]
    """Begin to add ``source`` in shared memory to the tile at ``place`` of ``desc``, through TMA."""
    place = _semantic._convert_to_ir_values(place, require_i64=False)
    _semantic.builder.create_async_tma_reduce(
        ir.DESCRIPTOR_REDUCE_KIND.ADD, desc.handle, place, source.handle
    )


@gluon.jit
def await_turn(counter, turn):  # type: ignore[no-untyped-def]
    """Wait until ``counter`` is ``turn``; returns 0, to be added to what must not happen before."""
    return gl.inline_asm_elementwise(
        """
        {
        .reg .pred p;
        .reg .b32 v;
        POLL:
        ld.acquire.gpu.global.b32 v, [$1];
        setp.ge.s32 p, v, $2;
        @p bra READY;
        nanosleep.u32 20;
        bra POLL;
        READY:
        fence.proxy.async.global;
        mov.u32 $0, 0;
        }
        """,
        "=r,l,r",
        [counter, turn],
        dtype=gl.int32,
        is_pure=False,
        pack=1,
    )


@gluon.jit
def pass_turn(counter, done):  # type: ignore[no-untyped-def]
    """Let ``counter`` be ``done`` once this warp's additions have arrived."""
    gl.inline_asm_elementwise(
        """
        {
        .reg .pred p;
        .reg .b32 v;
        cp.async.bulk.wait_group 0;
        bar.warp.sync 0xffffffff;
        mov.u32 v, %laneid;
        setp.ne.u32 p, v, 0;
        @p bra DONE;
        st.release.gpu.global.b32 [$1], $2;
        DONE:
        bar.warp.sync 0xffffffff;
        mov.u32 $0, 0;
        }
        """,
        "=r,l,r",
        [counter, done],
        dtype=gl.int32,
        is_pure=False,
        pack=1,
    )


@gluon.jit
def produce(  # type: ignore[no-untyped-def]
    q_desc, do_desc, k_desc, v_desc, norm_desc, mean_desc, visits, count, high, steps, batch, head, start,
    pairs, tiles, q_tiles, do_tiles, k_tile, v_tile, norms, means, owned, full, empty,
    BM: gl.constexpr,
    D: gl.constexpr,
):  # fmt: skip
    """Keys and values into ``owned``, then for each step queries, dO and the numbers of their rows."""
    mbarrier.expect(owned, 2 * KEYS * D * 2)
    for half in gl.static_range(2):
        place = [batch, head, start + half * HALF, 0]
        tma.async_copy_global_to_shared(k_desc, place, owned, k_tile.index(half))
        tma.async_copy_global_to_shared(v_desc, place, owned, v_tile.index(half))
    for step in range(steps):
        visit = gl.load(visits + step % count)
        tile = high - 1 - step // count
        pair = (visit & 0xFFFF).to(gl.int32)
        query = (visit >> 16 & 0xFFFF).to(gl.int32)
        stage = step % STAGES
        line = ((batch * pairs + pair) * tiles + tile) * BM
        mbarrier.wait(empty.index(stage), step // STAGES & 1 ^ 1)
        filled = full.index(stage)
        mbarrier.expect(filled, 2 * BM * D * 2 + 2 * BM * 4)
        tma.async_copy_global_to_shared(q_desc, [batch, query, tile * BM, 0], filled, q_tiles.index(stage))
        tma.async_copy_global_to_shared(norm_desc, [line], filled, norms.index(stage))
        tma.async_copy_global_to_shared(do_desc, [batch, pair, tile * BM, 0], filled, do_tiles.index(stage))
        tma.async_copy_global_to_shared(mean_desc, [line], filled, means.index(stage))


@gluon.jit
def add(  # type: ignore[no-untyped-def]
    dq_desc, counters, visits, count, high, steps, tile_of_keys, batch, queries, tiles, dq_part, full, empty,
    BM: gl.constexpr,
    D: gl.constexpr,
):  # fmt: skip
    """Each step's part of dQ into the sums, in turn."""
    for step in range(steps):
        visit = gl.load(visits + step % count)
        tile = high - 1 - step // count
        query = (visit >> 16 & 0xFFFF).to(gl.int32)
        turn = tile_of_keys * (visit >> 48 & 0xFFFF).to(gl.int32) + (visit >> 32 & 0xFFFF).to(gl.int32)
        slot = (batch * queries + query) * tiles + tile
        mbarrier.wait(full, step & 1)
        row = slot * D + await_turn(counters + slot, turn)
        for half in gl.static_range(2):
            if D == KEYS:
                add_shared(dq_desc, [row + half * HALF, 0], dq_part.index(half))
            else:
                add_shared(dq_desc, [row, half * HALF], dq_part.index(half))
        tma.store_wait(0)
        mbarrier.arrive(empty)
        pass_turn(counters + slot, turn + 1)


@gluon.jit
def part_of_queries(keys, d_scores, stage, half: gl.constexpr, D: gl.constexpr):  # type: ignore[no-untyped-def]
    """A half of dQ's part, ``[64, 64]`` of ``[D, rows]``, from all keys' dS; not awaited."""
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HALF, 16])
    square: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    element: gl.constexpr = keys.dtype
    # 128 bytes wide, tiles lie side by side: at D 128 those of keys, else those of dS.
    if D == KEYS:
        panels = keys._reinterpret(element, [4, HALF, HALF], square)
        first, second = panels.index(half), panels.index(2 + half)
        below, above = d_scores.index(2 * stage), d_scores.index(2 * stage + 1)
    else:
        panels = d_scores._reinterpret(element, [STAGES * 4, HALF, HALF], square)
        first, second = keys.index(0).reshape([HALF, HALF]), keys.index(1).reshape([HALF, HALF])
        below, above = panels.index(4 * stage + half), panels.index(4 * stage + 2 + half)
    part = gl.zeros([HALF, HALF], gl.float32, layout)
    part = warpgroup_mma(first.permute((1, 0)), below, part, use_acc=False, is_async=True)
    return warpgroup_mma(second.permute((1, 0)), above, part, is_async=True)


@gluon.jit
def consume(  # type: ignore[no-untyped-def]
    d_key, d_value, count, high, steps, start, target, before, keys, width, scale, out_time,
    q_tiles, do_tiles, k_tile, v_tile, norms, means, d_scores, dq_part,
    owned, full, empty, ds_full, ds_empty, dq_full, dq_empty,
    half: gl.constexpr,
    BM: gl.constexpr,
    D: gl.constexpr,
    CAUSAL: gl.constexpr,
):  # fmt: skip
    """dK and dV of half of the keys, and a half of each step's part of dQ."""
    element: gl.constexpr = q_tiles.dtype
    flat: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BM, 16])
    wide: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    operand: gl.constexpr = gl.DotOperandLayout(0, wide, 2)
    start += half * HALF
    column = start + gl.arange(0, HALF, gl.SliceLayout(1, flat))
    if CAUSAL:
        whole = (start + HALF - 1 - before + BM - 1) // BM * BM  # rows from here on see all keys
        edge = column - before
    else:
        whole = gl.where(start + HALF > keys, high * BM, 0)
        edge = column
    keys_tile = k_tile.index(half).reshape([HALF, D])
    values_tile = v_tile.index(half).reshape([HALF, D])
    d_keys = gl.zeros([HALF, D], gl.float32, wide)
    d_values = gl.zeros([HALF, D], gl.float32, wide)
    nothing = gl.zeros([HALF, BM], gl.float32, flat)
    mbarrier.wait(owned, 0)
    for step in range(steps):
        stage = step % STAGES
        row = (high - 1 - step // count) * BM
        rows = q_tiles.index(stage).reshape([BM, D])
        slopes = do_tiles.index(stage).reshape([BM, D])
        # dQ's part of the step before; in the first step of what happens to be there, and it goes nowhere.
        mbarrier.wait(ds_full.index(stage ^ 1), (step - 1) // STAGES & 1, pred=step > 0)
        part = part_of_queries(k_tile, d_scores, stage ^ 1, half, D)
        mbarrier.wait(full.index(stage), step // STAGES & 1)
        scores = warpgroup_mma(keys_tile, rows.permute((1, 0)), nothing, use_acc=False, is_async=True)
        part = warpgroup_mma_wait(1, [part])
        if step > 0:
            mbarrier.arrive(ds_empty.index(stage ^ 1))
            mbarrier.wait(dq_empty, step & 1)
            dq_part.index(half).store(part)
            fence_async_shared()
            mbarrier.arrive(dq_full)
        slope = warpgroup_mma(values_tile, slopes.permute((1, 0)), nothing, use_acc=False, is_async=True)
        scores = warpgroup_mma_wait(1, [scores])
        norm = norms.index(stage).load(gl.SliceLayout(0, flat)) * scale
        weights = gl.exp2(scores * scale + norm[None, :])
        if row < whole:
            if CAUSAL:
                seen = edge[:, None] <= (row + gl.arange(0, BM, gl.SliceLayout(0, flat)))[None, :]
            else:
                seen = (edge < keys)[:, None] & (gl.arange(0, BM, gl.SliceLayout(0, flat)) >= 0)[None, :]
            weights = gl.where(seen, weights, 0.0)
        left = gl.convert_layout(weights.to(element), operand)
        d_values = warpgroup_mma(left, slopes, d_values, is_async=True)
        slope = warpgroup_mma_wait(1, [slope])
        mean = means.index(stage).load(gl.SliceLayout(0, flat))
        found = (weights * (slope + mean[None, :])).to(element)
        mbarrier.wait(ds_empty.index(stage), step // STAGES & 1 ^ 1)
        d_scores.index(2 * stage + half).store(found)
        fence_async_shared()
        mbarrier.arrive(ds_full.index(stage))
        d_keys = warpgroup_mma(gl.convert_layout(found, operand), rows, d_keys, is_async=True)
        d_keys, d_values = warpgroup_mma_wait(0, [d_keys, d_values])
        mbarrier.arrive(empty.index(stage))
    if steps > 0:
        stage = (steps - 1) % STAGES
        mbarrier.wait(ds_full.index(stage), (steps - 1) // STAGES & 1)
        part = warpgroup_mma_wait(0, [part_of_queries(k_tile, d_scores, stage, half, D)])
        mbarrier.wait(dq_empty, steps & 1)
        dq_part.index(half).store(part)
        fence_async_shared()
        mbarrier.arrive(dq_full)
    token = start + gl.arange(0, HALF, gl.SliceLayout(1, wide))
    across = gl.arange(0, D, gl.SliceLayout(0, wide))
    target += token.to(gl.int64)[:, None] * out_time + across[None, :]
    # Widths are eights, which lets two values be stored at once.
    inside = (token < keys)[:, None] & (across < width // 8 * 8)[None, :]
    # ``scale`` has log2(e) in it, for the scores.
    gl.store(d_key + target, (d_keys * (scale / LOG2E)).to(d_key.dtype.element_ty), mask=inside)
    gl.store(d_value + target, d_values.to(d_value.dtype.element_ty), mask=inside)


# A number that is 1 is no constant: kernels for it would have to be compiled and tested beside the others.
@gluon.jit(do_not_specialize=["pairs", "queries", "heads", "splits", "blocks", "sequence", "keys", "width"])
def attention_gradient_hopper(  # type: ignore[no-untyped-def]
    q_desc,
    k_desc,
    v_desc,
    do_desc,
    dq_desc,
    norm_desc,
    mean_desc,
    d_key,
    d_value,
    counters,
    visits,
    pairs,
    queries,
    heads,
    splits,
    blocks,
    sequence,
    keys,
    width,
    scale,
    out_split,
    out_batch,
    out_head,
    out_time,
    BM: gl.constexpr,
    D: gl.constexpr,
    CAUSAL: gl.constexpr,
):
    """dK and dV of a tile of 128 keys of one KV head, and its part of dQ; see ``attention_gradient_kernel``.

    Heads of ``D`` 64 are met 128 rows at a time, of 128 64: in both a consumer's part of dQ is ``[64, 64]``.
    """
    number = gl.atomic_add(counters, 1)
    counters += 1
    tile_of_keys = number // blocks
    split = number % splits
    head = number % blocks // splits % heads
    batch = number % blocks // splits // heads
    start = tile_of_keys * KEYS
    before = keys - sequence
    tiles = gl.cdiv(sequence, BM)
    low = 0
    if CAUSAL:
        low = gl.maximum(start - before, 0) // BM
    first = gl.load(visits + head).to(gl.int32)
    met = gl.load(visits + head + 1).to(gl.int32) - first
    at = first + met * split // splits
    count = first + met * (split + 1) // splits - at
    visits += heads + 1 + at
    steps = (tiles - low) * count
    target = split.to(gl.int64) * out_split + batch.to(gl.int64) * out_batch + head.to(gl.int64) * out_head

    tile: gl.constexpr = q_desc.layout
    element: gl.constexpr = q_desc.dtype
    q_tiles = gl.allocate_shared_memory(element, [STAGES, 1, 1, BM, D], tile)
    do_tiles = gl.allocate_shared_memory(element, [STAGES, 1, 1, BM, D], tile)
    k_tile = gl.allocate_shared_memory(element, [2, 1, 1, HALF, D], tile)
    v_tile = gl.allocate_shared_memory(element, [2, 1, 1, HALF, D], tile)
    norms = gl.allocate_shared_memory(gl.float32, [STAGES, BM], norm_desc.layout)
    means = gl.allocate_shared_memory(gl.float32, [STAGES, BM], mean_desc.layout)
    square: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    d_scores = gl.allocate_shared_memory(element, [STAGES * 2, HALF, BM], square)
    dq_part = gl.allocate_shared_memory(gl.float32, [2, HALF, HALF], dq_desc.layout)
    line: gl.constexpr = mbarrier.MBarrierLayout()
    owned = gl.allocate_shared_memory(gl.int64, [1], line)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], line)
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], line)
    ds_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], line)
    ds_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], line)
    dq_full = gl.allocate_shared_memory(gl.int64, [1], line)
    dq_empty = gl.allocate_shared_memory(gl.int64, [1], line)
    mbarrier.init(owned, 1)
    mbarrier.init(dq_full, 2)
    mbarrier.init(dq_empty, 1)
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), 1)
        mbarrier.init(empty.index(stage), 2)
        mbarrier.init(ds_full.index(stage), 2)
        mbarrier.init(ds_empty.index(stage), 2)
    fence_async_shared()

    gl.warp_specialize(
        [
            (consume, (
                d_key, d_value, count, tiles, steps, start, target, before, keys, width, scale, out_time,
                q_tiles, do_tiles, k_tile, v_tile, norms, means, d_scores, dq_part,
                owned, full, empty, ds_full, ds_empty, dq_full, dq_empty, 0, BM, D, CAUSAL,
            )),
            (consume, (
                d_key, d_value, count, tiles, steps, start, target, before, keys, width, scale, out_time,
                q_tiles, do_tiles, k_tile, v_tile, norms, means, d_scores, dq_part,
                owned, full, empty, ds_full, ds_empty, dq_full, dq_empty, 1, BM, D, CAUSAL,
            )),
            (produce, (
                q_desc, do_desc, k_desc, v_desc, norm_desc, mean_desc, visits, count, tiles, steps, batch,
                head, start, pairs, tiles, q_tiles, do_tiles, k_tile, v_tile, norms, means, owned, full,
                empty, BM, D,
            )),
            (add, (
                dq_desc, counters, visits, count, tiles, steps, tile_of_keys, batch, queries, tiles, dq_part,
                dq_full, dq_empty, BM, D,
            )),
        ],
        [4, 1, 1],
        [240, 24, 24],
    )  # fmt: skip
