"""Training losses as modules, so that parallelism can replace them from outside."""

from torch import Tensor, nn
from torch.nn.functional import cross_entropy


class CrossEntropy(nn.Module):
    """Mean cross-entropy in nats: ``logits [..., V]``, ``targets [...]`` -> scalar, computed in fp32."""

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        return cross_entropy(logits.flatten(0, -2).float(), targets.flatten())
