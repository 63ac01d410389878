"""RMSNorm of models: torch's own to the bit on a CPU, and the residual addition in it."""

import pytest
import torch
from torch import Tensor, nn

from flashtrain.errors import UserError
from flashtrain.nn.norm import RMSNorm

WIDTH, EPSILON = 24, 1e-4


def pair(dtype: torch.dtype) -> tuple[RMSNorm, nn.RMSNorm, list[Tensor]]:
    """Ours and torch's with the same random weight; a branch, a residual, two slopes ``[5, 2, width]``."""
    torch.manual_seed(0)
    ours, theirs = RMSNorm(WIDTH, EPSILON), nn.RMSNorm(WIDTH, eps=EPSILON)
    nn.init.normal_(theirs.weight)
    ours.load_state_dict(theirs.state_dict())
    return ours.to(dtype), theirs.to(dtype), [torch.randn(5, 2, WIDTH).to(dtype) for _ in range(4)]


def test_it_starts_as_torchs() -> None:
    ours, theirs = RMSNorm(WIDTH, EPSILON), nn.RMSNorm(WIDTH, eps=EPSILON)
    assert torch.equal(ours.weight, theirs.weight)
    assert repr(ours) == repr(theirs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_values_and_gradients_are_torchs_to_the_bit(dtype: torch.dtype) -> None:
    ours, theirs, (x, residual, slope, straight) = pair(dtype)
    leaves = [[t.clone().requires_grad_() for t in (x, residual)] for _ in range(2)]
    normed, total = ours(*leaves[0])
    summed = leaves[1][0] + leaves[1][1]
    wanted = theirs(summed)
    assert torch.equal(normed, wanted)
    assert torch.equal(total, summed)
    assert torch.equal(ours(total), wanted)
    found = torch.autograd.grad((normed, total), [*leaves[0], ours.weight], (slope, straight))
    right = torch.autograd.grad((wanted, summed), [*leaves[1], theirs.weight], (slope, straight))
    for one, other in zip(found, right, strict=True):
        assert torch.equal(one, other)


def test_a_residual_of_another_shape_is_refused() -> None:
    with pytest.raises(UserError, match="must have one shape and dtype"):
        RMSNorm(WIDTH, EPSILON)(torch.zeros(3, WIDTH), torch.zeros(2, WIDTH))
