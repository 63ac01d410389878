"""Gate and RMSNorm of Mamba-2 in plain torch; differentiable."""

import torch
from torch import Tensor
from torch.nn.functional import silu


def gated_norm(x: Tensor, z: Tensor, weight: Tensor, groups: int, epsilon: float) -> Tensor:
    """``rms_norm(x · silu(z)) · weight`` over each of ``groups`` equal parts of the last dimension.

    x and z ``[..., D]``, weight ``[D]`` -> ``[..., D]`` in x's dtype; computed in fp32 (fp64 for fp64).
    """
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    gated = (x.to(wide) * silu(z.to(wide))).unflatten(-1, (groups, -1))
    scale = (gated.square().mean(-1, keepdim=True) + epsilon).rsqrt()
    return ((gated * scale).flatten(-2) * weight.to(wide)).to(x.dtype)
