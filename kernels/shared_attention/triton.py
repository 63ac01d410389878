"""Launches of the kernels; arguments and results as in ``reference``, with any strides."""

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from flashtrain.kernels.descriptors import heads_descriptor
from flashtrain.kernels.pairing_attention import triton as pairing
from flashtrain.kernels.shared_attention import config as configs
from flashtrain.kernels.shared_attention.backward import (
    key_gradient_kernel,
    query_gradient_kernel,
    score_gradient_kernel,
    take_slope_kernel,
    value_gradient_kernel,
)
from flashtrain.kernels.sizes import cdiv

_LOG2E = 1.4426950408889634
_SUM_ROWS = 64
_ROWS_AT_ONCE = 8  # of tiles of score gradients, whose slopes stay in the L2 cache for one tile of keys


def attend(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Output ``[B, H, S, D]``, dense as ``[S, B, H, D]``, and log-sum-exp ``[B, H, S]`` fp32."""
    group = query.shape[1] // key.shape[1]
    heads = range(query.shape[1])
    return pairing.forward(query, key, value, tuple(heads), tuple(head // group for head in heads), True)


def take_slope(slope: Tensor, output: Tensor, total: Tensor | None, kept: Tensor) -> Tensor:
    """``total [B, H, S]`` fp32 with the row sums of ``slope · output`` added in place; None: they alone.

    The slope is copied to ``kept``, of any strides.
    """
    slope, output = _dense_rows(slope), _dense_rows(output)
    batch, heads, sequence, width = slope.shape
    found = torch.empty(slope.shape[:3], dtype=torch.float32, device=slope.device) if total is None else total
    take_slope_kernel[(cdiv(sequence, _SUM_ROWS), heads, batch)](
        slope,
        output,
        found,
        kept,
        sequence,
        heads,
        *slope.stride()[:3],
        *output.stride()[:3],
        *kept.stride()[:3],
        D=width,
        BM=_SUM_ROWS,
        ADD=total is not None,
        num_warps=4,
    )
    return found


def value_gradient(
    query: Tensor, key: Tensor, lse: Tensor, slope: Tensor, choice: configs.Choice | None = None
) -> Tensor:
    """Gradient ``[B, kv heads, S, D]`` of the values, dense as ``[S, B, kv heads, D]``."""
    sizes = _Sizes.of(query, key)
    blocks = (choice or configs.choice(query.dtype, sizes.width)).values
    found = torch.empty(
        sizes.sequence, sizes.batch, sizes.kv_heads, sizes.width, dtype=slope.dtype, device=slope.device
    ).permute(1, 2, 0, 3)
    value_gradient_kernel[(sizes.batch * sizes.kv_heads, cdiv(sizes.sequence, blocks.keys))](
        heads_descriptor(query, blocks.queries, sizes.width),
        heads_descriptor(key, blocks.keys, sizes.width),
        heads_descriptor(slope, blocks.queries, sizes.width),
        _lines(lse, blocks.queries),
        found,
        sizes.sequence,
        sizes.group,
        sizes.kv_heads,
        sizes.scale,
        sizes.root,
        *found.stride()[:3],
        D=sizes.width,
        BM=blocks.queries,
        BN=blocks.keys,
        PRECISION=sizes.precision,
        STAGES=blocks.stages,
        **blocks.launch,
    )
    return found


def score_gradients(
    query: Tensor,
    key: Tensor,
    lse: Tensor,
    total: Tensor,
    slopes: Tensor,
    values: Tensor,
    choice: configs.Choice | None = None,
    scratch: int = configs.SCRATCH_BYTES,
) -> tuple[Tensor, Tensor]:
    """Gradients of query and key; ``scratch`` bytes hold tiles of score gradients.

    However many layers there are, the kernels are the same.
    """
    sizes = _Sizes.of(query, key)
    choice = choice or configs.choice(query.dtype, sizes.width)
    scores, products = choice.scores, choice.products
    tile, group = scores.keys, sizes.group
    rows = cdiv(sizes.sequence, tile)
    stored = rows * (rows + 1) // 2
    heads_at_once = max(1, scratch // (stored * tile * tile * query.element_size()))
    members = min(group, heads_at_once)
    members = next(n for n in range(members, 0, -1) if group % n == 0)
    pairs = min(sizes.batch * sizes.kv_heads, max(1, heads_at_once // members))
    tiles = torch.empty(pairs * members * stored * tile, tile, dtype=query.dtype, device=query.device)
    d_query = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    # Sums over several launches stay in fp32.
    wide = torch.float32 if members < group else key.dtype
    d_key = torch.empty(key.shape, dtype=wide, device=key.device)
    order = _order(rows, query.device)
    operands = [
        heads_descriptor(query, tile, sizes.width),
        heads_descriptor(key, tile, sizes.width),
        heads_descriptor(slopes.flatten(3), tile, choice.depth),
        heads_descriptor(values.flatten(3), tile, choice.depth),
        _lines(lse, tile),
        _lines(total, tile),
    ]
    described = TensorDescriptor(tiles, list(tiles.shape), [tile, 1], [tile, tile])
    constants = {"D": sizes.width, "TILE": tile, "PRECISION": sizes.precision}
    for first in range(0, sizes.batch * sizes.kv_heads, pairs):
        here = min(pairs, sizes.batch * sizes.kv_heads - first)
        for member in range(0, group, members):
            place = (sizes.sequence, group, sizes.kv_heads, first, member, members)
            score_gradient_kernel[(len(order), here * members)](
                *operands,
                order,
                slopes.shape[3] * sizes.width,
                tiles,
                *place,
                sizes.scale,
                sizes.root,
                BK=choice.depth,
                STAGES=scores.stages,
                **constants,
                **scores.launch,
            )
            query_gradient_kernel[(rows, here, members)](
                operands[1],
                described,
                d_query,
                *place,
                1 / sizes.root,
                STAGES=products.stages,
                **constants,
                **products.launch,
            )
            key_gradient_kernel[(rows, here)](
                operands[0],
                described,
                d_key,
                *place,
                1 / sizes.root,
                ADD=member > 0,
                STAGES=products.stages,
                **constants,
                **products.launch,
            )
    return d_query, d_key.to(key.dtype)


class _Sizes(NamedTuple):
    """What the launches of one call share; ``root`` is that of the width, ``scale`` log2(e) over it."""

    batch: int
    kv_heads: int
    group: int
    sequence: int
    width: int
    root: float
    scale: float
    precision: str

    @classmethod
    def of(cls, query: Tensor, key: Tensor) -> "_Sizes":
        batch, heads, sequence, width = query.shape
        kv_heads, root = key.shape[1], width**0.5
        precision = "ieee" if query.dtype == torch.float32 else "tf32"
        return cls(batch, kv_heads, heads // kv_heads, sequence, width, root, _LOG2E / root, precision)


@lru_cache(maxsize=16)
def _order(rows: int, device: torch.device) -> Tensor:
    """Tiles of the causal half, ``key tile + row tile << 16`` each, int32: a few rows at a time, by keys."""
    row, block = torch.tril_indices(rows, rows)
    by = (row // _ROWS_AT_ONCE * rows + block) * _ROWS_AT_ONCE + row % _ROWS_AT_ONCE
    return (block + (row << 16))[by.argsort()].to(torch.int32).to(device)


def _dense_rows(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _lines(x: Tensor, columns: int) -> TensorDescriptor:
    """``x [B, H, S]`` fp32 as ``[B · H, S]`` for TMA, whose rows begin at multiples of 16 bytes."""
    sequence = x.shape[2]
    lines = x.reshape(-1, sequence)
    if sequence % 4:
        padded = x.new_empty(len(lines), (sequence + 3) // 4 * 4)
        padded[:, :sequence] = lines
        lines = padded[:, :sequence]
    return TensorDescriptor(lines, list(lines.shape), [lines.stride(0), 1], [1, columns])
