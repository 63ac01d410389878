"""SwiGLU's product on a packed projection: Triton kernels on a GPU, plain torch on a CPU."""

from typing import Any

import torch
from torch import Tensor

from flashtrain.errors import UserError
from flashtrain.kernels.operator import operator
from flashtrain.kernels.swiglu import reference
from flashtrain.kernels.swiglu.reference import PACKING


def swiglu(packed: Tensor) -> Tensor:
    """``silu(gate) · up``, computed in fp32 and rounded once.

    ``packed [..., 2·width]``, in which blocks of 64 columns of gate and of up take turns -> ``[..., width]``.
    Only ``packed`` is kept for the backward pass. float64 is left to torch, in float64. Raises UserError for
    a width that holds no whole pairs of blocks.
    """
    if not packed.dim() or packed.shape[-1] % (2 * PACKING):
        raise UserError(
            f"packed gate and up {list(packed.shape)} must be a multiple of {2 * PACKING} wide: "
            f"blocks of {PACKING} take turns"
        )
    if not packed.is_cuda or packed.dtype == torch.float64:
        return reference.swiglu(packed)
    y: Tensor = swiglu_kernels(packed)
    return y


@operator("flashtrain::swiglu")
def swiglu_kernels(packed: Tensor) -> Tensor:
    """``swiglu`` by the Triton kernel: ``[..., 2·width]`` -> ``[..., width]``."""
    from flashtrain.kernels.swiglu import triton

    return triton.forward(packed)


@swiglu_kernels.register_fake
def _(packed: Tensor) -> Tensor:
    return packed.new_empty(*packed.shape[:-1], packed.shape[-1] // 2)


@operator("flashtrain::swiglu_backward")
def swiglu_backward_kernels(dy: Tensor, packed: Tensor) -> Tensor:
    """Gradient of ``packed [..., 2·width]``, in its packing, given that of the product ``[..., width]``."""
    from flashtrain.kernels.swiglu import triton

    return triton.backward(dy, packed)


@swiglu_backward_kernels.register_fake
def _(dy: Tensor, packed: Tensor) -> Tensor:
    return torch.empty_like(packed, memory_format=torch.contiguous_format)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs)


def _backward(context: Any, dy: Tensor) -> Tensor:
    gradient: Tensor = swiglu_backward_kernels(dy, *context.saved_tensors)
    return gradient


swiglu_kernels.register_autograd(_backward, setup_context=_setup)
