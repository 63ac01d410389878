"""The causal convolution as one differentiable function: a Triton kernel on a GPU, plain torch on a CPU."""

from typing import Any

import torch
from torch import Tensor

from flashtrain.errors import UserError
from flashtrain.kernels.causal_conv import reference
from flashtrain.kernels.layout import dense_like
from flashtrain.kernels.operator import operator

MOST_TAPS = 4  # of the kernel, which keeps that many rows in registers


def causal_conv(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, tail: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """``(y [B, S, D], new tail [B, W-1, D])`` with ``y_t = silu(bias + Σ_k weight[:, k] · x_{t-W+1+k})``.

    x ``[B, S, D]``, weight ``[D, W]``, bias ``[D]``; ``tail [B, W-1, D]`` holds the inputs before the first
    (None: zeros), so that a sequence may be run in pieces. The new tail may be a view of x. All have
    gradients. Raises UserError for shapes that do not fit together, and on a GPU for float64
    or more than four taps.
    """
    _check(x, weight, bias, tail)
    if x.is_cuda:
        if x.dtype == torch.float64 or weight.shape[1] > MOST_TAPS:
            raise UserError(
                f"the convolution kernel takes no float64 and at most {MOST_TAPS} taps, not {x.dtype} and "
                f"{weight.shape[1]}; cast x, shorten the weight, or run on the CPU"
            )
        y = conv_kernels(x, weight, bias, None if tail is None else tail.to(x.dtype))
    else:
        y = reference.causal_conv(x, weight, bias, tail)
    return y, reference.next_tail(x, weight.shape[1], tail)


@operator("flashtrain::causal_conv")
def conv_kernels(x: Tensor, weight: Tensor, bias: Tensor | None, tail: Tensor | None) -> Tensor:
    """``causal_conv`` by the Triton kernel: y ``[B, S, D]``."""
    from flashtrain.kernels.causal_conv import triton

    return triton.forward(x, weight, bias, tail)


@conv_kernels.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, tail: Tensor | None) -> Tensor:
    return dense_like(x)


@operator("flashtrain::causal_conv_backward")
def conv_backward_kernels(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, tail: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x ``[B, S, D]``, weight, bias and tail; empty where there is no input."""
    from flashtrain.kernels.causal_conv import triton

    dx, d_weight, d_bias, d_tail = triton.backward(dy, x, weight, bias, tail)
    return (
        dx,
        d_weight,
        x.new_empty(0) if d_bias is None else d_bias,
        x.new_empty(0) if d_tail is None else d_tail,
    )


@conv_backward_kernels.register_fake
def _(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, tail: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    d_weight = weight.new_empty(weight.shape[::-1]).t()
    d_bias = x.new_empty(0) if bias is None else torch.empty_like(bias)
    d_tail = x.new_empty(0) if tail is None else torch.empty_like(tail, memory_format=torch.contiguous_format)
    return dense_like(x), d_weight, d_bias, d_tail


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs)


def _backward(context: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    inputs = context.saved_tensors
    found = conv_backward_kernels(dy, *inputs)
    return tuple(None if given is None else grad for grad, given in zip(found, inputs, strict=True))


conv_kernels.register_autograd(_backward, setup_context=_setup)


def _check(x: Tensor, weight: Tensor, bias: Tensor | None, tail: Tensor | None) -> None:
    if x.dim() != 3 or weight.dim() != 2 or not weight.shape[1] or not x.shape[1]:
        raise UserError(f"x {list(x.shape)} must be [B, S, D], the weight {list(weight.shape)} [D, W]")
    batch, _, width = x.shape
    for name, tensor, shape in (
        ("weight", weight, (width, weight.shape[1])),
        ("bias", bias, (width,)),
        ("tail", tail, (batch, weight.shape[1] - 1, width)),
    ):
        if tensor is not None and tuple(tensor.shape) != shape:
            raise UserError(
                f"{name} is {list(tensor.shape)}; with x {list(x.shape)} it must be {list(shape)}"
            )
