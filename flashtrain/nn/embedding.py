"""The table of a model's tokens."""

from torch import Tensor, nn

from flashtrain.kernels.embedding.op import embedding


class Embedding(nn.Embedding):
    """``tokens [...]`` -> their rows ``[..., width]`` of a table ``[vocabulary, width]``.

    Weight, state and values are those of ``nn.Embedding``; on a GPU the gradient has one order of additions
    and goes to ``weight.main_grad``, a ``WeightGradient``, if there is one.
    """

    def __init__(self, vocabulary: int, width: int) -> None:
        super().__init__(vocabulary, width)

    def reset_parameters(self) -> None:
        """Draw the table; not on the meta device, where torch would import its compiler to draw nothing."""
        if not self.weight.is_meta:
            super().reset_parameters()

    def forward(self, tokens: Tensor) -> Tensor:
        return embedding(tokens, self.weight, main=getattr(self.weight, "main_grad", None))
