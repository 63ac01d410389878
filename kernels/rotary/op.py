"""Heads out of a packed projection, rotated: Triton kernels on a GPU, plain torch on a CPU."""

from typing import Any

import torch
from torch import Tensor

from flashtrain.errors import UserError
from flashtrain.kernels.layout import empty_heads
from flashtrain.kernels.operator import operator
from flashtrain.kernels.rotary import reference


def rotary_qkv(
    packed: Tensor, table: Tensor, units: int, queries: int, keys: int, values: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value heads of a packed projection, with rotary positions (arXiv 2104.09864).

    ``packed [S, B, units · (queries + keys + values) · D]`` holds ``units`` groups, each of ``queries`` query
    heads, then ``keys`` key heads, then ``values`` value heads; ``table [2, S, D]`` has cosine and sine of
    the S positions, whichever they are. -> query ``[B, units · queries, S, D]``, key and value likewise.
    Query and key rotate in fp32 and are rounded once; float64 is left to torch, in float64.

    On a GPU all three are dense with the sequence first in memory, as packed is: attention then gives its
    output in that order, and the projection behind it takes it without a copy. The value is copied, too: a
    view would save a sixth of the traffic (of Llama's heads) and keep all of packed until the backward pass.

    Raises UserError for shapes that do not fit together.
    """
    _check(packed, table, units, queries, keys, values)
    if not packed.is_cuda or packed.dtype == torch.float64:
        return reference.rotary_qkv(packed, table, units, queries, keys, values)
    query, key, value = rotary_kernels(packed, table, units, queries, keys, values)
    return query, key, value


@operator("flashtrain::rotary_qkv")
def rotary_kernels(
    packed: Tensor, table: Tensor, units: int, queries: int, keys: int, values: int
) -> tuple[Tensor, Tensor, Tensor]:
    """``rotary_qkv`` by the Triton kernel; the table has no gradient."""
    from flashtrain.kernels.rotary import triton

    return triton.forward(packed, table, units, queries, keys, values)


@rotary_kernels.register_fake
def _(
    packed: Tensor, table: Tensor, units: int, queries: int, keys: int, values: int
) -> tuple[Tensor, Tensor, Tensor]:
    query, key, value = (
        empty_heads(packed, units * count, table.shape[2]) for count in (queries, keys, values)
    )
    return query, key, value


@operator("flashtrain::rotary_qkv_backward")
def rotary_backward_kernels(
    d_query: Tensor, d_key: Tensor, d_value: Tensor, table: Tensor, units: int
) -> Tensor:
    """Gradient of packed ``[S, B, units · (queries + keys + values) · D]``."""
    from flashtrain.kernels.rotary import triton

    return triton.backward(d_query, d_key, d_value, table, units)


@rotary_backward_kernels.register_fake
def _(d_query: Tensor, d_key: Tensor, d_value: Tensor, table: Tensor, units: int) -> Tensor:
    batch, _, sequence, width = d_query.shape
    heads = d_query.shape[1] + d_key.shape[1] + d_value.shape[1]
    return d_query.new_empty(sequence, batch, heads * width)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    _, table, ctx.units, *_ = inputs
    ctx.save_for_backward(table)


def _backward(context: Any, *slopes: Tensor) -> tuple[Tensor | None, ...]:
    gradient = rotary_backward_kernels(*slopes, *context.saved_tensors, context.units)
    return gradient, None, None, None, None, None


rotary_kernels.register_autograd(_backward, setup_context=_setup)


def _check(packed: Tensor, table: Tensor, units: int, queries: int, keys: int, values: int) -> None:
    heads = units * (queries + keys + values)
    if min(units, queries) < 1 or min(keys, values) < 0:
        raise UserError(
            f"{units} units of {queries} query, {keys} key and {values} value heads: give at least 1 unit of "
            "1 query head, and no less than 0 of the others"
        )
    if packed.dim() != 3 or table.dim() != 3 or table.shape[0] != 2 or table.shape[2] % 2:
        raise UserError(
            f"packed heads {list(packed.shape)} must be [S, B, heads · D], and the rotary table "
            f"{list(table.shape)} [2, S, D] with an even D"
        )
    if packed.shape[0] != table.shape[1] or packed.shape[2] != heads * table.shape[2]:
        raise UserError(
            f"packed heads are {list(packed.shape)}; {heads} heads and the rotary table {list(table.shape)} "
            f"need [{table.shape[1]}, B, {heads * table.shape[2]}]"
        )
