"""Tile shapes to choose from, and what the kernels refuse."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Config:
    """How a product is cut. ``block_k`` is fixed per dtype; none of this changes a bit of the result.

    ``group`` row tiles of a chunk share column tiles in turn. ``split`` stores a tile in halves, which frees
    shared memory for one more stage. ``flatten`` loads the next tile's operands under the end of this one.
    ``resident`` blocks share a multiprocessor; ``rate`` is the speed with which full waves run, against the
    fastest configuration (measured on an H200): both serve ``default_config`` alone.
    """

    block_m: int
    block_n: int
    block_k: int
    stages: int
    warps: int
    group: int = 8
    split: bool = False
    flatten: bool = True
    resident: int = 1
    rate: float = 1.0

    def __str__(self) -> str:
        extra = f"{' split' if self.split else ''}{'' if self.flatten else ' nested'} g{self.group}"
        return f"{self.block_m}x{self.block_n}x{self.block_k} s{self.stages} w{self.warps}{extra}"


_HALF = (
    Config(128, 256, 64, stages=4, warps=8, split=True),
    Config(128, 128, 64, stages=3, warps=4, split=True, resident=2, rate=0.965),
    Config(128, 128, 64, stages=4, warps=4, rate=0.905),
    Config(256, 128, 64, stages=4, warps=8, split=True, rate=0.975),
    Config(64, 128, 64, stages=4, warps=4, split=True, resident=2, rate=0.84),
)
_SINGLE = (Config(128, 64, 16, stages=3, warps=8),)


def configs(dtype: torch.dtype) -> tuple[Config, ...]:
    """Candidates for a tuner, the most likely first. A small tile pays where arrivals set the pace."""
    return _SINGLE if dtype == torch.float32 else _HALF


def default_config(chunk_rows: Sequence[int], columns: int, dtype: torch.dtype, sms: int) -> Config:
    """A choice without measuring: the least time by waves of tiles and the rate of each configuration.

    A last wave counts in full: blocks that have a multiprocessor to themselves are hardly faster there.
    """

    def cost(config: Config) -> float:
        row_tiles = sum(-(-rows // config.block_m) for rows in chunk_rows)
        tiles = row_tiles * -(-columns // config.block_n)
        waves = -(-tiles // (sms * config.resident)) * config.resident
        return waves * config.block_m * config.block_n / config.rate

    return min(configs(dtype), key=cost)


def refusal(x: Tensor, w: Tensor, *others: Tensor) -> str | None:
    """Why these operands cannot be multiplied here, in one line, or None.

    ``x`` ``[rows, K]``, ``w`` ``[N, K]`` (either of its dimensions contiguous), ``others`` outputs and
    buffers. TMA wants bases and row pitches that are multiples of 16 bytes.
    """
    if x.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return f"{x.dtype} operands: only bfloat16, float16 and float32 are multiplied here"
    if x.device.type == "cuda" and torch.cuda.get_device_capability(x.device)[0] != 9:
        return (
            f"{torch.cuda.get_device_name(x.device)}: these kernels are for Hopper (compute capability 9.0)"
        )
    if not w.numel():
        return f"a weight of shape {list(w.shape)} has no elements"
    for name, tensor in (("x", x), ("w", w), *((f"buffer {index}", t) for index, t in enumerate(others))):
        matrix = tensor.t() if tensor is w and tensor.stride(1) != 1 else tensor
        if matrix.stride(-1) != 1 and matrix.shape[-1] > 1:
            return f"{name} with strides {list(tensor.stride())}: one dimension must be contiguous"
        if matrix.stride(-2) * tensor.itemsize % 16:
            return (
                f"{name} {list(tensor.shape)} {tensor.dtype}: rows of {matrix.stride(-2)} elements are no "
                "multiple of 16 bytes; pad it"
            )
        if tensor.data_ptr() % 16:
            return (
                f"{name} starts at an address that is no multiple of 16 bytes; copy it into memory of its own"
            )
    return None
