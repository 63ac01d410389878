"""Heads copied to where several pairs of heads use them, and the gradients of the copies summed."""

from typing import Any

import torch
from torch import Tensor

from flashtrain.kernels.layout import in_words


def copied(x: Tensor, wanted: tuple[int, ...]) -> Tensor:
    """Heads ``wanted`` of ``x [B, n, S, D]``: ``[B, len(wanted), S, D]``, or x itself if it is those.

    Copies lie with the sequence first in memory, so that attention gives its output in that order, and the
    projection behind it takes it without another copy. Differentiable: gradients of the copies of a head are
    added in fp32 (fp64 for fp64) in one order, on any device, and rounded once.
    """
    if wanted == tuple(range(x.shape[1])):
        return x
    out: Tensor = _Copies.apply(x, wanted)
    return out


def summed(gradients: Tensor, wanted: tuple[int, ...], count: int) -> Tensor:
    """Gradients ``[B, len(wanted), S, D]`` of the copies -> ``[B, count, S, D]``, those of the heads."""
    if wanted == tuple(range(count)):
        return gradients
    tokens, times = gradients.permute(2, 0, 1, 3), len(wanted) // count
    if wanted == _in_turn(count, times):
        total = tokens.unflatten(2, (times, count)).sum(2)
    elif wanted == _each(count, times):
        total = tokens.unflatten(2, (count, times)).sum(3)
    else:
        copies = [[tokens[:, :, p] for p, own in enumerate(wanted) if own == head] for head in range(count)]
        total = torch.stack([torch.stack(of_a_head).sum(0) for of_a_head in copies], dim=2)
    return total.permute(1, 2, 0, 3)


class _Copies(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, wanted: tuple[int, ...]) -> Tensor:
        ctx.wanted, ctx.count = wanted, x.shape[1]
        words = in_words(x).permute(2, 0, 1, 3)
        sequence, batch, count, width = words.shape
        times = len(wanted) // count
        if wanted == _in_turn(count, times):
            words = words.unsqueeze(2).expand(-1, -1, times, -1, -1)
        elif wanted == _each(count, times):
            words = words.unsqueeze(3).expand(-1, -1, -1, times, -1)
        else:
            each = words.unbind(2)
            words = torch.stack([each[head] for head in wanted], dim=2)
        return words.reshape(sequence, batch, len(wanted), width).view(x.dtype).permute(1, 2, 0, 3)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return summed(grads[0], ctx.wanted, ctx.count), None


def _in_turn(count: int, times: int) -> tuple[int, ...]:
    """All heads, and all again."""
    return tuple(range(count)) * times


def _each(count: int, times: int) -> tuple[int, ...]:
    """Each head ``times`` times, then the next."""
    return tuple(p // times for p in range(count * times))
