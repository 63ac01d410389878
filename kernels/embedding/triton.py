"""Look-up of a table's rows in one pass, and its gradient as sums in the order of the tokens.

For the gradient the tokens are sorted by row, stably, so that those of a row are a run in their own order. A
run is cut into pieces of ``PIECE`` tokens, counted from its begin; each is summed from zero in fp32, and the
sums of a run's pieces are added in order. So a row's bits depend on its own tokens' gradients alone: not on
other rows, on the ranks that share a vocabulary, or on the device. A row that takes most of a batch costs
little more than others, as its pieces are summed side by side.
"""

import torch
import triton.language as tl
from torch import Tensor

from flashtrain.kernels.jit import kernel
from flashtrain.kernels.layout import rows_of
from flashtrain.kernels.sizes import cdiv, next_power_of_2

PIECE = 64
_COLUMNS, _WARPS = 2048, 4  # of a row, a program's: 16 values a thread
# Of additions that are under way at once, as loads into shared memory: registers would be waited for in turn.
_STAGES = 4
_FINISH_COLUMNS, _FINISH_STAGES = 512, 8  # few rows have several pieces, but these may be many
_SEARCHED = 256  # positions of a program that looks for runs


@kernel
def lookup_kernel(  # type: ignore[no-untyped-def]
    tokens, table, y, first, rows, vocabulary, width, table_row, COLUMNS: tl.constexpr
):
    """``COLUMNS`` of the row of one token: zeros if another table holds it, NaN if none does."""
    parts = tl.cdiv(width, COLUMNS)
    position = (tl.program_id(0) // parts).to(tl.int64)
    column = tl.program_id(0) % parts * COLUMNS + tl.arange(0, COLUMNS)
    token = tl.load(tokens + position).to(tl.int64)
    index = token - first
    mine = (index >= 0) & (index < rows)
    absent = tl.where((token >= 0) & (token < vocabulary), 0.0, float("nan"))
    values = tl.load(table + index * table_row + column, mask=(column < width) & mine, other=0.0)
    values = tl.where(mine, values, absent.to(values.dtype))
    tl.store(y + position * width + column, values, mask=column < width)


@kernel
def keys_kernel(tokens, keys, positions, first, rows, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """The row of each token in this table, or ``rows`` if it has none, which sorts behind all."""
    position = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    index = tl.load(tokens + position, mask=position < positions, other=0).to(tl.int64) - first
    key = tl.where((index >= 0) & (index < rows), index, rows)
    tl.store(keys + position, key.to(tl.int32), mask=position < positions)


@kernel
def runs_kernel(keys, begins, ends, positions, steps, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Where the run of each of the sorted ``keys`` begins and ends, by halving ``steps`` times."""
    position = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = position < positions
    key = tl.load(keys + position, mask=inside, other=0)
    low, high = tl.zeros_like(position), tl.zeros_like(position) + positions
    after, last = tl.zeros_like(position), tl.zeros_like(position) + positions
    for _ in range(steps):
        middle = (low + high) // 2
        open_ = inside & (low < high)
        less = tl.load(keys + middle, mask=open_, other=0) < key
        low = tl.where(open_ & less, middle + 1, low)
        high = tl.where(open_ & (less == 0), middle, high)
        middle = (after + last) // 2
        open_ = inside & (after < last)
        more = tl.load(keys + middle, mask=open_, other=0) > key
        after = tl.where(open_ & (more == 0), middle + 1, after)
        last = tl.where(open_ & more, middle, last)
    tl.store(begins + position, low, mask=inside)
    tl.store(ends + position, after, mask=inside)


@kernel
def pieces_kernel(  # type: ignore[no-untyped-def]
    dy,
    order,
    keys,
    begins,
    ends,
    partial,
    gradient,
    rows,
    width,
    dy_row,
    ADD: tl.constexpr,
    PIECE: tl.constexpr,
    COLUMNS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """``COLUMNS`` of the sum of the piece that begins at a position, where one does.

    The only piece of a run goes to the row of ``gradient [rows, width]``, or with ``ADD`` is added to it; one
    of several goes to its slot of ``partial``. ``PIECE`` positions have two slots: at most one of them begins
    a run of several pieces, which takes the second, and at most one a later piece of another such run.
    """
    parts = tl.cdiv(width, COLUMNS)
    position = tl.program_id(0) // parts
    column = tl.program_id(0) % parts * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < width
    key = tl.load(keys + position)
    begin = tl.load(begins + position)
    end = tl.load(ends + position)
    if (key < rows) & ((position - begin) % PIECE == 0):
        count = tl.minimum(end - position, PIECE)
        only = end - begin <= PIECE
        own = gradient + key.to(tl.int64) * width + column
        if ADD:
            before = tl.load(own, mask=inside & only, other=0.0)
        total = tl.zeros((COLUMNS,), dtype=tl.float32)
        for at in tl.range(position, position + count, num_stages=STAGES):
            source = tl.load(order + at)
            total += tl.load(dy + source * dy_row + column, mask=inside, other=0.0).to(tl.float32)
        if only:
            if ADD:
                total += before
            tl.store(own, total.to(gradient.dtype.element_ty), mask=inside)
        else:
            slot = 2 * (position // PIECE) + (position == begin).to(tl.int32)
            tl.store(partial + slot.to(tl.int64) * width + column, total, mask=inside)


@kernel
def finish_kernel(  # type: ignore[no-untyped-def]
    keys,
    begins,
    ends,
    partial,
    gradient,
    positions,
    rows,
    width,
    ADD: tl.constexpr,
    PIECE: tl.constexpr,
    COLUMNS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """The sum of the pieces of a run that begins in a block of ``PIECE`` positions, if one has several."""
    block = tl.program_id(0)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < width
    position = block * PIECE + tl.arange(0, PIECE)
    exists = position < positions
    key = tl.load(keys + position, mask=exists, other=0)
    begin = tl.load(begins + position, mask=exists, other=-1)
    end = tl.load(ends + position, mask=exists, other=0)
    chosen = (begin == position) & (end - begin > PIECE) & (key < rows)  # at most one: the others are short
    length = tl.sum(tl.where(chosen, end - begin, 0), axis=0)
    if length > 0:
        row = tl.sum(tl.where(chosen, key, 0), axis=0)
        own = gradient + row.to(tl.int64) * width + column
        pieces = tl.cdiv(length, PIECE)
        total = tl.zeros((COLUMNS,), dtype=tl.float32)
        for piece in tl.range(pieces, num_stages=STAGES):
            slot = tl.maximum(2 * (block + piece), 2 * block + 1)  # the first is the one that begins a run
            total += tl.load(partial + slot.to(tl.int64) * width + column, mask=inside, other=0.0)
        if ADD:
            total += tl.load(own, mask=inside, other=0.0)
        tl.store(own, total.to(gradient.dtype.element_ty), mask=inside)


def forward(
    tokens: Tensor, table: Tensor, first: int, vocabulary: int, columns: int = _COLUMNS, warps: int = _WARPS
) -> Tensor:
    """See ``reference.embedding``: ``tokens [...]`` -> ``[..., H]``; a token of no row has NaN."""
    held = rows_of(table)
    rows, width = held.shape
    y = table.new_empty(*tokens.shape, width)
    if y.numel():
        columns = min(columns, next_power_of_2(width))
        lookup_kernel[(tokens.numel() * cdiv(width, columns),)](
            tokens.contiguous(),
            held,
            y,
            first,
            rows,
            vocabulary,
            width,
            held.stride(0),
            COLUMNS=columns,
            num_warps=warps,
        )
    return y


def backward(
    dy: Tensor,
    tokens: Tensor,
    first: int,
    gradient: Tensor,
    add: bool,
    columns: int = _COLUMNS,
    warps: int = _WARPS,
    stages: int = _STAGES,
) -> None:
    """Write the rows of ``gradient [rows, H]``, or with ``add`` add to them, that ``tokens [...]`` name.

    Each gets the sum of ``dy [..., H]`` over its tokens, in fp32 and in their order; others stay as they are.
    The gradient is contiguous.
    """
    slopes = rows_of(dy)
    rows, width = gradient.shape
    positions = tokens.numel()
    if not slopes.numel():
        return
    searched = (cdiv(positions, _SEARCHED),)
    keys = torch.empty(positions, dtype=torch.int32, device=dy.device)
    keys_kernel[searched](tokens.contiguous(), keys, positions, first, rows, BLOCK=_SEARCHED, num_warps=4)
    keys, order = torch.sort(keys, stable=True)
    begins, ends = torch.empty_like(keys), torch.empty_like(keys)
    steps = positions.bit_length()
    runs_kernel[searched](keys, begins, ends, positions, steps, BLOCK=_SEARCHED, num_warps=4)
    blocks = cdiv(positions, PIECE)
    several = positions > PIECE
    partial = torch.empty(2 * blocks if several else 0, width, dtype=torch.float32, device=dy.device)
    columns = min(columns, next_power_of_2(width))
    pieces_kernel[(positions * cdiv(width, columns),)](
        slopes,
        order,
        keys,
        begins,
        ends,
        partial,
        gradient,
        rows,
        width,
        slopes.stride(0),
        ADD=add,
        PIECE=PIECE,
        COLUMNS=columns,
        STAGES=stages,
        num_warps=warps,
    )
    if several:
        columns = min(_FINISH_COLUMNS, next_power_of_2(width))
        finish_kernel[(blocks, cdiv(width, columns))](
            keys,
            begins,
            ends,
            partial,
            gradient,
            positions,
            rows,
            width,
            ADD=add,
            PIECE=PIECE,
            COLUMNS=columns,
            STAGES=_FINISH_STAGES,
            num_warps=4,
        )
