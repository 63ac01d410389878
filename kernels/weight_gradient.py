"""Weight gradients as sums of products, in fp32, where the optimizer reads them."""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

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

    def add_rows(self, write: Callable[[Tensor, bool], object]) -> None:
        """Let ``write(total, add)`` add to some rows, or else store them where the others are to be zeros."""
        if not self.filled:
            self.total.zero_()
        write(self.total, self.filled)
        self.filled = True

    def clear(self) -> None:
        """Begin anew with the next product."""
        self.filled = False


def add_each(gradients: Mapping[WeightGradient, Tensor]) -> None:
    """``main.add(gradient)`` of each, in as few launches as there can be: there are many small ones."""
    for filled, write in ((True, torch._foreach_add_), (False, torch._foreach_copy_)):
        chosen = [(main.total, gradient) for main, gradient in gradients.items() if main.filled == filled]
        if chosen:
            totals, added = zip(*chosen, strict=True)
            write(totals, added)
    for main in gradients:
        main.filled = True


class Packing(NamedTuple):
    """How one weight is made of several: ``join(*parts)``, and ``cut(whole)`` into parts again."""

    join: Callable[..., Tensor]
    cut: Callable[[Tensor], Sequence[Tensor]]

    def gradient(self, *weights: Tensor) -> "PackedGradient | None":
        """That of the whole, if all of ``weights`` have a ``main_grad``."""
        parts = [getattr(weight, "main_grad", None) for weight in weights]
        return None if None in parts else PackedGradient(parts, self)  # type: ignore[arg-type]


class PackedGradient(WeightGradient):
    """The gradient of a weight that is made of others for one product: it goes on in each one's own."""

    def __init__(self, parts: Sequence[WeightGradient], packing: Packing) -> None:
        self.parts, self.packing = parts, packing

    def add_product(self, a: Tensor, b: Tensor) -> None:
        """See ``WeightGradient.add_product``: the bits are those of a gradient that was never cut."""
        totals = [part.total for part in self.parts]
        self.filled = all(part.filled for part in self.parts)
        if self.filled:
            self.total = self.packing.join(*totals)
        else:
            assert not any(part.filled for part in self.parts), "parts that have taken part in other products"
            self.total = totals[0].new_empty(a.shape[0], b.shape[1])
        super().add_product(a, b)
        for part, rows in zip(self.parts, self.packing.cut(self.total), strict=True):
            part.total.copy_(rows)
            part.filled = True
        del self.total
