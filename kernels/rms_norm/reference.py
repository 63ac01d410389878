"""RMSNorm (arXiv 1910.07467), alone and after a residual addition, in plain torch; differentiable."""

import torch
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """``x / sqrt(mean(x²) + epsilon) · weight`` over the last dimension: what ``nn.RMSNorm`` computes.

    ``[..., D]``, weight ``[D]`` -> ``[..., D]`` in x's dtype; torch computes in fp32 (fp64 for fp64), weight
    included, and rounds once.
    """
    return torch.nn.functional.rms_norm(x, weight.shape, weight, epsilon)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """``(rms_norm(s), s)`` with ``s = x + residual`` rounded to their dtype, ``[..., D]`` each."""
    total = x + residual
    return rms_norm(total, weight, epsilon), total
