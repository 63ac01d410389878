"""How outputs of kernels lie in memory."""

import torch
from torch import Tensor


def dense_like(x: Tensor) -> Tensor:
    """Uninitialised, dense, and with the order of x's first two dimensions ``[B, S, ...]`` in memory.

    Models keep activations ``[S, B, hidden]`` and hand kernels the transposed view; outputs must not cost
    them a copy.
    """
    if x.stride(0) < x.stride(1):
        return torch.empty_like(x.transpose(0, 1), memory_format=torch.contiguous_format).transpose(0, 1)
    return torch.empty_like(x, memory_format=torch.contiguous_format)
