"""Weight gradients as sums of products, in fp32, where the optimizer reads them."""

import torch
from torch import Tensor


class WeightGradient:
    """The gradient of one weight ``[N, K]`` over the products of a step; fp32, or fp64 for an fp64 weight.

    The first product is written, the others are added: memory that holds the last step's gradient needs no
    clearing. Where a parameter has one as ``main_grad``, the products that the weight takes part in add to
    it in their backward pass, and give autograd no gradient in the weight's narrower dtype.
    """

    def __init__(self, weight: Tensor) -> None:
        wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
        self.total = torch.empty(weight.shape, dtype=wide, device=weight.device)
        self.filled = False

    def add_product(self, a: Tensor, b: Tensor) -> None:
        """Add ``a [N, M] · b [M, K]``, summed in fp32 and not rounded in between."""
        if a.dtype != self.total.dtype and not a.is_cuda:
            a, b = a.to(self.total.dtype), b.to(self.total.dtype)
        if a.dtype == self.total.dtype:
            if self.filled:
                torch.addmm(self.total, a, b, out=self.total)
            else:
                torch.mm(a, b, out=self.total)
        elif self.filled:
            torch.addmm(self.total, a, b, out_dtype=self.total.dtype, out=self.total)
        else:
            torch.mm(a, b, out_dtype=self.total.dtype, out=self.total)
        self.filled = True

    def add(self, gradient: Tensor, factor: Tensor | None = None) -> None:
        """Add ``gradient`` of the weight's shape, times the scalar tensor ``factor``."""
        if factor is None:
            if self.filled:
                self.total += gradient
            else:
                self.total.copy_(gradient)
        elif self.filled:
            torch.addcmul(self.total, gradient, factor, out=self.total)
        else:
            torch.mul(gradient, factor, out=self.total)
        self.filled = True

    def clear(self) -> None:
        """Begin anew with the next product."""
        self.filled = False
