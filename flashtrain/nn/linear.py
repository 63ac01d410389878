"""Linear layers whose weight gradients add up in fp32 where the optimizer reads them."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear

from flashtrain.kernels.weight_gradient import WeightGradient


class Linear(nn.Linear):
    """``nn.Linear`` that adds its weight's gradient to ``weight.main_grad``, a ``WeightGradient``, if any.

    The same bits forward and in the gradient of the input. Compiled code leaves the gradient to autograd.
    """

    def forward(self, x: Tensor) -> Tensor:
        return product(x, self.weight, self.bias, getattr(self.weight, "main_grad", None))


def product(x: Tensor, weight: Tensor, bias: Tensor | None, main: WeightGradient | None) -> Tensor:
    """``x [..., K] · weight [N, K]ᵀ + bias``; the weight's gradient is added to ``main``, if there is one."""
    wanted = torch.is_grad_enabled() and weight.requires_grad
    if main is None or not wanted or torch.compiler.is_compiling():
        return linear(x, weight, bias)
    # As rows, which is what torch makes of it too where a gradient is wanted, but not inside a function.
    y: Tensor = _Product.apply(x.reshape(-1, x.shape[-1]), weight, bias, main)
    return y.view(*x.shape[:-1], y.shape[-1])


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, main: WeightGradient) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.main = main
        return linear(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, None, Tensor | None, None]:
        x, weight = ctx.saved_tensors
        dx = torch.mm(dy, weight) if ctx.needs_input_grad[0] else None
        ctx.main.add_product(dy.t(), x)
        return dx, None, dy.sum(0) if ctx.needs_input_grad[2] else None, None
