"""SwiGLU's product on packed gate and up: every value is read once and written once, each way."""

import torch
import triton.language as tl
from torch import Tensor

from flashtrain.kernels.jit import kernel
from flashtrain.kernels.sizes import cdiv
from flashtrain.kernels.swiglu.reference import PACKING

_PAIRS, _WARPS = 32, 4  # pairs of blocks of a program: 16 values of the product a thread


@kernel
def forward_kernel(packed, y, pairs, PAIRS: tl.constexpr, PACKING: tl.constexpr):  # type: ignore[no-untyped-def]
    """``PAIRS`` blocks of y, each out of a block of gate and the block of up behind it."""
    pair = tl.program_id(0).to(tl.int64) * PAIRS + tl.arange(0, PAIRS)[:, None]
    inside = pair < pairs
    column = tl.arange(0, PACKING)[None, :]
    source = packed + pair * (2 * PACKING) + column
    gate = tl.load(source, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(source + PACKING, mask=inside, other=0.0).to(tl.float32)
    values = gate * tl.sigmoid(gate) * up
    tl.store(y + pair * PACKING + column, values.to(y.dtype.element_ty), mask=inside)


@kernel
def backward_kernel(dy, packed, d_packed, pairs, PAIRS: tl.constexpr, PACKING: tl.constexpr):  # type: ignore[no-untyped-def]
    """Both blocks of ``d_packed`` that each of ``PAIRS`` blocks of y came from."""
    pair = tl.program_id(0).to(tl.int64) * PAIRS + tl.arange(0, PAIRS)[:, None]
    inside = pair < pairs
    column = tl.arange(0, PACKING)[None, :]
    place = pair * (2 * PACKING) + column
    gate = tl.load(packed + place, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(packed + place + PACKING, mask=inside, other=0.0).to(tl.float32)
    slope = tl.load(dy + pair * PACKING + column, mask=inside, other=0.0).to(tl.float32)
    share = tl.sigmoid(gate)
    d_gate = slope * up * share * (1.0 + gate * (1.0 - share))
    d_up = slope * gate * share
    tl.store(d_packed + place, d_gate.to(d_packed.dtype.element_ty), mask=inside)
    tl.store(d_packed + place + PACKING, d_up.to(d_packed.dtype.element_ty), mask=inside)


def forward(packed: Tensor, pairs: int = _PAIRS, warps: int = _WARPS) -> Tensor:
    """See ``reference.swiglu``: ``packed [..., 2·width]`` -> ``[..., width]``."""
    y = packed.new_empty(*packed.shape[:-1], packed.shape[-1] // 2)
    blocks = y.numel() // PACKING
    forward_kernel[(cdiv(blocks, pairs),)](
        packed.contiguous(), y, blocks, PAIRS=pairs, PACKING=PACKING, num_warps=warps
    )
    return y


def backward(dy: Tensor, packed: Tensor, pairs: int = _PAIRS, warps: int = _WARPS) -> Tensor:
    """The gradient of ``packed [..., 2·width]``, given that of the product ``[..., width]``."""
    d_packed = torch.empty_like(packed, memory_format=torch.contiguous_format)
    blocks = dy.numel() // PACKING
    backward_kernel[(cdiv(blocks, pairs),)](
        dy.contiguous(), packed.contiguous(), d_packed, blocks, PAIRS=pairs, PACKING=PACKING, num_warps=warps
    )
    return d_packed
