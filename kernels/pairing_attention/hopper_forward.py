"""The forward kernel for Hopper, in warps that each do one thing (Gluon).

What it computes is ``attention_kernel``'s, in another order of additions. Blocks stay while there are tiles
of rows: each draws the number of its next one, 128 rows of a pair, from a counter, so that none waits long
for the last; what becomes of a tile does not depend on who draws it. Three partitions of a block meet at
barriers, as in FlashAttention-3 (arXiv 2407.08608):

- two ``consume``: each owns 64 of the rows, whose sums stay in its registers. Scores of a tile of keys and
  the values of the tile before are multiplied while it takes the exponentials of those scores. The two begin
  their products in turn, so that those of one run under the exponentials of the other.
- ``produce``, a warp that draws numbers and loads queries, keys and values ahead through TMA.

Of a buffer, ``full`` is a barrier where those who fill it arrive, ``empty`` where those who read it do. The
nth use of a buffer is phase n of both: who reads waits for ``full`` of n, who fills for ``empty`` of n - 1.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma

from flashtrain.kernels.pairing_attention.hopper_forward_consume import HALF, READY, ROWS, consume, place_of


@gluon.jit
def produce(  # type: ignore[no-untyped-def]
    q_desc, k_desc, v_desc, query_of, key_of, counter, total, tiles, section, pairs, before, keys,
    numbers, q_tiles, k_tiles, v_tiles, q_full, q_empty, k_full, k_empty, v_full, v_empty,
    BN: gl.constexpr,
    D: gl.constexpr,
    STAGES: gl.constexpr,
    CAUSAL: gl.constexpr,
):  # fmt: skip
    """For each tile of rows its number and queries, then keys and values tile by tile; at last ``total``."""
    one: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    step = 0
    turn = 0
    number = gl.atomic_add(counter, 1)
    while number < total:
        row, pair, batch, steps = place_of(number, tiles, section, pairs, before, keys, BN, CAUSAL)
        query = gl.load(query_of + pair)
        head = gl.load(key_of + pair)
        slot = turn % READY
        mbarrier.wait(q_empty.index(slot), turn // READY & 1 ^ 1)
        numbers.index(slot).store(gl.full([1], number, gl.int32, one))
        filled = q_full.index(slot)
        mbarrier.expect(filled, ROWS * D * 2)
        for half in gl.static_range(2):
            place = [batch, query, row + half * HALF, 0]
            tma.async_copy_global_to_shared(q_desc, place, filled, q_tiles.index(2 * slot + half))
        for tile in range(steps):
            stage = step % STAGES
            phase = step // STAGES & 1 ^ 1
            mbarrier.wait(k_empty.index(stage), phase)
            mbarrier.expect(k_full.index(stage), BN * D * 2)
            place = [batch, head, tile * BN, 0]
            tma.async_copy_global_to_shared(k_desc, place, k_full.index(stage), k_tiles.index(stage))
            mbarrier.wait(v_empty.index(stage), phase)
            mbarrier.expect(v_full.index(stage), BN * D * 2)
            tma.async_copy_global_to_shared(v_desc, place, v_full.index(stage), v_tiles.index(stage))
            step += 1
        turn += 1
        number = gl.atomic_add(counter, 1)
    slot = turn % READY
    mbarrier.wait(q_empty.index(slot), turn // READY & 1 ^ 1)
    numbers.index(slot).store(gl.full([1], total, gl.int32, one))
    mbarrier.arrive(q_full.index(slot))


# As in ``hopper.py``: no kernels of their own for numbers that are 1.
@gluon.jit(do_not_specialize=["pairs", "section", "total", "sequence", "keys"])
def attention_hopper(  # type: ignore[no-untyped-def]
    q_desc,
    k_desc,
    v_desc,
    o_desc,
    logsumexp,
    query_of,
    key_of,
    counter,
    pairs,
    section,
    total,
    sequence,
    keys,
    scale,
    BN: gl.constexpr,
    D: gl.constexpr,
    STAGES: gl.constexpr,
    CAUSAL: gl.constexpr,
):
    """``out`` and ``logsumexp`` of ``total`` tiles of rows of all pairs, see ``attention_kernel``.

    ``counter`` is 0 before. ``section`` divides pairs times batches, see ``place_of``.
    """
    tiles = gl.cdiv(sequence, ROWS)
    before = keys - sequence
    tile: gl.constexpr = q_desc.layout
    element: gl.constexpr = q_desc.dtype
    q_tiles = gl.allocate_shared_memory(element, [READY * 2, 1, 1, HALF, D], tile)
    o_tile = gl.allocate_shared_memory(element, [2, 1, 1, HALF, D], tile)
    k_tiles = gl.allocate_shared_memory(element, [STAGES, 1, 1, BN, D], tile)
    v_tiles = gl.allocate_shared_memory(element, [STAGES, 1, 1, BN, D], tile)
    numbers = gl.allocate_shared_memory(gl.int32, [READY, 1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    line: gl.constexpr = mbarrier.MBarrierLayout()
    q_full = gl.allocate_shared_memory(gl.int64, [READY, 1], line)
    q_empty = gl.allocate_shared_memory(gl.int64, [READY, 1], line)
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], line)
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], line)
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], line)
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], line)
    for slot in gl.static_range(READY):
        mbarrier.init(q_full.index(slot), 1)
        mbarrier.init(q_empty.index(slot), 2)
    for stage in gl.static_range(STAGES):
        mbarrier.init(k_full.index(stage), 1)
        mbarrier.init(k_empty.index(stage), 2)
        mbarrier.init(v_full.index(stage), 1)
        mbarrier.init(v_empty.index(stage), 2)
    fence_async_shared()
    gl.warp_specialize(
        [
            (consume, (
                o_desc, logsumexp, total, tiles, section, pairs, sequence, before, keys, scale,
                numbers, q_tiles, k_tiles, v_tiles, o_tile, q_full, q_empty, k_full, k_empty, v_full, v_empty,
                0, BN, D, STAGES, CAUSAL,
            )),
            (consume, (
                o_desc, logsumexp, total, tiles, section, pairs, sequence, before, keys, scale,
                numbers, q_tiles, k_tiles, v_tiles, o_tile, q_full, q_empty, k_full, k_empty, v_full, v_empty,
                1, BN, D, STAGES, CAUSAL,
            )),
            (produce, (
                q_desc, k_desc, v_desc, query_of, key_of, counter, total, tiles, section, pairs, before, keys,
                numbers, q_tiles, k_tiles, v_tiles, q_full, q_empty, k_full, k_empty, v_full, v_empty,
                BN, D, STAGES, CAUSAL,
            )),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip
