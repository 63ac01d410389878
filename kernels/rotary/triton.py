"""Heads out of a packed projection and rotary positions in one pass each way.

A program has some heads of one token, so that it reads the token's cosines and sines once for all of them. A
head goes to (or comes from) query, key or value: two of three accesses are masked whole and cost nothing.
"""

import triton
import triton.language as tl
from torch import Tensor

from flashtrain.kernels.jit import kernel
from flashtrain.kernels.layout import empty_heads, rows_of
from flashtrain.kernels.sizes import cdiv, next_power_of_2

_PAIRS, _WARPS = 1024, 4  # pairs of a program: 8 a thread


@triton.jit
def load_angles(table, position, kind_stride, position_stride, half, inside, HALF: tl.constexpr):  # type: ignore[no-untyped-def]
    """Cosines of both halves of a head, then sines, ``[1, half]`` each."""
    cosine = table + position * position_stride + half
    sine = cosine + kind_stride
    return (
        tl.load(cosine, mask=inside, other=0.0)[None, :].to(tl.float32),
        tl.load(cosine + HALF, mask=inside, other=0.0)[None, :].to(tl.float32),
        tl.load(sine, mask=inside, other=0.0)[None, :].to(tl.float32),
        tl.load(sine + HALF, mask=inside, other=0.0)[None, :].to(tl.float32),
    )


@kernel
def forward_kernel(  # type: ignore[no-untyped-def]
    packed,
    table,
    query,
    key,
    value,
    batch,
    packed_row,
    table_kind,
    table_position,
    UNITS: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    VALUES: tl.constexpr,
    HALF: tl.constexpr,
    HEADS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """``HEADS`` heads of one token, into query, key and value, each ``[S, B, heads, 2 · HALF]``."""
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    half = tl.arange(0, COLUMNS)
    unit, place = head // (QUERIES + KEYS + VALUES), head % (QUERIES + KEYS + VALUES)
    cosine, cosine_2, sine, sine_2 = load_angles(
        table, row // batch, table_kind, table_position, half, half < HALF, HALF
    )
    inside = (head < UNITS * (QUERIES + KEYS + VALUES))[:, None] & (half < HALF)[None, :]
    source = packed + row * packed_row + head[:, None] * (2 * HALF) + half[None, :]
    first = tl.load(source, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(source + HALF, mask=inside, other=0.0).to(tl.float32)
    turns = (place < QUERIES + KEYS)[:, None]
    turned = tl.where(turns, first * cosine - second * sine, first).to(query.dtype.element_ty)
    turned_2 = tl.where(turns, second * cosine_2 + first * sine_2, second).to(query.dtype.element_ty)

    wanted = inside & (place < QUERIES)[:, None]
    target = query + row * (UNITS * QUERIES * 2 * HALF) + half[None, :]
    target += (unit * QUERIES + place)[:, None] * (2 * HALF)
    tl.store(target, turned, mask=wanted)
    tl.store(target + HALF, turned_2, mask=wanted)

    wanted = inside & ((place >= QUERIES) & (place < QUERIES + KEYS))[:, None]
    target = key + row * (UNITS * KEYS * 2 * HALF) + half[None, :]
    target += (unit * KEYS + place - QUERIES)[:, None] * (2 * HALF)
    tl.store(target, turned, mask=wanted)
    tl.store(target + HALF, turned_2, mask=wanted)

    wanted = inside & (place >= QUERIES + KEYS)[:, None]
    target = value + row * (UNITS * VALUES * 2 * HALF) + half[None, :]
    target += (unit * VALUES + place - QUERIES - KEYS)[:, None] * (2 * HALF)
    tl.store(target, turned, mask=wanted)
    tl.store(target + HALF, turned_2, mask=wanted)


@kernel
def backward_kernel(  # type: ignore[no-untyped-def]
    d_query,
    d_key,
    d_value,
    table,
    d_packed,
    batch,
    query_batch,
    query_head,
    query_position,
    key_batch,
    key_head,
    key_position,
    value_batch,
    value_head,
    value_position,
    table_kind,
    table_position,
    UNITS: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    VALUES: tl.constexpr,
    HALF: tl.constexpr,
    HEADS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """``HEADS`` heads of one token of ``d_packed``, turned back."""
    row = tl.program_id(0).to(tl.int64)
    position, sample = row // batch, row % batch
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    half = tl.arange(0, COLUMNS)
    # In 64 bits: with the sequence inside, a head's stride is S · D.
    unit = (head // (QUERIES + KEYS + VALUES)).to(tl.int64)
    place = head % (QUERIES + KEYS + VALUES)
    cosine, cosine_2, sine, sine_2 = load_angles(
        table, position, table_kind, table_position, half, half < HALF, HALF
    )
    inside = (head < UNITS * (QUERIES + KEYS + VALUES))[:, None] & (half < HALF)[None, :]

    wanted = inside & (place < QUERIES)[:, None]
    source = d_query + sample * query_batch + position * query_position + half[None, :]
    source += (unit * QUERIES + place)[:, None] * query_head
    first = tl.load(source, mask=wanted, other=0.0).to(tl.float32)
    second = tl.load(source + HALF, mask=wanted, other=0.0).to(tl.float32)

    # Each head is in one of the three, and zero in the others: the sums are exact.
    wanted = inside & ((place >= QUERIES) & (place < QUERIES + KEYS))[:, None]
    source = d_key + sample * key_batch + position * key_position + half[None, :]
    source += (unit * KEYS + place - QUERIES)[:, None] * key_head
    first += tl.load(source, mask=wanted, other=0.0).to(tl.float32)
    second += tl.load(source + HALF, mask=wanted, other=0.0).to(tl.float32)

    wanted = inside & (place >= QUERIES + KEYS)[:, None]
    source = d_value + sample * value_batch + position * value_position + half[None, :]
    source += (unit * VALUES + place - QUERIES - KEYS)[:, None] * value_head
    first += tl.load(source, mask=wanted, other=0.0).to(tl.float32)
    second += tl.load(source + HALF, mask=wanted, other=0.0).to(tl.float32)

    turns = (place < QUERIES + KEYS)[:, None]
    turned = tl.where(turns, first * cosine + second * sine_2, first)
    turned_2 = tl.where(turns, second * cosine_2 - first * sine, second)
    target = d_packed + row * (UNITS * (QUERIES + KEYS + VALUES) * 2 * HALF)
    target += head[:, None] * (2 * HALF) + half[None, :]
    tl.store(target, turned.to(d_packed.dtype.element_ty), mask=inside)
    tl.store(target + HALF, turned_2.to(d_packed.dtype.element_ty), mask=inside)


def forward(
    packed: Tensor,
    table: Tensor,
    units: int,
    queries: int,
    keys: int,
    values: int,
    pairs: int = _PAIRS,
    warps: int = _WARPS,
) -> tuple[Tensor, Tensor, Tensor]:
    """See ``op.rotary_qkv``: query, key and value ``[B, heads, S, D]``, sequence first in memory."""
    query, key, value = (
        empty_heads(packed, units * count, table.shape[2]) for count in (queries, keys, values)
    )
    rows, table = rows_of(packed), _last_dense(table)
    tile = _tile(units * (queries + keys + values), table.shape[2] // 2, pairs)
    forward_kernel[(rows.shape[0], cdiv(units * (queries + keys + values), tile["HEADS"]))](
        rows,
        table,
        query,
        key,
        value,
        packed.shape[1],
        rows.stride(0),
        *table.stride()[:2],
        UNITS=units,
        QUERIES=queries,
        KEYS=keys,
        VALUES=values,
        **tile,
        num_warps=warps,
    )
    return query, key, value


def backward(
    d_query: Tensor,
    d_key: Tensor,
    d_value: Tensor,
    table: Tensor,
    units: int,
    pairs: int = _PAIRS,
    warps: int = _WARPS,
) -> Tensor:
    """The gradient of packed ``[S, B, heads · D]``; those of the heads may have any strides."""
    batch, _, sequence, width = d_query.shape
    slopes = [_last_dense(slope) for slope in (d_query, d_key, d_value)]
    queries, keys, values = (slope.shape[1] // units for slope in slopes)
    heads = units * (queries + keys + values)
    d_packed = d_query.new_empty(sequence, batch, heads * width)
    table = _last_dense(table)
    tile = _tile(heads, width // 2, pairs)
    backward_kernel[(sequence * batch, cdiv(heads, tile["HEADS"]))](
        *slopes,
        table,
        d_packed,
        batch,
        *(stride for slope in slopes for stride in slope.stride()[:3]),
        *table.stride()[:2],
        UNITS=units,
        QUERIES=queries,
        KEYS=keys,
        VALUES=values,
        **tile,
        num_warps=warps,
    )
    return d_packed


def _tile(heads: int, half: int, pairs: int) -> dict[str, int]:
    columns = next_power_of_2(half)
    return {
        "HALF": half,
        "COLUMNS": columns,
        "HEADS": min(next_power_of_2(heads), max(1, pairs // columns)),
    }


def _last_dense(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()
