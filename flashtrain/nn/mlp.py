"""SwiGLU feed-forward layer on one packed gate-and-up projection."""

from torch import Tensor, nn

from flashtrain.kernels.swiglu.op import PACKING, swiglu

__all__ = ["PACKING", "SwiGLU"]


class SwiGLU(nn.Module):
    """``down(silu(gate(x)) · up(x))`` (arXiv 2002.05202).

    ``gate_up`` is one weight ``[2 · width, hidden]`` in which blocks of 64 gate rows and 64 up rows take
    turns, so that a contiguous cut between pairs of blocks holds matching rows of both.
    """

    def __init__(self, hidden: int, width: int) -> None:
        super().__init__()
        self.gate_up = nn.Linear(hidden, 2 * width, bias=False)
        self.down = nn.Linear(width, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """``x [..., hidden]`` -> ``[..., hidden]``."""
        return self.down(swiglu(self.gate_up(x)))
