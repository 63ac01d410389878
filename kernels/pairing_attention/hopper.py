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

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.tools.tensor_descriptor import TensorDescriptor as PlainDescriptor

from flashtrain.kernels.pairing_attention.hopper_consume import HALF, KEYS, STAGES, consume
from flashtrain.kernels.pairing_attention.hopper_turns import add_shared, await_turn, pass_turn


def with_layout(plain: PlainDescriptor) -> TensorDescriptor:
    """``plain`` with the layout that the kernel wants in shared memory: swizzled lines of 128 bytes."""
    swizzle = 128 if len(plain.shape) > 1 else 0
    layout = gl.NVMMASharedLayout(swizzle, 8 * plain.base.element_size(), len(plain.shape))
    return TensorDescriptor(plain.base, plain.shape, plain.strides, plain.block_shape, layout)


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


# A number that is 1 is no constant: kernels for it would have to be compiled and tested beside the others.
@gluon.jit(
    do_not_specialize=[
        "pairs",
        "queries",
        "heads",
        "splits",
        "blocks",
        "section",
        "sequence",
        "keys",
        "width",
    ]
)
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
    section,
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
    behind = number // (section * gl.cdiv(keys, KEYS)) * section
    number -= behind * gl.cdiv(keys, KEYS)
    section = gl.minimum(section, blocks - behind)
    tile_of_keys = number // section
    place = behind + number % section
    split = place % splits
    head = place // splits % heads
    batch = place // splits // heads
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
