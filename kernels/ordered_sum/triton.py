"""Sum over slots in slot order in one pass: every slot is read once, the sum is written once."""

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 4096


@triton.jit
def _sum_slots(slots, total, elements, scale, SLOTS: tl.constexpr, SCALED: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    # Offsets in 64 bits: W slots of a large chunk pass 2^31 elements.
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = offsets < elements
    sum = tl.load(slots + offsets, mask=inside, other=0.0).to(tl.float32)
    for slot in tl.static_range(1, SLOTS):
        sum += tl.load(slots + slot * elements + offsets, mask=inside, other=0.0).to(tl.float32)
    if SCALED:
        sum *= scale
    tl.store(total + offsets, sum.to(total.dtype.element_ty), mask=inside)


def ordered_sum(slots: Tensor, scale: float = 1.0) -> Tensor:
    """Add contiguous ``slots`` ``[W, ...]`` (bf16, fp16, fp32) in order 0..W-1 in fp32, scale, round once.

    Equal to ``reference.ordered_sum`` to the bit. ``scale`` is rounded to fp32.
    """
    total = torch.empty_like(slots[0])
    elements = total.numel()
    if elements:
        # A specialised value of `elements` would compile a kernel for every ragged length.
        _sum_slots[(triton.cdiv(elements, _BLOCK),)](
            slots,
            total,
            elements,
            scale,
            SLOTS=slots.shape[0],
            SCALED=scale != 1.0,
            BLOCK=_BLOCK,
            num_warps=8,
        )
    return total
