"""Sum over slots in slot order, in fp32, rounded once: the addition of every reduce-scatter here."""

import torch
from torch import Tensor


def ordered_sum(slots: Tensor, scale: float = 1.0) -> Tensor:
    """Add ``slots`` ``[W, ...]`` in order 0..W-1 in fp32, multiply by ``scale``, round to their dtype.

    fp64 is added in fp64, integers in their own type. The order is the contract: floating-point sums
    depend on it, so a result that must not depend on timing may not depend on arrival.
    """
    wide = slots.dtype if slots.dtype == torch.float64 or not slots.is_floating_point() else torch.float32
    total = slots[0].to(wide, copy=True)
    for slot in slots[1:]:
        total += slot
    if scale != 1.0:
        total *= scale
    return total.to(slots.dtype)
