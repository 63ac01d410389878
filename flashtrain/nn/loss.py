"""Training losses as modules, so that parallelism can replace them from outside."""

from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from flashtrain.kernels.cross_entropy.op import linear_cross_entropy


class CrossEntropy(nn.Module):
    """Mean cross-entropy in nats: ``logits [..., V]``, ``targets [...]`` -> scalar, computed in fp32."""

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        return cross_entropy(logits.flatten(0, -2).float(), targets.flatten())


class Head(nn.Linear):
    """Output projection of a language model, and the loss of its logits.

    ``x [..., H]`` -> logits ``[..., V]``, or with ``targets [...]`` their mean cross-entropy in nats, in
    fp32; on a GPU without whole logits, forward or backward.
    """

    def __init__(self, hidden: int, vocabulary: int) -> None:
        super().__init__(hidden, vocabulary, bias=False)

    def forward(self, x: Tensor, targets: Tensor | None = None) -> Tensor:
        if targets is None:
            return super().forward(x)
        return linear_cross_entropy(x, self.weight, targets, getattr(self.weight, "main_grad", None))
