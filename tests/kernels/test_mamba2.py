"""What Mamba-2 has between its projections, as one function: the bits of its kernels one after the other."""

from typing import Any

import pytest
import torch
from torch import Tensor

from flashtrain.errors import UserError
from flashtrain.kernels.causal_conv import op as conv
from flashtrain.kernels.causal_conv.reference import next_tail
from flashtrain.kernels.gated_norm import op as norm
from flashtrain.kernels.mamba2 import op
from flashtrain.kernels.ssd import op as ssd
from flashtrain.nn.ssm import Mamba2
from tests.kernels.interpreter import DEVICE, interpreted

with interpreted():
    from flashtrain.kernels.causal_conv import triton as conv_kernels  # noqa: F401
    from flashtrain.kernels.gated_norm import triton as norm_kernels  # noqa: F401
    from flashtrain.kernels.ssd import triton as ssd_kernels  # noqa: F401

BATCH, HEADS, WIDTH, STATES, TAPS = 2, 4, 16, 16, 4


def one_by_one(
    projected: Tensor, tail: Tensor | None, state: Tensor | None, weights: op.Weights, sizes: op.Sizes
) -> tuple[Tensor, Tensor, Tensor]:
    z, inputs, dt = op._split(projected, sizes)
    mixed = conv.conv_kernels(inputs, weights.conv, weights.conv_bias, tail)
    x, keys, queries = op._heads(mixed, sizes)
    y, final = ssd.ssd_kernels(x, dt, weights.rate, keys, queries, weights.skip, weights.step_bias, state)
    out = norm.norm_kernels(op._tokens(y), z, weights.norm, sizes.norm_groups, sizes.epsilon)
    return out, next_tail(inputs, TAPS, tail), final


def drawn(tokens: int, groups: int, before: bool) -> tuple[list[Tensor | None], op.Sizes]:
    """Leaves in the order of ``mix``: projected, tail, state, weights."""
    draw = torch.Generator().manual_seed(tokens)
    inner = HEADS * WIDTH
    channels = inner + 2 * groups * STATES
    shapes = [(tokens, BATCH, inner + channels + HEADS), (BATCH, TAPS - 1, channels)]
    shapes += [(BATCH, HEADS, WIDTH, STATES), (channels, TAPS), (channels,), *[(HEADS,)] * 3, (inner,)]
    given: list[Tensor | None] = [torch.randn(s, generator=draw).to(DEVICE) for s in shapes]
    given[5] = -torch.rand(HEADS, generator=draw).to(DEVICE) - 0.1
    if not before:
        given[1:3] = None, None
    leaves = [None if t is None else t.requires_grad_() for t in given]
    return leaves, op.Sizes(HEADS, WIDTH, STATES, groups, 1e-5)


def outcome(
    function: Any, leaves: list[Tensor | None], sizes: op.Sizes, wanted: tuple[int, ...]
) -> list[Tensor]:
    found = function(*leaves[:3], op.Weights(*leaves[3:]), sizes)  # type: ignore[arg-type]
    chosen = [found[index] for index in wanted]
    draw = torch.Generator().manual_seed(7)
    slopes = [torch.randn(t.shape, generator=draw).to(DEVICE) for t in chosen]
    inputs = [t for t in leaves if t is not None]
    return [
        *(t.detach() for t in found),
        *torch.autograd.grad(chosen, inputs, slopes, materialize_grads=True),
    ]


@pytest.mark.parametrize(
    ("tokens", "groups", "before", "wanted"),
    [(37, 1, True, (0, 1, 2)), (5, 2, False, (0,)), (3, 2, True, (1, 2))],
)
def test_one_function_has_the_bits_of_the_kernels_one_by_one(
    tokens: int, groups: int, before: bool, wanted: tuple[int, ...]
) -> None:
    leaves, sizes = drawn(tokens, groups, before)
    found = outcome(op.mix, leaves, sizes, wanted)
    for one, other in zip(found, outcome(one_by_one, leaves, sizes, wanted), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_states_of_another_shape_are_refused_and_what_has_no_kernel_is_left_to_others() -> None:
    leaves, sizes = drawn(5, 1, True)
    weights = op.Weights(*leaves[3:])  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"the state is \[1, 4, 16, 16\]; with this batch it must be \[2, 4"):
        op.mix(leaves[0], leaves[1], leaves[2][:1], weights, sizes)  # type: ignore[arg-type, index]
    with pytest.raises(UserError, match=r"the tail is \[2, 2, 96\]; with this batch it must be \[2, 3, 96\]"):
        op.mix(leaves[0], leaves[1][:, 1:], leaves[2], weights, sizes)  # type: ignore[arg-type, index]
    assert Mamba2.in_one
    assert op.takes(leaves[0], weights, sizes) == leaves[0].is_cuda  # type: ignore[arg-type, union-attr]
