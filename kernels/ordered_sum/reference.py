"""Sum over slots in slot order, in fp32, rounded once: the addition of every reduce-scatter here."""

import torch
from torch import Tensor

# The number of a slot, and the tensor ``[...]`` that stands for it.
Own = tuple[int, Tensor]


def ordered_sum(
    slots: Tensor, scale: float = 1.0, own: Own | None = None, out: Tensor | None = None
) -> Tensor:
    """Add ``slots`` ``[W, ...]`` in order 0..W-1 in fp32, multiply by ``scale``, round to their dtype.

    fp64 is added in fp64, integers in their own type. The order is the contract: floating-point sums
    depend on it, so a result that must not depend on timing may not depend on arrival. What ``own`` names is
    read instead of its slot. The sum goes to ``out`` ``[...]``, of the same dtype, or to a tensor of its own.
    """
    terms = list(slots)
    if own is not None:
        terms[own[0]] = own[1]
    wide = slots.dtype if slots.dtype == torch.float64 or not slots.is_floating_point() else torch.float32
    total = terms[0].to(wide, copy=True)
    for term in terms[1:]:
        total += term
    if scale != 1.0:
        total *= scale
    return total.to(slots.dtype) if out is None else out.copy_(total)
