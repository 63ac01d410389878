"""AdamW on lists of tensors by torch's own fused step, and the norm of their gradients."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from flashtrain.kernels.adamw.slot import Hyperparameters, Slot


def squares(slots: Sequence[Slot], gradients: Sequence[Tensor | None], divided: int) -> Tensor:
    """Squared norms ``[2]`` in fp64: of the first ``divided`` gradients together, and of the others."""
    total = torch.zeros(2, dtype=torch.float64, device=slots[0].master.device)
    for index, gradient in enumerate(gradients):
        if gradient is not None:
            # In fp64, so that it makes no difference into which parameters a matrix is cut.
            square = torch.linalg.vector_norm(gradient, dtype=torch.float64) ** 2
            total[0 if index < divided else 1] += square
    return total


def update(
    slots: Sequence[Slot],
    gradients: Sequence[Tensor | None],
    factor: Tensor,
    accepted: Tensor,
    values: Hyperparameters,
) -> None:
    """One step of every slot that has a gradient, if ``accepted``; gradients are multiplied by ``factor``."""
    if not accepted:
        return
    found = [
        (slot, gradient.float())
        for slot, gradient in zip(slots, gradients, strict=True)
        if gradient is not None
    ]
    if float(factor) != 1.0:
        torch._foreach_mul_([gradient for _, gradient in found], float(factor))
    for decays in (True, False):
        chosen = [(slot, gradient) for slot, gradient in found if slot.decays == decays]
        device = slots[0].master.device
        adamw(
            [slot.master for slot, _ in chosen],
            [gradient for _, gradient in chosen],
            [slot.mean for slot, _ in chosen],
            [slot.variance for slot, _ in chosen],
            [],
            [torch.tensor(float(values.update - 1), device=device) for _ in chosen],
            fused=True,
            amsgrad=False,
            beta1=values.beta1,
            beta2=values.beta2,
            lr=values.rate,
            weight_decay=values.decay if decays else 0.0,
            eps=values.epsilon,
            maximize=False,
        )
    for slot, _ in found:
        if slot.weight is not slot.master:
            slot.weight.copy_(slot.master)
