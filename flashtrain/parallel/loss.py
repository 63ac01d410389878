"""Cross-entropy over logits whose vocabulary dimension is sharded over a process group."""

from typing import Any

import torch
from torch import Tensor

from flashtrain.comm import collectives, groups

IGNORED = -100  # the default ignore_index of torch.nn.functional.cross_entropy


class _VocabularyParallelCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, group: str, site: str) -> Tensor:
        process_group = groups.resolve(group)
        rank, world = process_group.rank(), process_group.size()
        rows, width = logits.shape
        wide = logits.float()
        index = targets - rank * width
        elsewhere = (index < 0) | (index >= width)
        index = index.masked_fill(elsewhere, 0).unsqueeze(-1)
        # Columns that are masked with -inf may fill a whole shard: -inf minus -inf would be no number.
        largest = wide.amax(dim=-1).clamp_min(torch.finfo(wide.dtype).min)
        exponentials = (wide - largest.unsqueeze(-1)).exp_()
        total = exponentials.sum(dim=-1)
        target = wide.gather(-1, index).squeeze(-1).masked_fill(elsewhere, 0.0)

        # One exchange of three numbers a row; every rank then combines them in rank order.
        statistics = torch.stack([largest, total, target]).view(1, 3, rows)
        everyone = collectives.all_gather(statistics, group, site, world)
        top = everyone[:, 0].amax(dim=0)
        denominator = torch.zeros_like(top)
        for peer in range(world):
            denominator += everyone[peer, 1] * (everyone[peer, 0] - top).exp()
        loss = denominator.log() + top - everyone[:, 2].sum(dim=0)

        counted = targets != IGNORED
        count = counted.sum()
        loss = loss.masked_fill(~counted, 0.0).sum() / count

        probabilities = exponentials.mul_(((largest - top).exp() / denominator).unsqueeze(-1))
        # p - 1 of a confident row is lost if p is rounded to bf16 first, so it is kept apart in fp32.
        at_index = probabilities.gather(-1, index) - (~elsewhere).unsqueeze(-1).to(wide.dtype)
        ctx.save_for_backward(probabilities.to(logits.dtype), index, at_index, counted / count)
        return loss

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        probabilities, index, at_index, share = ctx.saved_tensors
        scale = (grads[0] * share).unsqueeze(-1)
        dlogits = probabilities.float() * scale
        dlogits.scatter_(-1, index, at_index * scale)
        return dlogits.to(probabilities.dtype), None, None, None


def vocabulary_parallel_cross_entropy(logits: Tensor, targets: Tensor, group: str, site: str = "") -> Tensor:
    """Mean cross-entropy in nats, fp32, the same bits on every rank.

    ``logits [..., V/W]`` hold the columns of this rank, ranks in order of vocabulary; ``targets [...]``
    are whole and the same on every rank. Targets of -100 do not count, as in PyTorch; without any that
    counts the loss is NaN. Raises TransportError if a peer fails.
    """
    flat = logits.reshape(-1, logits.shape[-1])
    loss: Tensor = _VocabularyParallelCrossEntropy.apply(flat, targets.reshape(-1), group, site)
    return loss
