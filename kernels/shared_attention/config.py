"""Block sizes of the kernels, and what the kernels refuse."""

from dataclasses import dataclass

import torch

WIDTHS = (16, 32, 64, 128)
# Score gradients of as many heads as fit in so many bytes are stored at a time.
SCRATCH_BYTES = 1 << 30


@dataclass(frozen=True)
class Blocks:
    """``queries`` by ``keys`` of a tile; in the backward kernels the first must divide the second."""

    queries: int
    keys: int
    warps: int
    stages: int


@dataclass(frozen=True)
class Choice:
    """Blocks of each kernel."""

    forward: Blocks
    values: Blocks
    source: Blocks
    query: Blocks


# Registers decide: a source's tile has scores, their gradient, dK and dV in fp32 at once, which at 128 x 128
# with heads of 64 fills 192 of a thread's 255 registers with 8 warps; heads of 128 get half of the queries.
_NARROW = Choice(
    forward=Blocks(queries=128, keys=128, warps=8, stages=3),
    values=Blocks(queries=128, keys=128, warps=8, stages=3),
    source=Blocks(queries=128, keys=128, warps=8, stages=3),
    query=Blocks(queries=128, keys=128, warps=8, stages=3),
)
_WIDE = Choice(
    forward=Blocks(queries=128, keys=128, warps=8, stages=2),
    values=Blocks(queries=64, keys=128, warps=8, stages=3),
    source=Blocks(queries=64, keys=128, warps=8, stages=2),
    query=Blocks(queries=64, keys=128, warps=4, stages=3),
)
# fp32 is for comparing runs: products are IEEE fp32 on the plain units, so small tiles and no pipeline.
_TILE = Blocks(queries=32, keys=32, warps=4, stages=1)
_SINGLE = Choice(forward=_TILE, values=_TILE, source=_TILE, query=_TILE)


def choice(dtype: torch.dtype, width: int) -> Choice:
    """The blocks for heads of ``width`` values."""
    if dtype == torch.float32:
        return _SINGLE
    return _NARROW if width <= 64 else _WIDE


def refusal(dtype: torch.dtype, width: int) -> str | None:
    """Why the kernels cannot run these sizes, in one line, or None."""
    if dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return f"the kernels of shared attention take bfloat16, float16 and float32, not {dtype}"
    if width not in WIDTHS:
        return (
            f"the kernels of shared attention take heads of {WIDTHS} values, not {width}: set "
            "model.sharing.deferred to false"
        )
    return None
