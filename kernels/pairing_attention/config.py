"""Tile sizes of the pairing-attention kernels, and what the kernels refuse."""

import logging
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version

import torch

log = logging.getLogger("flashtrain.kernels")

_GLUON = (
    "3.6."  # the versions of Triton whose Gluon, which is experimental, kernels for Hopper are written in
)
MOST_PAIRS = (1 << 15) - 1  # numbers of pairs and heads are signed 16 bits
_WIDEST = 128
_SECTION_BYTES = 24 << 20  # keys and values that blocks at work at the same time read: half of the L2 cache
# Tiles of keys of one head that are at work at the same time, times the rows that they meet at once: fewer
# read rows more often, more wait for one another at a section's begin.
_TOGETHER = 512
# Blocks a multiprocessor from which on none waits long for the longest: that of causal attention is twice the
# mean, and they begin longest first.
_FILLED = 1.5


@dataclass(frozen=True)
class Tiles:
    """A block holds ``rows`` of its own head and walks over the other side ``columns`` at a time."""

    rows: int
    columns: int
    warps: int
    stages: int


@dataclass(frozen=True)
class Config:
    """Tiles of the forward kernel, whose blocks own queries, and of the backward one, whose own keys.

    ``partitioned``: by ``hopper_forward.py`` and ``hopper.py``, which have Hopper's tiles alone and no fp32.
    """

    forward: Tiles
    backward: Tiles
    partitioned: bool = False


# By registers (ptxas for sm_90): at 8 warps a tile [128, 64] of scores takes 32 of a thread's 255, an
# accumulator [128, D] D/4. Forward at D 64 then takes 112, so that two blocks share a multiprocessor and the
# exponentials of one run under the products of the other. Backward holds two accumulators and two tiles at
# once; three stages, since Triton asks for what comes next at the end of a step.
_NARROW = Config(Tiles(128, 64, 8, 3), Tiles(128, 128, 8, 3))
_WIDE = Config(Tiles(128, 128, 8, 2), Tiles(128, 64, 8, 3))
# By partitions of warps: each of two that multiply owns ``HALF`` of 128 rows or keys, with 4 warps of 240
# registers a thread. Forward (ptxas: none spilled in the loops over keys) two stages of 128 keys, 115 KB at D
# 64, 230 at 128; backward up to 19 spilled at D 64, 1 at 128, and 195 KB.
HALF = 64
_FORWARD_HOPPER = Tiles(2 * HALF, 128, 4, 2)
_NARROW_HOPPER = Config(_FORWARD_HOPPER, Tiles(2 * HALF, 128, 4, 2), partitioned=True)
_WIDE_HOPPER = Config(_FORWARD_HOPPER, Tiles(2 * HALF, 64, 4, 2), partitioned=True)
# fp32 is for comparing runs: products are IEEE fp32 on the plain units, so small tiles and no pipeline.
_SINGLE = Config(Tiles(32, 32, 4, 1), Tiles(32, 32, 4, 1))


def config_of(dtype: torch.dtype, width: int) -> Config:
    """The choice for heads of ``width`` values."""
    if dtype == torch.float32:
        return _SINGLE
    if width > 32 and _hopper():
        return _NARROW_HOPPER if width <= 64 else _WIDE_HOPPER
    return _NARROW if width <= 64 else _WIDE


def section_of(heads: int, tokens: int, width: int, itemsize: int) -> int:
    """How many heads work through all their tiles before the next: a divisor of ``heads``.

    So that what they read of ``tokens`` keys and values a head stays in the cache.
    """
    most = max(1, _SECTION_BYTES // (2 * tokens * width * itemsize))
    return next(count for count in range(min(most, heads), 0, -1) if heads % count == 0)


def gradients_section_of(units: int, unit: int, rows: int, processors: int) -> int:
    """How many blocks, a multiple of ``unit``, work through all tiles of keys before the next of ``units``.

    So few that several tiles of keys of one head are at work at the same time: the ``rows`` that they meet at
    once, and the sums that they add to, then come from memory once. Sections are as even as can be.
    """
    most = max(1, processors * rows // (_TOGETHER * unit))
    return unit * -(-units // -(-units // most))


def splits_of(blocks: int, most: int, processors: int) -> int:
    """Into how many blocks to cut the sum over a head's pairs, at most ``most``: enough to fill the GPU."""
    splits = 1
    while splits * 2 <= most and blocks * splits < _FILLED * processors:
        splits *= 2
    return splits


def refusal(dtype: torch.dtype, width: int) -> str | None:
    """Why the kernels cannot run heads of ``width`` values, in one line, or None."""
    if dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return f"pairing attention takes bfloat16, float16 and float32 on a GPU, not {dtype}; cast the heads"
    if width > _WIDEST or width % 8:
        return f"pairing attention takes heads of up to {_WIDEST} values, in eights, on a GPU, not {width}"
    if _older():
        return "pairing attention adds through TMA, which a GPU has from compute capability 9.0 on"
    return None


def _hopper() -> bool:
    return torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0) and _knows_gluon()


@cache
def _knows_gluon() -> bool:
    found = version("triton")
    if not found.startswith(_GLUON):
        log.warning(
            "attention takes half as long again with Triton %s as with %sx, which the kernels for Hopper are "
            "written for",
            found,
            _GLUON,
        )
    return found.startswith(_GLUON)


def _older() -> bool:
    return torch.cuda.is_available() and torch.cuda.get_device_capability() < (9, 0)


# What torch.compiler.assume_constant_result sets; that imports the compiler, for runs that never compile.
_older._dynamo_marked_constant = True  # type: ignore[attr-defined]
