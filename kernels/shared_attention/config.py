"""Block sizes of the kernels, and what the kernels refuse."""

from dataclasses import dataclass

import torch

from flashtrain.kernels.pairing_attention.config import refusal as forward_refusal

WIDTHS = (16, 32, 64, 128)
# Score gradients of as many heads as fit in so many bytes are stored at a time.
SCRATCH_BYTES = 1 << 30


@dataclass(frozen=True)
class Blocks:
    """``queries`` by ``keys`` of a tile; the first must divide the second.

    ``registers``: the most a thread may have, so that as many blocks share a multiprocessor as are to hide
    one another's exponentials; None: what the compiler takes.
    """

    queries: int
    keys: int
    warps: int
    stages: int
    registers: int | None = None

    @property
    def launch(self) -> dict[str, int]:
        """What a launch is given besides tiles and stages."""
        registers = {} if self.registers is None else {"maxnreg": self.registers}
        return {"num_warps": self.warps} | registers


@dataclass(frozen=True)
class Choice:
    """Blocks of each kernel; those of ``scores`` and ``products`` are square and of one size.

    ``depth``: how many values of the layers side by side a step of the product over them takes.
    """

    values: Blocks
    scores: Blocks
    products: Blocks
    depth: int = 64

    def __post_init__(self) -> None:
        if len({self.scores.queries, self.scores.keys, self.products.queries, self.products.keys}) > 1:
            raise ValueError(f"{self.scores} and {self.products} must have square tiles of one size")
        if self.values.keys % self.values.queries:
            raise ValueError(f"the queries of {self.values} must divide its keys")


# Two blocks of 8 warps share a multiprocessor where a thread has 128 registers at most and a block half of
# the shared memory.
_SCORES = Blocks(queries=128, keys=128, warps=8, stages=3, registers=128)
_PRODUCTS = Blocks(queries=128, keys=128, warps=8, stages=3)
_NARROW = Choice(values=Blocks(queries=64, keys=128, warps=8, stages=3), scores=_SCORES, products=_PRODUCTS)
_WIDE = Choice(
    values=Blocks(queries=64, keys=128, warps=8, stages=2, registers=128),
    scores=_SCORES,
    products=_PRODUCTS,
)
# fp32 is for comparing runs: products are IEEE fp32 on the plain units, so small tiles and no pipeline.
_TILE = Blocks(queries=32, keys=32, warps=4, stages=1)
_SINGLE = Choice(values=_TILE, scores=_TILE, products=_TILE, depth=32)


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
    return forward_refusal(dtype, width)
