"""Block sizes of the SSD kernels, and what the kernels refuse."""

from dataclasses import dataclass

import torch

_WIDTHS, _STATES = (16, 32, 64), (16, 32, 64, 128)


@dataclass(frozen=True)
class Scan:
    """States are stored every ``chunk`` tokens; a block carries ``columns`` of the state of one head."""

    chunk: int
    columns: int
    warps: int
    stages: int


@dataclass(frozen=True)
class Forward:
    """A block makes y of ``heads`` heads in one chunk, which share C·Bᵀ."""

    scan: Scan
    heads: int
    warps: int
    stages: int


@dataclass(frozen=True)
class Backward:
    """A block makes dx of ``heads`` heads in one chunk; another kernel dB or dC of a group in one chunk."""

    scan: Scan
    heads: int
    warps: int
    stages: int
    group_warps: int
    group_stages: int


# Measured on an H200 (benchmarks/ssd.py --grid). Forward, stored states are what goes through memory beyond
# x and y: 128 tokens apart they are half of those at 64, and a tile [Q, Q] fits the registers of 8 warps.
# Backward, several such tiles live at once: at 64 they fit those of 4 warps, nearly, at 128 they spill and
# the kernel takes twice as long. The scan wants whole rows of the state where both directions fill the GPU.
_HALF = (
    Forward(Scan(chunk=128, columns=64, warps=4, stages=3), heads=32, warps=8, stages=3),
    Backward(
        Scan(chunk=64, columns=128, warps=4, stages=3),
        heads=32,
        warps=4,
        stages=3,
        group_warps=4,
        group_stages=3,
    ),
)
# fp32 is for comparing runs: products are IEEE fp32 on the plain units, so small tiles and no pipeline.
_SINGLE = (
    Forward(Scan(chunk=32, columns=32, warps=4, stages=1), heads=8, warps=16, stages=1),
    Backward(
        Scan(chunk=32, columns=32, warps=4, stages=1),
        heads=8,
        warps=16,
        stages=1,
        group_warps=16,
        group_stages=1,
    ),
)


def forward_config(dtype: torch.dtype) -> Forward:
    """The measured choice for outputs and final states."""
    return (_SINGLE if dtype == torch.float32 else _HALF)[0]


def backward_config(dtype: torch.dtype) -> Backward:
    """The measured choice for gradients."""
    return (_SINGLE if dtype == torch.float32 else _HALF)[1]


def refusal(dtype: torch.dtype, width: int, states: int) -> str | None:
    """Why the kernels cannot run these sizes, in one line, or None."""
    if dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return f"the SSD kernels take bfloat16, float16 and float32, not {dtype}; cast x, or run on the CPU"
    if width not in _WIDTHS:
        return f"the SSD kernels take heads of {_WIDTHS} values, not {width}; change the head size"
    if states not in _STATES:
        return f"the SSD kernels take {_STATES} states, not {states}; change the state size"
    return None
