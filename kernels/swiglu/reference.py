"""SwiGLU's product on a packed projection, in plain torch; differentiable."""

import torch
from torch import Tensor
from torch.nn.functional import silu

PACKING = 64  # columns of a block; blocks of gate and of up take turns


def swiglu(packed: Tensor) -> Tensor:
    """``silu(gate) · up`` (arXiv 2002.05202), computed in fp32 (fp64 for fp64) and rounded once.

    ``packed [..., 2·width]``: blocks of 64 columns of gate and of up take turns -> ``[..., width]``.
    """
    wide = torch.float64 if packed.dtype == torch.float64 else torch.float32
    gate, up = packed.to(wide).unflatten(-1, (-1, 2, PACKING)).unbind(-2)
    return (silu(gate) * up).flatten(-2).to(packed.dtype)
