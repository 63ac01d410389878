"""Output projection and cross-entropy as one differentiable function of one device."""

import torch
from torch import Tensor

from flashtrain.errors import UserError
from flashtrain.kernels.cross_entropy import chunks, reference
from flashtrain.kernels.weight_gradient import WeightGradient


def linear_cross_entropy(
    x: Tensor, weight: Tensor, targets: Tensor, main: WeightGradient | None = None
) -> Tensor:
    """Mean cross-entropy in nats of the logits ``x [..., H] · weight [V, H]ᵀ``, in fp32 (fp64 for fp64).

    ``targets [...]``; those of -100 do not count, as in PyTorch; without any that counts the loss is NaN. On
    a GPU, or with ``main``, which then gets the weight's gradient, whole logits never exist. Raises UserError
    for shapes that do not fit together.
    """
    if x.shape[:-1] != targets.shape or x.shape[-1:] != weight.shape[1:]:
        raise UserError(
            f"x {list(x.shape)}, weight {list(weight.shape)} and targets {list(targets.shape)} do not fit: "
            "x is [..., H], the weight [V, H], targets [...]"
        )
    # A compiler fuses what it can see, and would see nothing of the chunks; nor would tensors without values.
    traced = torch.compiler.is_compiling() or type(x) is not Tensor
    if traced or (not x.is_cuda and main is None):
        return reference.linear_cross_entropy(x, weight, targets)
    return in_chunks(x, weight, targets, main)


def in_chunks(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    main: WeightGradient | None = None,
    chunk_bytes: int = chunks.CHUNK_BYTES,
) -> Tensor:
    """``linear_cross_entropy`` in chunks of rows whose logits have at most ``chunk_bytes``, on any device."""
    flat, targets = x.reshape(-1, x.shape[-1]), targets.reshape(-1)
    projection = chunks.Local(flat.detach(), weight.detach(), targets)
    return chunks.loss_of(projection, flat, weight, targets, flat.shape[0], main, chunk_bytes)
