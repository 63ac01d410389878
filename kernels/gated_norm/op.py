"""Gate and RMSNorm as one differentiable function: a Triton kernel on a GPU, plain torch on a CPU."""

from typing import Any

import torch
from torch import Tensor

from flashtrain.errors import UserError
from flashtrain.kernels.gated_norm import reference
from flashtrain.kernels.operator import operator


def gated_norm(x: Tensor, z: Tensor, weight: Tensor, groups: int = 1, epsilon: float = 1e-5) -> Tensor:
    """``rms_norm(x · silu(z)) · weight``, normed over each of ``groups`` equal parts of the last dimension.

    x and z ``[..., D]``, weight ``[D]`` -> ``[..., D]`` in x's dtype. Raises UserError for shapes that do not
    fit together, and on a GPU for float64.
    """
    width = x.shape[-1]
    if z.shape != x.shape or weight.shape != (width,) or width % groups:
        raise UserError(
            f"x {list(x.shape)} and z {list(z.shape)} must be alike, the weight {list(weight.shape)} their "
            f"width, and {groups} groups divide it"
        )
    if not x.is_cuda:
        return reference.gated_norm(x, z, weight, groups, epsilon)
    if x.dtype == torch.float64:
        raise UserError("the norm kernel takes no float64; cast x, or run on the CPU")
    return norm_kernels(x, z, weight, groups, epsilon)


@operator("flashtrain::gated_norm")
def norm_kernels(x: Tensor, z: Tensor, weight: Tensor, groups: int, epsilon: float) -> Tensor:
    """``gated_norm`` by the Triton kernel: ``[..., D]``."""
    from flashtrain.kernels.gated_norm import triton

    return triton.forward(x, z, weight, groups, epsilon)


@norm_kernels.register_fake
def _(x: Tensor, z: Tensor, weight: Tensor, groups: int, epsilon: float) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@operator("flashtrain::gated_norm_backward")
def norm_backward_kernels(
    dy: Tensor, x: Tensor, z: Tensor, weight: Tensor, groups: int, epsilon: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, z ``[..., D]`` and weight ``[D]``."""
    from flashtrain.kernels.gated_norm import triton

    return triton.backward(dy, x, z, weight, groups, epsilon)


@norm_backward_kernels.register_fake
def _(
    dy: Tensor, x: Tensor, z: Tensor, weight: Tensor, groups: int, epsilon: float
) -> tuple[Tensor, Tensor, Tensor]:
    dx, dz = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in (x, z))
    return dx, dz, torch.empty_like(weight)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    x, z, weight, ctx.groups, ctx.epsilon = inputs
    ctx.save_for_backward(x, z, weight)


def _backward(context: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    gradients = norm_backward_kernels(dy, *context.saved_tensors, context.groups, context.epsilon)
    return (*gradients, None, None)


norm_kernels.register_autograd(_backward, setup_context=_setup)
