"""What every mixer that carries a state promises of a sequence in pieces."""

import torch
from torch import Tensor

from flashtrain.nn.mamba1 import Mamba1
from flashtrain.nn.ssm import Mamba2


def assert_two_pieces_equal_one(layer: Mamba1 | Mamba2, x: Tensor, cut: int) -> None:
    """``x [S, B, H]`` in one piece and in two, the second from the first one's state; with every gradient."""
    leaves = [x.requires_grad_(), *layer.parameters()]
    whole, after = layer.extend(x, None)
    first, state = layer.extend(x[:cut], None)
    second, state = layer.extend(x[cut:], state)
    slopes = [torch.randn_like(t) for t in (whole, *after)]
    found = torch.autograd.grad((torch.cat([first, second]), *state), leaves, slopes)
    torch.testing.assert_close(torch.cat([first, second]), whole)
    for one, other in zip(found, torch.autograd.grad((whole, *after), leaves, slopes), strict=True):
        torch.testing.assert_close(one, other)
