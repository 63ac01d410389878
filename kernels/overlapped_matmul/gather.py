"""Kernel of all-gather + product: y = x_full · wᵀ, started before x_full has arrived."""

import triton
import triton.language as tl

from flashtrain.kernels.overlapped_matmul.signals import wait_flag
from flashtrain.kernels.overlapped_matmul.tiles import add_product, halves, locate, product, store_tile


@triton.jit
def gather_kernel(  # type: ignore[no-untyped-def]
    own_desc,
    full_desc,
    w_desc,
    out,
    flags,
    stop,
    plan,
    epoch,
    tiles,
    columns,
    steps,
    width,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP: tl.constexpr,
    SPLIT: tl.constexpr,
    FLATTEN: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    MASKED: tl.constexpr,
    WAITS: tl.constexpr,
    PARTS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Persistent blocks walk the tiles of ``plan``; see ``triton.gather_matmul`` for the contract.

    ``WAITS`` off is the plain product of one own chunk. With ``PARTS`` a chunk arrives column by column, so a
    tile can begin with the first. ``SPLIT`` stores a tile in two halves, which frees shared memory for one
    more stage.
    """
    block = tl.program_id(0)
    blocks = tl.num_programs(0)
    for tile in tl.range(block, tiles, blocks, flatten=FLATTEN):
        chunk, own, source, target, rows, first, _, row, column = locate(plan, tile, columns, BM, BN, GROUP)
        x_row = source + row
        x_desc = own_desc
        needed = 0
        if WAITS:
            # A block meets the chunks in order, so it asks at its first tile of each.
            needed = ((own == 0) & (tile - blocks < first)).to(tl.int32)
            if PARTS == 1:
                x_row += wait_flag(flags + chunk, epoch, stop, needed)
            if own == 0:
                x_desc = full_desc
        if PARTS == 1:
            total = product(x_desc, w_desc, x_row, column, steps, BM, BN, BK, TRANSPOSED, PRECISION)
        else:
            total = tl.full((BM, BN), 0.0, tl.float32)
            for part in range(PARTS):
                here = x_row + wait_flag(flags + chunk + part, epoch, stop, needed)
                total = add_product(
                    total, x_desc, w_desc, here, column, part * steps // PARTS, (part + 1) * steps // PARTS,
                    BK, TRANSPOSED, PRECISION,
                )  # fmt: skip
        if SPLIT:
            left, right = halves(total)
            store_tile(out, target + row, column, target + rows, width, left, MASKED)
            store_tile(out, target + row, column + BN // 2, target + rows, width, right, MASKED)
        else:
            store_tile(out, target + row, column, target + rows, width, total, MASKED)
