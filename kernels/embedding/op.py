"""Rows of a table by token, their gradients added in one order: Triton kernels on a GPU, torch on a CPU."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from flashtrain.errors import UserError
from flashtrain.kernels.embedding import reference
from flashtrain.kernels.operator import operator
from flashtrain.kernels.weight_gradient import WeightGradient


def embedding(
    tokens: Tensor,
    table: Tensor,
    first: int = 0,
    vocabulary: int | None = None,
    main: WeightGradient | None = None,
) -> Tensor:
    """``table[tokens - first]``: ``tokens [...]``, ``table [rows, H]`` -> ``[..., H]`` in the table's dtype.

    The table holds the rows from ``first`` on of ``vocabulary`` (None: it is all of it); a token of others
    has zeros. On a GPU a token outside of the vocabulary has NaN, and an element of the table's gradient is
    one fp32 sum in the order of the tokens, rounded once. With ``main`` it is added there, to the rows alone
    that tokens name, and autograd gets none; except in compiled code. On a CPU, and in float64, the gradient
    is torch's. Raises UserError for a table that is no matrix or for tokens that are no integers.
    """
    if table.dim() != 2 or tokens.dtype not in (torch.int64, torch.int32):
        raise UserError(
            f"tokens in {tokens.dtype} and a table {list(table.shape)} do not fit: "
            "tokens are int64 or int32, the table is [rows, H]"
        )
    vocabulary = table.shape[0] if vocabulary is None else vocabulary
    if not table.is_cuda or table.dtype == torch.float64:
        return reference.embedding(tokens, table, first, vocabulary)
    return by_kernels(tokens, table, first, vocabulary, main)


def by_kernels(
    tokens: Tensor, table: Tensor, first: int, vocabulary: int, main: WeightGradient | None = None
) -> Tensor:
    """``embedding`` by the Triton kernels: ``[..., H]``."""
    if main is None or torch.compiler.is_compiling():
        y: Tensor = lookup_kernels(tokens, table, first, vocabulary)
    else:
        y = _Accumulating.apply(tokens, table, first, vocabulary, main)
    return y


class _Accumulating(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, tokens: Tensor, table: Tensor, first: int, vocabulary: int, main: WeightGradient
    ) -> Tensor:
        ctx.save_for_backward(tokens)
        ctx.first, ctx.main = first, main
        y: Tensor = lookup_kernels(tokens, table, first, vocabulary)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[None, ...]:
        from flashtrain.kernels.embedding import triton

        (tokens,) = ctx.saved_tensors
        ctx.main.add_rows(lambda total, add: triton.backward(dy, tokens, ctx.first, total, add))
        return None, None, None, None, None


@operator("flashtrain::embedding")
def lookup_kernels(tokens: Tensor, table: Tensor, first: int, vocabulary: int) -> Tensor:
    """``embedding`` by the Triton kernel: ``[..., H]``."""
    from flashtrain.kernels.embedding import triton

    return triton.forward(tokens, table, first, vocabulary)


@lookup_kernels.register_fake
def _(tokens: Tensor, table: Tensor, first: int, vocabulary: int) -> Tensor:
    return table.new_empty(*tokens.shape, table.shape[1])


@operator("flashtrain::embedding_backward")
def gradient_kernels(dy: Tensor, tokens: Tensor, first: int, rows: int) -> Tensor:
    """Gradient of the table ``[rows, H]``, given that of what was looked up, ``dy [..., H]``."""
    from flashtrain.kernels.embedding import triton

    gradient = dy.new_zeros(rows, dy.shape[-1])
    triton.backward(dy, tokens, first, gradient, False)
    return gradient


@gradient_kernels.register_fake
def _(dy: Tensor, tokens: Tensor, first: int, rows: int) -> Tensor:
    return dy.new_empty(rows, dy.shape[-1])


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    tokens, table, ctx.first, _ = inputs
    ctx.rows = table.shape[0]
    ctx.save_for_backward(tokens)


def _backward(context: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    (tokens,) = context.saved_tensors
    return None, gradient_kernels(dy, tokens, context.first, context.rows), None, None


lookup_kernels.register_autograd(_backward, setup_context=_setup)
