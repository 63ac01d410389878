"""Cross-entropy from three numbers a row, in plain torch; the vocabulary may be split over ranks.

A rank's numbers of a row: the largest of its logits m, the sum of exp(logit - m), and the logit of the
target, or 0 where another rank has it. All ranks combine the numbers of all ranks in rank order.
"""

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, linear

IGNORED = -100  # the default ignore_index of torch.nn.functional.cross_entropy


def linear_cross_entropy(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy of ``x [..., H] · weight [V, H]ᵀ`` and ``targets [...]``, with whole logits."""
    logits = linear(x, weight).flatten(0, -2)
    return cross_entropy(logits.to(wide(logits.dtype)), targets.flatten())


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype that the loss of logits of ``dtype`` is computed in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def statistics(logits: Tensor, targets: Tensor, first: int) -> Tensor:
    """The three numbers ``[3, R]`` of ``logits [R, V/W]``, columns from ``first`` on of the vocabulary."""
    values = logits.to(wide(logits.dtype))
    # Columns that are masked with -inf may fill a whole shard: -inf minus -inf would be no number.
    largest = values.amax(dim=-1).clamp_min(torch.finfo(values.dtype).min)
    total = (values - largest.unsqueeze(-1)).exp_().sum(dim=-1)
    index, elsewhere = _own(targets, first, logits.shape[1])
    target = values.gather(-1, index).squeeze(-1).masked_fill(elsewhere, 0.0)
    return torch.stack([largest, total, target])


def losses(everyone: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of each row ``[R]``, 0 where its target is ignored; ``everyone [W, 3, R]``."""
    top, denominator = _combined(everyone)
    loss = denominator.log() + top - everyone[:, 2].sum(dim=0)
    return loss.masked_fill(targets == IGNORED, 0.0)


def slopes_(
    logits: Tensor, targets: Tensor, first: int, everyone: Tensor, rank: int, share: Tensor
) -> Tensor:
    """Turn ``logits [R, V/W]`` into their gradients in place; gives the rows' losses ``[R]``.

    A row's gradient is (p - 1 at the target) · ``share``, a scalar tensor; rows to be ignored get 0.
    """
    top, denominator = _combined(everyone)
    largest = everyone[rank, 0]
    values = (logits.to(wide(logits.dtype)) - largest.unsqueeze(-1)).exp_()
    values.mul_(((largest - top).exp() / denominator).unsqueeze(-1))
    # p - 1 of a confident row would be lost if p were rounded to bf16 first.
    index, elsewhere = _own(targets, first, logits.shape[1])
    at_index = values.gather(-1, index) - (~elsewhere).unsqueeze(-1).to(values.dtype)
    values.scatter_(-1, index, at_index).mul_(share)
    logits.copy_(values.masked_fill_((targets == IGNORED).unsqueeze(-1), 0.0))
    return losses(everyone, targets)


def _own(targets: Tensor, first: int, width: int) -> tuple[Tensor, Tensor]:
    """The own column of each target ``[R, 1]``, and which rows have theirs elsewhere ``[R]``."""
    index = targets - first
    elsewhere = (index < 0) | (index >= width)
    return index.masked_fill(elsewhere, 0).unsqueeze(-1), elsewhere


def _combined(everyone: Tensor) -> tuple[Tensor, Tensor]:
    """The largest logit of each whole row, and its sum of exponentials below it."""
    top = everyone[:, 0].amax(dim=0)
    denominator = torch.zeros_like(top)
    for numbers in everyone:
        denominator += numbers[1] * (numbers[0] - top).exp()
    return top, denominator
