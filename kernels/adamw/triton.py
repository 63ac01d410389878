"""AdamW over all tensors of a rank in one launch, and the norm of all gradients in another.

A table on the device says where each tensor lies; a program looks up which block of which tensor is its own.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from flashtrain.kernels.jit import kernel

BLOCK = 4096
# Elements of a block that are updated at once, four a thread: more take registers, and with them other blocks
# from the processor, whose loads would hide behind this block's stores.
_PART = 1024
DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@triton.jit
def pointer(address, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):  # type: ignore[no-untyped-def]
    """What a table holds at ``address``, as a pointer."""
    found = tl.load(address).to(tl.pointer_type(DTYPE))
    if ALIGNED:
        found = tl.multiple_of(found, 16)
    return found


@triton.jit
def inside_of(offset, size, WHOLE: tl.constexpr):  # type: ignore[no-untyped-def]
    """Which elements exist; a whole block's all do, and its accesses are wide for knowing it."""
    if WHOLE:
        return tl.full(offset.shape, True, tl.int1)
    return offset < size


@triton.jit
def square_of(  # type: ignore[no-untyped-def]
    address,
    begin,
    size,
    GRADIENT: tl.constexpr,
    ALIGNED: tl.constexpr,
    WHOLE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    offset = begin + tl.arange(0, BLOCK)
    inside = inside_of(offset, size, WHOLE)
    values = tl.load(pointer(address, GRADIENT, ALIGNED) + offset, mask=inside, other=0.0).to(tl.float64)
    return tl.sum(values * values, axis=0)


@kernel
def squares_kernel(  # type: ignore[no-untyped-def]
    blocks,
    gradients,
    sizes,
    partial,
    GRADIENT: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The squared norm of one block, in fp64: what fp32 cannot hold must not look like a norm."""
    place = tl.program_id(0)
    tensor = tl.load(blocks + 2 * place)
    begin = tl.load(blocks + 2 * place + 1).to(tl.int64) * BLOCK
    size = tl.load(sizes + tensor)
    total = tl.full((), 0.0, tl.float64)
    if tl.load(gradients + tensor) != 0:
        if begin + BLOCK <= size:
            total = square_of(gradients + tensor, begin, size, GRADIENT, ALIGNED, True, BLOCK)
        else:
            total = square_of(gradients + tensor, begin, size, GRADIENT, ALIGNED, False, BLOCK)
    tl.store(partial + place, total)


@triton.jit
def update_block(  # type: ignore[no-untyped-def]
    row,
    address,
    begin,
    size,
    factor,
    step_size,
    by_correction,
    keep,
    one_less_beta1,
    beta2,
    one_less_beta2,
    epsilon,
    DTYPE: tl.constexpr,
    GRADIENT: tl.constexpr,
    WRITES: tl.constexpr,
    ALIGNED: tl.constexpr,
    WHOLE: tl.constexpr,
    BLOCK: tl.constexpr,
    PART: tl.constexpr,
):
    # What the table says is read once: for all that a compiler knows, the stores below could change it.
    masters = pointer(row, tl.float32, ALIGNED)
    means = pointer(row + 1, tl.float32, ALIGNED)
    variances = pointer(row + 2, tl.float32, ALIGNED)
    weights = pointer(row + 3, DTYPE, ALIGNED)
    gradients = pointer(address, GRADIENT, ALIGNED)
    decay = tl.where(tl.load(row + 4) != 0, keep, 1.0)
    for part in range(0, BLOCK, PART):
        offset = begin + part + tl.arange(0, PART)
        inside = inside_of(offset, size, WHOLE)
        gradient = tl.load(gradients + offset, mask=inside, other=0.0).to(tl.float32)
        master = tl.load(masters + offset, mask=inside, other=0.0)
        mean = tl.load(means + offset, mask=inside, other=0.0)
        variance = tl.load(variances + offset, mask=inside, other=0.0)
        gradient *= factor
        master *= decay
        mean += one_less_beta1 * (gradient - mean)
        variance = beta2 * variance + one_less_beta2 * gradient * gradient
        # Within some units in the last place of a step, which is a small part of the master: the exactly
        # rounded root and quotients take as long as the memory does.
        master -= step_size * mean / (tl.sqrt(variance) * by_correction + epsilon)
        tl.store(masters + offset, master, mask=inside)
        tl.store(means + offset, mean, mask=inside)
        tl.store(variances + offset, variance, mask=inside)
        if WRITES:
            tl.store(weights + offset, master.to(DTYPE), mask=inside)


@kernel
def update_kernel(  # type: ignore[no-untyped-def]
    blocks,
    tensors,
    gradients,
    sizes,
    factor,
    accepted,
    step_size,
    by_correction,
    keep,
    one_less_beta1,
    beta2,
    one_less_beta2,
    epsilon,
    DTYPE: tl.constexpr,
    GRADIENT: tl.constexpr,
    WRITES: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
    PART: tl.constexpr,
):
    """One block of one tensor, if the step is accepted and the tensor has a gradient."""
    place = tl.program_id(0)
    tensor = tl.load(blocks + 2 * place)
    if (tl.load(accepted) != 0) & (tl.load(gradients + tensor) != 0):
        begin = tl.load(blocks + 2 * place + 1).to(tl.int64) * BLOCK
        size = tl.load(sizes + tensor)
        row = tensors + 5 * tensor
        address = gradients + tensor
        by = tl.load(factor)
        if begin + BLOCK <= size:
            update_block(
                row,
                address,
                begin,
                size,
                by,
                step_size,
                by_correction,
                keep,
                one_less_beta1,
                beta2,
                one_less_beta2,
                epsilon,
                DTYPE,
                GRADIENT,
                WRITES,
                ALIGNED,
                True,
                BLOCK,
                PART,
            )
        else:
            update_block(
                row,
                address,
                begin,
                size,
                by,
                step_size,
                by_correction,
                keep,
                one_less_beta1,
                beta2,
                one_less_beta2,
                epsilon,
                DTYPE,
                GRADIENT,
                WRITES,
                ALIGNED,
                False,
                BLOCK,
                PART,
            )


def squares(
    blocks: Tensor, gradients: Tensor, sizes: Tensor, partial: Tensor, dtype: torch.dtype, aligned: bool
) -> None:
    """Squared norms of the blocks of gradients of ``dtype`` into ``partial [blocks]``, in fp64."""
    if blocks.shape[0]:
        squares_kernel[(blocks.shape[0],)](
            blocks,
            gradients,
            sizes,
            partial,
            GRADIENT=DTYPES[dtype],
            ALIGNED=aligned,
            BLOCK=BLOCK,
            num_warps=8,
        )


def update(
    blocks: Tensor,
    tensors: Tensor,
    gradients: Tensor,
    sizes: Tensor,
    factor: Tensor,
    accepted: Tensor,
    scalars: tuple[float, ...],
    dtype: torch.dtype,
    gradient: torch.dtype,
    aligned: bool,
) -> None:
    """Update the tensors of ``blocks [n, 2]`` (tensor, block of it), whose weights have ``dtype``.

    ``tensors [T, 5]`` has the addresses of master, mean, variance and weight, and whether the tensor decays;
    ``gradients [T]`` the addresses of gradients of dtype ``gradient``, 0 where there is none; ``sizes [T]``
    elements.
    """
    if blocks.shape[0]:
        update_kernel[(blocks.shape[0],)](
            blocks,
            tensors,
            gradients,
            sizes,
            factor,
            accepted,
            *scalars,
            DTYPE=DTYPES[dtype],
            GRADIENT=DTYPES[gradient],
            WRITES=dtype != torch.float32,
            ALIGNED=aligned,
            BLOCK=BLOCK,
            PART=_PART,
            num_warps=8,
        )
