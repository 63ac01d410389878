"""The ordered sum for the device at hand: one kernel on a GPU, plain torch elsewhere; equal bits."""

import logging
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from flashtrain.kernels.ordered_sum import reference
from flashtrain.kernels.ordered_sum.reference import Own

log = logging.getLogger("flashtrain.kernels")


def ordered_sum(
    slots: Tensor, scale: float = 1.0, own: Own | None = None, out: Tensor | None = None
) -> Tensor:
    """See ``reference.ordered_sum``; all tensors are contiguous."""
    if slots.is_cuda and slots.dtype in (torch.bfloat16, torch.float16, torch.float32):
        return _on_gpu()(slots, scale, own, out)
    return reference.ordered_sum(slots, scale, own, out)


@cache
def _on_gpu() -> Callable[[Tensor, float, Own | None, Tensor | None], Tensor]:
    try:
        from flashtrain.kernels.ordered_sum import triton
    except ImportError as error:
        log.warning("ordered sums run slot by slot in torch, which is slower: Triton is missing (%s)", error)
        return reference.ordered_sum
    return triton.ordered_sum
