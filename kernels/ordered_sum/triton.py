"""Sum over slots in slot order in one pass: every slot is read once, the sum is written once."""

import struct
from functools import lru_cache
from importlib.util import find_spec
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from flashtrain.kernels.launch import INTERPRETED, Argument, Pointer, launch
from flashtrain.kernels.ordered_sum.reference import Own

_BLOCK, _WARPS = 4096, 8
_WIDE = 16  # bytes of a load where addresses allow it, and elements of a unit: a multiple of so many bytes
# Without the C++ extension, and in the interpreter, Triton launches: tens of microseconds, the same bits.
_PREPARED = not INTERPRETED and find_spec("flashtrain._core") is not None


@triton.jit(do_not_specialize=["high", "low", "scale"])
def _sum_slots(  # type: ignore[no-untyped-def]
    slots,
    own,
    total,
    high,
    low,
    scale,
    SLOTS: tl.constexpr,
    OWN: tl.constexpr,
    SCALED: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """``total`` has (2^24 high + low) UNIT elements; ``scale`` holds the bits of an fp32 number."""
    # In 64 bits: W slots of a large chunk pass 2^31 elements. The compiler sees what UNIT divides.
    elements = (high.to(tl.int64) * 16777216 + low) * UNIT
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = offsets < elements
    if OWN == 0:
        sum = tl.load(own + offsets, mask=inside, other=0.0).to(tl.float32)
    else:
        sum = tl.load(slots + offsets, mask=inside, other=0.0).to(tl.float32)
    for slot in tl.static_range(1, SLOTS):
        if slot == OWN:
            sum += tl.load(own + offsets, mask=inside, other=0.0).to(tl.float32)
        else:
            sum += tl.load(slots + slot * elements + offsets, mask=inside, other=0.0).to(tl.float32)
    if SCALED:
        sum *= scale.to(tl.float32, bitcast=True)
    tl.store(total + offsets, sum.to(total.dtype.element_ty), mask=inside)


@lru_cache(maxsize=256)
def _launch(dtype: torch.dtype, constants: tuple[tuple[str, Any], ...], device: torch.device) -> Any:
    """The kernel ready to be started, for sums of any length."""
    pointer = Pointer(dtype, aligned=dict(constants)["UNIT"] > 1)
    arguments: dict[str, Argument] = dict.fromkeys(("slots", "own", "total"), pointer)
    arguments |= dict.fromkeys(("high", "low", "scale"))
    return launch(_sum_slots, arguments, dict(constants), warps=_WARPS, stages=1, device=device)[0]


def ordered_sum(
    slots: Tensor, scale: float = 1.0, own: Own | None = None, out: Tensor | None = None
) -> Tensor:
    """Add contiguous ``slots`` ``[W, ...]`` (bf16, fp16, fp32) in order 0..W-1 in fp32, scale, round once.

    Equal to ``reference.ordered_sum`` to the bit; all tensors are contiguous, ``scale`` is rounded to fp32.
    """
    total = slots.new_empty(slots.shape[1:]) if out is None else out
    elements = total.numel()
    if not elements:
        return total
    place, term = own or (-1, slots)
    addresses = slots.data_ptr(), term.data_ptr(), total.data_ptr()
    unit = 1 if elements % _WIDE or any(address % _WIDE for address in addresses) else _WIDE
    high, low = divmod(elements // unit, 1 << 24)
    bits = struct.unpack("i", struct.pack("f", scale))[0]
    blocks = -(-elements // _BLOCK)
    constants = (
        ("SLOTS", slots.shape[0]), ("OWN", place), ("SCALED", scale != 1.0), ("UNIT", unit),
        ("BLOCK", _BLOCK),
    )  # fmt: skip
    if _PREPARED:
        device = slots.device
        stream = torch._C._cuda_getCurrentRawStream(device.index)
        values = [*addresses, high, low, bits & 0xFFFFFFFF]
        _launch(slots.dtype, constants, device).start(blocks, stream, values)
    else:
        _sum_slots[(blocks,)](slots, term, total, high, low, bits, **dict(constants), num_warps=_WARPS)
    return total
