"""Launches of the kernels; arguments and results as in ``reference``, with any strides."""

from collections.abc import Sequence

import torch
import triton
from torch import Tensor

from flashtrain.kernels.shared_attention import config as configs
from flashtrain.kernels.shared_attention.backward import (
    key_gradient_kernel,
    query_gradient_kernel,
    row_sums_kernel,
    value_gradient_kernel,
)
from flashtrain.kernels.shared_attention.config import Blocks
from flashtrain.kernels.shared_attention.forward import shared_attention_kernel

_LOG2E = 1.4426950408889634
_SUM_ROWS = 64
_ALIGNMENT = 32  # bytes: eight fp32, as the kernel is told of every place


def attend(query: Tensor, key: Tensor, value: Tensor, blocks: Blocks | None = None) -> tuple[Tensor, Tensor]:
    """Output ``[B, H, S, D]``, dense as ``[S, B, H, D]``, and log-sum-exp ``[B, H, S]`` fp32."""
    lse = torch.empty(query.shape[:3], dtype=torch.float32, device=query.device)
    return _forward(query, key, value, lse, False, blocks), lse


def attend_given(
    query: Tensor, key: Tensor, value: Tensor, lse: Tensor, blocks: Blocks | None = None
) -> Tensor:
    """Output ``[B, H, S, D]``, dense as ``[S, B, H, D]``, given ``lse [B, H, S]``."""
    return _forward(query, key, value, lse, True, blocks)


def _forward(
    query: Tensor, key: Tensor, value: Tensor, lse: Tensor, given: bool, blocks: Blocks | None
) -> Tensor:
    query, key, value = map(_dense_rows, (query, key, value))
    batch, heads, sequence, width = query.shape
    blocks = blocks or configs.choice(query.dtype, width).forward
    # As the projection after attention reads it.
    output = torch.empty(sequence, batch, heads, width, dtype=query.dtype, device=query.device)
    output = output.permute(1, 2, 0, 3)
    shared_attention_kernel[(triton.cdiv(sequence, blocks.queries), heads, batch)](
        query,
        key,
        value,
        lse,
        output,
        sequence,
        heads,
        heads // key.shape[1],
        width**-0.5 * _LOG2E,
        *query.stride()[:3],
        *key.stride()[:3],
        *value.stride()[:3],
        *output.stride()[:3],
        D=width,
        BM=blocks.queries,
        BN=blocks.keys,
        GIVEN=given,
        PRECISION=_precision(query),
        STAGES=blocks.stages,
        num_warps=blocks.warps,
    )
    return output


def add_row_sums(slope: Tensor, output: Tensor, total: Tensor | None) -> Tensor:
    """``total [B, H, S]`` fp32 with the row sums of ``slope · output`` added in place; None: they alone."""
    slope, output = _dense_rows(slope), _dense_rows(output)
    batch, heads, sequence, width = slope.shape
    found = torch.empty(slope.shape[:3], dtype=torch.float32, device=slope.device) if total is None else total
    row_sums_kernel[(triton.cdiv(sequence, _SUM_ROWS), heads, batch)](
        slope,
        output,
        found,
        sequence,
        heads,
        *slope.stride()[:3],
        *output.stride()[:3],
        D=width,
        BM=_SUM_ROWS,
        ADD=total is not None,
        num_warps=4,
    )
    return found


def value_gradient(
    query: Tensor, key: Tensor, lse: Tensor, slope: Tensor, blocks: Blocks | None = None
) -> Tensor:
    """Gradient ``[B, kv heads, S, D]`` of the values, dense as ``[S, B, kv heads, D]``."""
    query, key, slope = map(_dense_rows, (query, key, slope))
    batch, heads, sequence, width = query.shape
    kv_heads = key.shape[1]
    blocks = blocks or configs.choice(query.dtype, width).values
    found = torch.empty(sequence, batch, kv_heads, width, dtype=slope.dtype, device=slope.device)
    found = found.permute(1, 2, 0, 3)
    value_gradient_kernel[(triton.cdiv(sequence, blocks.keys), kv_heads, batch)](
        query,
        key,
        lse,
        slope,
        found,
        sequence,
        heads,
        heads // kv_heads,
        width**-0.5 * _LOG2E,
        *query.stride()[:3],
        *key.stride()[:3],
        *slope.stride()[:3],
        *found.stride()[:3],
        D=width,
        BM=blocks.queries,
        BN=blocks.keys,
        EVEN=sequence % blocks.queries == 0,
        PRECISION=_precision(query),
        STAGES=blocks.stages,
        num_warps=blocks.warps,
    )
    return found


def source_gradient(
    query: Tensor,
    key: Tensor,
    lse: Tensor,
    total: Tensor,
    slope: Tensor,
    value: Tensor,
    slopes: Sequence[Tensor],
    values: Sequence[Tensor],
    blocks: tuple[Blocks, Blocks] | None = None,
    scratch: int = configs.SCRATCH_BYTES,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and the source's value; ``scratch`` bytes hold tiles of score gradients.

    ``blocks`` are those of the keys' and of the queries' kernel, with tiles of one size. However many layers
    share, the kernels are the same: they find their tensors through a table.
    """
    query, key, value = map(_dense_rows, (query, key, value))
    slope, *slopes = _alike([slope, *slopes])
    values = _alike(values) if values else [value]
    batch, heads, sequence, width = query.shape
    kv_heads = key.shape[1]
    group = heads // kv_heads
    chosen = configs.choice(query.dtype, width)
    of_keys, of_queries = blocks or (chosen.source, chosen.query)
    bm, bn = of_keys.queries, of_keys.keys
    if (of_queries.queries, of_queries.keys) != (bm, bn) or bn % bm:
        raise ValueError(f"{of_keys} and {of_queries} must have tiles of one size, and queries divide keys")
    rows, columns = triton.cdiv(sequence, bm), triton.cdiv(sequence, bn)
    stored = columns * rows - (bn // bm) * (columns * (columns - 1) // 2)
    heads_at_once = max(1, scratch // (stored * bm * bn * query.element_size()))
    members = min(group, heads_at_once)
    members = next(n for n in range(members, 0, -1) if group % n == 0)
    pairs = min(batch * kv_heads, max(1, heads_at_once // members))
    tiles = torch.empty(pairs * members * stored * bm * bn, dtype=query.dtype, device=query.device)
    # Sums over several launches stay in fp32.
    wide = torch.float32 if members < group else key.dtype
    d_query = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    d_key, d_value = (torch.empty(key.shape, dtype=wide, device=key.device) for _ in range(2))
    bases = (slopes[0] if slopes else slope), values[0]
    places = _places(bases, slopes, values, query)
    precision = _precision(query)
    scale, sigma = width**-0.5 * _LOG2E, width**-0.5
    for first in range(0, batch * kv_heads, pairs):
        here = min(pairs, batch * kv_heads - first)
        for member in range(0, group, members):
            key_gradient_kernel[(columns, here)](
                query,
                key,
                value,
                lse,
                total,
                slope,
                *bases,
                places,
                len(slopes),
                tiles,
                d_key,
                d_value,
                sequence,
                heads,
                group,
                kv_heads,
                first,
                member,
                members,
                scale,
                sigma,
                *query.stride()[:3],
                *key.stride()[:3],
                *value.stride()[:3],
                *slope.stride()[:3],
                *values[0].stride()[:3],
                D=width,
                BM=bm,
                BN=bn,
                ADD=member > 0,
                EVEN=sequence % bn == 0,
                PRECISION=precision,
                STAGES=of_keys.stages,
                num_warps=of_keys.warps,
            )
            query_gradient_kernel[(rows, here, members)](
                key,
                tiles,
                d_query,
                sequence,
                heads,
                group,
                kv_heads,
                first,
                member,
                members,
                sigma,
                *key.stride()[:3],
                D=width,
                BM=bm,
                BN=bn,
                PRECISION=precision,
                STAGES=of_queries.stages,
                num_warps=of_queries.warps,
            )
    return d_query, d_key.to(key.dtype), d_value.to(value.dtype)


def _dense_rows(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _alike(tensors: Sequence[Tensor]) -> list[Tensor]:
    """``tensors`` of one layout, dense rows first at addresses that the kernel can read in one piece.

    They are copied only where they differ, which those of a model's layers do not.
    """
    strides = _dense_rows(tensors[0]).stride()
    if all(t.stride() == strides and t.data_ptr() % _ALIGNMENT == 0 for t in tensors):
        return list(tensors)
    return [t.clone(memory_format=torch.contiguous_format) for t in tensors]


def _places(
    bases: tuple[Tensor, Tensor], slopes: Sequence[Tensor], values: Sequence[Tensor], of: Tensor
) -> Tensor:
    """Where each layer's tensors start, in elements after ``bases``: ``[max(1, layers), 2]`` int64."""
    table = [
        [(t.data_ptr() - base.data_ptr()) // of.element_size() for t, base in zip(pair, bases, strict=True)]
        for pair in zip(slopes, values, strict=bool(slopes))
    ]
    return torch.tensor(table or [[0, 0]]).to(of.device, non_blocking=True)


def _precision(tensor: Tensor) -> str:
    return "ieee" if tensor.dtype == torch.float32 else "tf32"
