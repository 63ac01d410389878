"""Which tile comes when, and the product of one tile: the parts that all kernels here share.

Tiles run chunk by chunk in the order of the plan; inside a chunk in groups of ``GROUP`` row tiles, so that
blocks that run at the same time share operands in the second-level cache. A tile never straddles two
chunks: the last row tile of a chunk is moved up to end where the chunk ends and computes some rows a second
time, to the same bits. So a tile needs one flag, reads no row that may still be in flight, and stores
without masks; only a chunk shorter than a tile needs masks (``MASKED``).
"""

import triton
import triton.language as tl

# One row tile of the plan: the chunk's first row tile, its number of row tiles, its first row in the
# operand and in the output, its rows, its number (index of its flag), whether it is the own chunk.
RECORD = tl.constexpr(7)


@triton.jit
def locate(plan, tile, columns, BM: tl.constexpr, BN: tl.constexpr, GROUP: tl.constexpr):  # type: ignore[no-untyped-def]
    """``(chunk, own, source, target, rows, first, last, row, column)`` of a tile.

    ``source`` and ``target`` are the first row of the chunk in operand and output, ``row`` the tile's first
    row within the chunk, ``column`` its first column, ``[first, last)`` the chunk's tiles.
    """
    record = plan + (tile // columns) * RECORD
    first_row_tile = tl.load(record)
    row_tiles = tl.load(record + 1)
    source = tl.load(record + 2)
    target = tl.load(record + 3)
    rows = tl.load(record + 4)
    chunk = tl.load(record + 5)
    own = tl.load(record + 6)
    first = first_row_tile * columns
    within = tile - first
    group = within // (GROUP * columns)
    height = tl.minimum(row_tiles - group * GROUP, GROUP)
    within -= group * GROUP * columns
    row = tl.maximum(tl.minimum((group * GROUP + within % height) * BM, rows - BM), 0)
    return chunk, own, source, target, rows, first, first + row_tiles * columns, row, within // height * BN


@triton.jit
def product(  # type: ignore[no-untyped-def]
    x_desc,
    w_desc,
    row,
    column,
    steps,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Rows from ``row`` of x, columns from ``column`` of wᵀ: ``[BM, BN]`` in fp32, K in one fixed order."""
    total = tl.full((BM, BN), 0.0, tl.float32)
    return add_product(total, x_desc, w_desc, row, column, 0, steps, BK, TRANSPOSED, PRECISION)


@triton.jit
def add_product(  # type: ignore[no-untyped-def]
    total,
    x_desc,
    w_desc,
    row,
    column,
    begin,
    end,
    BK: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """``total`` and steps ``[begin, end)`` along K of that tile's product."""
    for step in range(begin, end):
        x = x_desc.load([row, step * BK])
        if TRANSPOSED:
            total = tl.dot(x, w_desc.load([step * BK, column]), total, input_precision=PRECISION)
        else:
            total = tl.dot(x, w_desc.load([column, step * BK]).T, total, input_precision=PRECISION)
    return total


@triton.jit
def store_tile(out, row, column, limit, width, values, MASKED: tl.constexpr):  # type: ignore[no-untyped-def]
    """Store ``values`` ``[BM, n]`` at ``(row, column)``.

    ``out`` is a descriptor or, if ``MASKED``, a pointer, and rows from ``limit`` on are left alone.
    """
    if MASKED:
        wide: tl.constexpr = 128 // out.dtype.element_ty.primitive_bitwidth
        width = width // wide * wide
        down = tl.arange(0, values.shape[0])
        along = column + tl.arange(0, values.shape[1])
        inside = (row + down < limit)[:, None] & (along < width)[None, :]
        out += row.to(tl.int64) * width
        tl.store(out + down[:, None] * width + along[None, :], values.to(out.dtype.element_ty), mask=inside)
    else:
        out.store([row, column], values.to(out.dtype))


@triton.jit
def halves(tile):  # type: ignore[no-untyped-def]
    """Left and right half of the columns of ``tile``, in registers."""
    rows: tl.constexpr = tile.shape[0]
    columns: tl.constexpr = tile.shape[1]
    return tl.split(tl.permute(tl.reshape(tile, (rows, 2, columns // 2)), (0, 2, 1)))
