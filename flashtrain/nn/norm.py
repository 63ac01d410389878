"""RMSNorm, which adds the residual stream in the same pass where it is told to."""

from typing import overload

from torch import Tensor, nn

from flashtrain.kernels.rms_norm.op import add_rms_norm, rms_norm


class RMSNorm(nn.RMSNorm):
    """``x / sqrt(mean(x²) + eps) · weight`` over the last dimension ``width`` (arXiv 1910.07467).

    Weight, state and values are those of ``nn.RMSNorm``; on a GPU its own kernels run.
    """

    eps: float
    weight: nn.Parameter

    def __init__(self, width: int, eps: float) -> None:
        super().__init__(width, eps=eps)

    @overload
    def forward(self, x: Tensor) -> Tensor: ...

    @overload
    def forward(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]: ...

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """``x [..., width]`` -> the same; with a residual like x, ``(norm(x + residual), x + residual)``."""
        if residual is None:
            return rms_norm(x, self.weight, self.eps)
        return add_rms_norm(x, residual, self.weight, self.eps)
