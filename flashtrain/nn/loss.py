"""Output projection and loss as one module, so that parallelism can replace both from outside."""

from torch import Tensor, nn

from flashtrain.kernels.cross_entropy.op import linear_cross_entropy


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
