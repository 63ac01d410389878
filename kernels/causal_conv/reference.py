"""Causal depthwise convolution over time, with bias and SiLU, in plain torch; differentiable."""

import torch
from torch import Tensor
from torch.nn.functional import pad, silu


def causal_conv(x: Tensor, weight: Tensor, bias: Tensor | None = None, tail: Tensor | None = None) -> Tensor:
    """``y_t = silu(bias + Σ_k weight[:, k] · x_{t-W+1+k})``, in x's dtype, computed in fp32 (fp64 for fp64).

    x ``[B, S, D]``, weight ``[D, W]``, bias ``[D]``; ``tail [B, W-1, D]`` holds the W-1 inputs before the
    first, zeros if it is None.
    """
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    sequence, taps = x.shape[1], weight.shape[1]
    inputs = pad(x, (0, 0, taps - 1, 0)) if tail is None else torch.cat([tail.to(x.dtype), x], dim=1)
    inputs = inputs.to(wide)
    total = torch.zeros_like(x, dtype=wide) if bias is None else bias.to(wide).expand(x.shape)
    for tap in range(taps):
        total = total + inputs[:, tap : tap + sequence] * weight[:, tap].to(wide)
    return silu(total).to(x.dtype)


def next_tail(x: Tensor, taps: int, tail: Tensor | None = None) -> Tensor:
    """The last W-1 = ``taps - 1`` inputs ``[B, W-1, D]`` out of ``tail [B, W-1, D]`` and x ``[B, S, D]``."""
    if x.shape[1] < taps - 1:
        x = pad(x, (0, 0, taps - 1, 0)) if tail is None else torch.cat([tail.to(x.dtype), x], dim=1)
    return x[:, x.shape[1] - taps + 1 :]
