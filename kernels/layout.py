"""How inputs and outputs of kernels lie in memory."""

import torch
from torch import Tensor

_WORD = torch.int64  # a thread of torch's copying kernels moves one element at a time, however narrow


def dense_like(x: Tensor) -> Tensor:
    """Uninitialised, dense, and with the order of x's first two dimensions ``[B, S, ...]`` in memory.

    Models keep activations ``[S, B, hidden]`` and hand kernels the transposed view; outputs must not cost
    them a copy.
    """
    if x.stride(0) < x.stride(1):
        return torch.empty_like(x.transpose(0, 1), memory_format=torch.contiguous_format).transpose(0, 1)
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def rows_of(x: Tensor) -> Tensor:
    """``x [..., D]`` as rows ``[R, D]``; copied only where the leading dimensions are no single stride."""
    width = x.shape[-1]
    return (x if x.stride(-1) == 1 else x.contiguous()).reshape(x.numel() // max(1, width), width)


def empty_heads(packed: Tensor, heads: int, width: int) -> Tensor:
    """Uninitialised ``[B, heads, S, width]`` for ``packed [S, B, ...]``; the sequence is first in memory."""
    return packed.new_empty(*packed.shape[:2], heads, width).permute(1, 2, 0, 3)


def heads_like(x: Tensor, heads: int) -> Tensor:
    """Uninitialised ``[B, heads, S, D]`` for ``x [B, n, S, D]``; the sequence is first in memory."""
    return empty_heads(x.permute(2, 0, 1, 3), heads, x.shape[3])


def in_words(x: Tensor) -> Tensor:
    """``x`` with the same bytes in wide elements, where they lie so and torch's own kernel copies them."""
    if torch.compiler.is_compiling():
        return x
    group = _WORD.itemsize // x.itemsize
    places = x.shape[-1], x.storage_offset(), *x.stride()[:-1]
    fits = x.stride(-1) == 1 and not any(place % group for place in places)
    return x.view(_WORD) if fits else x
