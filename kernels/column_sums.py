"""Sums over the parts that the blocks of a kernel leave of small gradients, in one launch and one order."""

import triton
import triton.language as tl
from torch import Tensor

from flashtrain.kernels.jit import kernel
from flashtrain.kernels.sizes import cdiv

_ROWS, _COLUMNS = 64, 32


@kernel
def sums_kernel(  # type: ignore[no-untyped-def]
    parts, out, out_2, out_3, rows, width, begin_2, begin_3, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """Sums over ``parts [rows, width]``: of columns up to ``begin_2`` into ``out``, and so on."""
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < width
    gathered = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for begin in range(0, rows, ROWS):
        row = begin + tl.arange(0, ROWS)
        place = row.to(tl.int64)[:, None] * width + column[None, :]
        gathered += tl.load(parts + place, mask=(row < rows)[:, None] & inside[None, :], other=0.0)
    found = tl.sum(gathered, axis=0)
    store(out, found, column, 0, begin_2)
    store(out_2, found, column, begin_2, begin_3)
    store(out_3, found, column, begin_3, width)


@triton.jit
def store(out, found, column, begin, end):  # type: ignore[no-untyped-def]
    """What belongs to columns ``begin`` to ``end``, if it is wanted."""
    if out is not None:
        mask = (column >= begin) & (column < end)
        tl.store(out + column - begin, found.to(out.dtype.element_ty), mask=mask)


def column_sums(parts: Tensor, *outputs: Tensor) -> None:
    """Write the sums over the rows of ``parts``, fp32 and dense, to one, two or three dense outputs.

    A row has as many columns as the outputs have elements; each output takes its own, in order and in its
    dtype, rounded once.
    """
    first, second, third = (*outputs, None, None)[:3]
    begin_2 = outputs[0].numel()
    begin_3 = begin_2 + (0 if second is None else second.numel())
    width = begin_3 + (0 if third is None else third.numel())
    sums_kernel[(cdiv(width, _COLUMNS),)](
        parts,
        first,
        second,
        third,
        parts.numel() // width,
        width,
        begin_2,
        begin_3,
        ROWS=_ROWS,
        COLUMNS=_COLUMNS,
        num_warps=4,
    )
