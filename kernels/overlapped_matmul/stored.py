"""Kernel of product + reduce-scatter that stores partials where their owners add them.

No copy engine takes part: starting a copy and waiting for its end costs some 10 us a chunk, longer than a
small chunk's transfer. While a block stores it does not multiply, so where products are longer than
transfers, ``scatter`` is the faster kernel.
"""

import triton
import triton.language as tl

from flashtrain.kernels.overlapped_matmul.scatter import add_own_tiles
from flashtrain.kernels.overlapped_matmul.signals import arrive_at_owner, raise_flag, settle
from flashtrain.kernels.overlapped_matmul.tiles import RECORD, halves, locate, product, store_tile


@triton.jit
def flags_at(directory, record, WORLD: tl.constexpr):  # type: ignore[no-untyped-def]
    """Where the owner of a chunk waits for its flag, and where its watchdog looks for it."""
    owner = tl.load(record + 7)
    column = tl.load(record + 9)
    flag = tl.load(directory + WORLD + owner).to(tl.pointer_type(tl.int32)) + column
    told = tl.load(directory + 2 * WORLD + owner).to(tl.pointer_type(tl.int32)) + column
    return flag, told


@triton.jit
def leaving(plan, tile, blocks, columns, directory, counters, done, WORLD: tl.constexpr):  # type: ignore[no-untyped-def]
    """What ``arrive_at_owner`` needs: to count this block at the chunk of ``tile``, if ``done`` with it."""
    record = plan + (tile // columns) * RECORD
    first = tl.load(record) * columns
    last = first + tl.load(record + 1) * columns
    flag, told = flags_at(directory, record, WORLD)
    counter = counters + tl.load(record + 5)
    needed = (done & (tl.load(record + 6) == 0) & (tile + blocks >= last)).to(tl.int32)
    return counter, tl.minimum(last - first, blocks), flag, told, needed


@triton.jit
def stored_kernel(  # type: ignore[no-untyped-def]
    x_desc,
    w_desc,
    directory,
    out,
    slots,
    counters,
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
    WORLD: tl.constexpr,
    PIECE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """As ``scatter.scatter_kernel``, but each partial goes to slot ``rank`` of its owner, the own one too.

    A block is counted at a chunk under its next tile: by then its stores have arrived, and the fence that
    the flag needs hardly waits.
    """
    block = tl.program_id(0)
    blocks = tl.num_programs(0)
    if block == 0:
        for index in range(empties):
            flag, told = flags_at(directory, plan + (row_tiles + index) * RECORD, WORLD)
            raise_flag(flag, epoch)
            raise_flag(told, epoch)
    for tile in tl.range(block, tiles, blocks, flatten=FLATTEN):
        _, _, source, _, rows, _, _, row, column = locate(plan, tile, columns, BM, BN, GROUP)
        record = plan + (tile // columns) * RECORD
        there = tl.load(directory + tl.load(record + 7)).to(tl.pointer_type(slots.dtype.element_ty))
        there = tl.multiple_of(there, 16)
        landing = tl.load(record + 8)
        # Looked up before the product, which hides what that takes.
        before = tl.maximum(tile - blocks, 0)
        counter, expected, flag, told, needed = leaving(
            plan, before, blocks, columns, directory, counters, tile >= blocks, WORLD
        )
        total = product(x_desc, w_desc, source + row, column, steps, BM, BN, BK, TRANSPOSED, PRECISION)
        arrive_at_owner(counter, expected, flag, told, epoch, needed)
        if SPLIT:
            left, right = halves(total)
            store_tile(there, landing + row, column, landing + rows, width, left, True)
            store_tile(there, landing + row, column + BN // 2, landing + rows, width, right, True)
        else:
            store_tile(there, landing + row, column, landing + rows, width, total, True)
    final = block + tl.maximum(tiles - 1 - block, 0) // blocks * blocks
    counter, expected, flag, told, needed = leaving(
        plan, final, blocks, columns, directory, counters, block < tiles, WORLD
    )
    arrive_at_owner(counter, expected, flag, told, epoch, needed)
    settle()
    add_own_tiles(
        out, slots, slots, arrived, stop, plan, epoch, others, tiles, columns, width, own_rows, rank,
        stride, first_own, True, BM, BN, GROUP, WORLD, PIECE,
    )  # fmt: skip
