"""Kernel of product + reduce-scatter: partials leave chunk by chunk, then the own rows are added up."""

import triton
import triton.language as tl

from flashtrain.kernels.overlapped_matmul.signals import arrive, raise_flag, settle, wait_peers
from flashtrain.kernels.overlapped_matmul.tiles import RECORD, halves, locate, product, store_tile


@triton.jit
def add_rows(  # type: ignore[no-untyped-def]
    out,
    partials,
    slots,
    own_row,
    row,
    column,
    limit,
    rows,
    width,
    rank,
    PIECE: tl.constexpr,
    BN: tl.constexpr,
    WORLD: tl.constexpr,
):
    """``out[row] = p_0 + ... + p_{WORLD-1}`` in rank order in fp32, rounded once; ``PIECE`` rows at ``row``.

    The partial of ``rank`` lies in ``partials`` from ``own_row`` on, those of the others in slots of ``rows``
    rows each. Rows from ``limit`` on are left alone.
    """
    # TMA takes no other width; written out, so that the compiler sees that the loads may be 16 bytes wide.
    wide: tl.constexpr = 128 // slots.dtype.element_ty.primitive_bitwidth
    width = width // wide * wide
    down = tl.arange(0, PIECE)
    along = column + tl.arange(0, BN)
    inside = (row + down < limit)[:, None] & (along < width)[None, :]
    place = down[:, None] * width + along[None, :]
    # Loads pass the first-level cache, which knows nothing of what copies, peers and TMA have written.
    one = load_term(partials, slots, own_row, row, 0, rows, width, rank, place, inside)
    total = one.to(tl.float32)
    for peer in tl.static_range(1, WORLD):
        total += load_term(partials, slots, own_row, row, peer, rows, width, rank, place, inside).to(
            tl.float32
        )
    out += row.to(tl.int64) * width
    tl.store(out + place, total.to(out.dtype.element_ty), mask=inside)


@triton.jit
def load_term(partials, slots, own_row, row, peer, rows, width, rank, place, inside):  # type: ignore[no-untyped-def]
    theirs = slots + (row + (peer * rows).to(tl.int64)) * width
    mine = partials + own_row.to(tl.int64) * width
    return tl.load(tl.where(peer == rank, mine, theirs) + place, mask=inside, other=0.0, cache_modifier=".cg")


@triton.jit
def scatter_kernel(  # type: ignore[no-untyped-def]
    x_desc,
    w_desc,
    store,
    partials,
    out,
    slots,
    counters,
    ready,
    arrived,
    stop,
    plan,
    epoch,
    others,
    tiles,
    columns,
    steps,
    width,
    own_rows,
    rank,
    stride,
    first_own,
    row_tiles,
    empties,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP: tl.constexpr,
    SPLIT: tl.constexpr,
    FLATTEN: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    MASKED: tl.constexpr,
    WORLD: tl.constexpr,
    PIECE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Persistent blocks walk the tiles of ``plan``; see ``triton.matmul_scatter`` for the contract.

    A block is counted at a chunk once, after its last tile of it: the flag goes up as early as if every
    tile were counted, for a fraction of the fences. The own tiles' partials are stored like all others; when
    its last tile is done, a block adds the peers' slots to the own tiles that it computed. So no tile waits
    for a peer while products are left to compute, and no block for another.
    """
    block = tl.program_id(0)
    blocks = tl.num_programs(0)
    if block == 0:
        for index in range(empties):
            raise_flag(ready + tl.load(plan + (row_tiles + index) * RECORD + 5), epoch)
    for tile in tl.range(block, tiles, blocks, flatten=FLATTEN):
        chunk, own, source, _, rows, first, last, row, column = locate(plan, tile, columns, BM, BN, GROUP)
        total = product(x_desc, w_desc, source + row, column, steps, BM, BN, BK, TRANSPOSED, PRECISION)
        if SPLIT:
            left, right = halves(total)
            store_tile(store, source + row, column, source + rows, width, left, MASKED)
            store_tile(store, source + row, column + BN // 2, source + rows, width, right, MASKED)
        else:
            store_tile(store, source + row, column, source + rows, width, total, MASKED)
        leaving = ((own == 0) & (tile + blocks >= last)).to(tl.int32)
        arrive(counters + chunk, tl.minimum(last - first, blocks), ready + chunk, epoch, leaving)
    settle()
    begin = block + tl.maximum(others - block + blocks - 1, 0) // blocks * blocks
    for tile in range(begin, tiles, blocks):
        chunk, _, source, target, rows, first, _, row, column = locate(plan, tile, columns, BM, BN, GROUP)
        # A block meets the chunks in order, so it asks at its first tile of each. (A variable carried from
        # tile to tile is no substitute: Triton 3.6 updates it at every step of a flattened loop.)
        needed = (tile - blocks < first).to(tl.int32)
        row += wait_peers(arrived + chunk - first_own, stride, WORLD, rank, epoch, stop, needed)
        for piece in range(0, BM, PIECE):
            add_rows(
                out,
                partials,
                slots,
                source + row + piece,
                target + row + piece,
                column,
                target + rows,
                own_rows,
                width,
                rank,
                PIECE,
                BN,
                WORLD,
            )
