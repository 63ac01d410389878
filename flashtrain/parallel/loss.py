"""Cross-entropy over logits whose vocabulary dimension is sharded over a process group."""

from typing import Any

import torch
from torch import Tensor

from flashtrain.comm import groups, ops


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
        largest = wide.amax(dim=-1)
        exponentials = (wide - largest.unsqueeze(-1)).exp_()
        total = exponentials.sum(dim=-1)
        target = wide.gather(-1, index).squeeze(-1).masked_fill(elsewhere, 0.0)

        # One exchange of three numbers a row; every rank then combines them in rank order.
        statistics = torch.stack([largest, total, target]).view(1, 3, rows)
        everyone = ops.all_gather(statistics, group, site, world)
        top = everyone[:, 0].amax(dim=0)
        denominator = torch.zeros_like(top)
        for peer in range(world):
            denominator += everyone[peer, 1] * (everyone[peer, 0] - top).exp()
        loss = denominator.log() + top - everyone[:, 2].sum(dim=0)

        probabilities = exponentials.mul_(((largest - top).exp() / denominator).unsqueeze(-1))
        ctx.save_for_backward(probabilities.to(logits.dtype), index, elsewhere)
        return loss.mean()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        probabilities, index, elsewhere = ctx.saved_tensors
        scale = grads[0] / probabilities.shape[0]
        dlogits = probabilities.float() * scale
        hit = torch.where(elsewhere, 0.0, scale).unsqueeze(-1).to(dlogits.dtype)
        dlogits.scatter_add_(-1, index, -hit)
        return dlogits.to(probabilities.dtype), None, None, None


def vocabulary_parallel_cross_entropy(logits: Tensor, targets: Tensor, group: str, site: str = "") -> Tensor:
    """Mean cross-entropy in nats, fp32, the same bits on every rank.

    ``logits [..., V/W]`` hold the columns of this rank, ranks in order of vocabulary; ``targets [...]``
    are whole and the same on every rank. Raises TransportError if a peer fails.
    """
    flat = logits.reshape(-1, logits.shape[-1])
    loss: Tensor = _VocabularyParallelCrossEntropy.apply(flat, targets.reshape(-1), group, site)
    return loss
