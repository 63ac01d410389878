"""RMSNorm, alone and after a residual addition: Triton kernels on a GPU, plain torch on a CPU."""

from typing import Any

import torch
from torch import Tensor

from flashtrain.errors import UserError
from flashtrain.kernels.operator import operator
from flashtrain.kernels.rms_norm import reference


def rms_norm(x: Tensor, weight: Tensor, epsilon: float = 1e-5) -> Tensor:
    """``x / sqrt(mean(x²) + epsilon) · weight`` over the last dimension, as ``nn.RMSNorm`` computes it.

    x ``[..., D]``, weight ``[D]`` -> ``[..., D]`` in x's dtype, computed in fp32 and rounded once. float64 is
    left to torch, in float64. Raises UserError for a weight that does not fit.
    """
    _check(x, weight)
    if not x.is_cuda or x.dtype == torch.float64:
        return reference.rms_norm(x, weight, epsilon)
    y: Tensor = norm_kernels(x, weight, epsilon)
    return y


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, epsilon: float = 1e-5) -> tuple[Tensor, Tensor]:
    """``(rms_norm(s), s)`` with ``s = x + residual``: the addition and the norm in one pass.

    All ``[..., D]`` but the weight ``[D]``; x and residual have one shape and dtype, to which s is rounded
    before it is normed, so that the result is that of the two steps. The backward pass adds the gradient of s
    to that of the norm in the same pass, too.
    """
    _check(x, weight)
    if residual.shape != x.shape or residual.dtype != x.dtype:
        raise UserError(
            f"x {list(x.shape)} in {x.dtype} and the residual {list(residual.shape)} in {residual.dtype} "
            "must have one shape and dtype"
        )
    if not x.is_cuda or x.dtype == torch.float64:
        return reference.add_rms_norm(x, residual, weight, epsilon)
    y, total = add_norm_kernels(x, residual, weight, epsilon)
    return y, total


@operator("flashtrain::rms_norm")
def norm_kernels(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """``rms_norm`` by the Triton kernel: ``[..., D]``."""
    from flashtrain.kernels.rms_norm import triton

    return triton.forward(x, None, weight, epsilon)[0]


@norm_kernels.register_fake
def _(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    return _dense(x)


@operator("flashtrain::add_rms_norm")
def add_norm_kernels(x: Tensor, residual: Tensor, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """``add_rms_norm`` by the Triton kernel: ``[..., D]`` each."""
    from flashtrain.kernels.rms_norm import triton

    return triton.forward(x, residual, weight, epsilon)


@add_norm_kernels.register_fake
def _(x: Tensor, residual: Tensor, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    return _dense(x), _dense(x)


@operator("flashtrain::rms_norm_backward")
def norm_backward_kernels(
    dy: Tensor, d_total: Tensor | None, total: Tensor, weight: Tensor, epsilon: float
) -> tuple[Tensor, Tensor]:
    """Gradients of the normed ``total [..., D]``, its own ``d_total`` (or None) added, and of weight."""
    from flashtrain.kernels.rms_norm import triton

    return triton.backward(dy, d_total, total, weight, epsilon)


@norm_backward_kernels.register_fake
def _(
    dy: Tensor, d_total: Tensor | None, total: Tensor, weight: Tensor, epsilon: float
) -> tuple[Tensor, Tensor]:
    return _dense(total), torch.empty_like(weight, memory_format=torch.contiguous_format)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    x, weight, ctx.epsilon = inputs
    ctx.save_for_backward(x, weight)


def _backward(context: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    return *norm_backward_kernels(dy, None, *context.saved_tensors, context.epsilon), None


def _setup_add(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    _, _, weight, ctx.epsilon = inputs
    # A sum that nothing else uses has no gradient: zeros would cost a write and a read.
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output[1], weight)


def _backward_add(context: Any, dy: Tensor | None, d_total: Tensor | None) -> tuple[Tensor | None, ...]:
    if dy is None:
        return d_total, d_total, None, None
    dx, d_weight = norm_backward_kernels(dy, d_total, *context.saved_tensors, context.epsilon)
    return dx, dx, d_weight, None


norm_kernels.register_autograd(_backward, setup_context=_setup)
add_norm_kernels.register_autograd(_backward_add, setup_context=_setup_add)


def _dense(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _check(x: Tensor, weight: Tensor) -> None:
    if not x.dim() or weight.shape != x.shape[-1:]:
        raise UserError(f"the norm's weight {list(weight.shape)} must be as wide as x {list(x.shape)}")
