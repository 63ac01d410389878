"""Block sizes of the SSD kernels, and what the kernels refuse."""

from dataclasses import dataclass

import torch

_WIDTHS, _STATES = (16, 32, 64, 128), (16, 32, 64, 128)


@dataclass(frozen=True)
class Config:
    """How one pass is cut. ``chunk`` tokens are one block of work, and the distance of stored states.

    ``heads`` heads of a group share the products C·Bᵀ of a chunk and, backward, one sum for dB and dC.
    ``columns`` of the state are carried by one block of the scan.
    """

    chunk: int
    heads: int
    warps: int
    stages: int
    columns: int
    scan_warps: int
    scan_stages: int
    group_warps: int
    group_stages: int


# Forward: a chunk of 128 halves the states that go through memory against 64, and costs no registers, since
# one accumulator [128, P] is live. Backward: four accumulators over [Q, Q] and [Q, N] live through the loop
# over heads; at Q = 64 they fit the registers of 8 warps, at 128 they do not.
_HALF = (
    Config(
        chunk=128,
        heads=8,
        warps=8,
        stages=2,
        columns=64,
        scan_warps=4,
        scan_stages=3,
        group_warps=4,
        group_stages=2,
    ),
    Config(
        chunk=64,
        heads=16,
        warps=4,
        stages=2,
        columns=64,
        scan_warps=4,
        scan_stages=3,
        group_warps=4,
        group_stages=2,
    ),
)
# fp32 is for comparing runs: products are IEEE fp32 on the plain units, so small tiles and no pipeline.
_SINGLE = (
    Config(
        chunk=32,
        heads=8,
        warps=16,
        stages=1,
        columns=32,
        scan_warps=4,
        scan_stages=1,
        group_warps=16,
        group_stages=1,
    ),
    Config(
        chunk=32,
        heads=8,
        warps=16,
        stages=1,
        columns=32,
        scan_warps=4,
        scan_stages=1,
        group_warps=16,
        group_stages=1,
    ),
)


def forward_config(dtype: torch.dtype) -> Config:
    """The measured choice for outputs and final states."""
    return (_SINGLE if dtype == torch.float32 else _HALF)[0]


def backward_config(dtype: torch.dtype) -> Config:
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
