"""Operands of Triton kernels as TMA descriptors."""

from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor


def heads_descriptor(x: Tensor, rows: int, columns: int) -> TensorDescriptor:
    """``x [B, n, tokens, D]``, read ``rows`` of one head and ``columns`` of their values at a time.

    What lies beyond either is zero. Copied only where TMA takes no such strides or address.
    """
    if any(s * x.itemsize % 16 or not s for s in x.stride()[:3]) or x.stride(3) != 1 or x.data_ptr() % 16:
        x = x.contiguous()
    # What TMA does not take, a dimension of one element may have.
    strides = [s if n > 1 else x.shape[3] for s, n in zip(x.stride()[:3], x.shape[:3], strict=True)]
    return TensorDescriptor(x, list(x.shape), [*strides, 1], [1, 1, rows, columns])
