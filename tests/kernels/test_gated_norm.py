"""Gate and RMSNorm in one: reference against torch's own, kernels against fp64."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import rms_norm, silu

from flashtrain.errors import UserError
from flashtrain.kernels.gated_norm import op, reference
from tests.kernels.interpreter import DEVICE, interpreted

with interpreted():
    from flashtrain.kernels.gated_norm import triton as kernels

EPSILON = 1e-3


def inputs(rows: int, width: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    draw = torch.Generator().manual_seed(rows)
    shapes = ((rows, 2, width), (rows, 2, width), (width,))
    return [torch.randn(s, generator=draw, dtype=torch.float64).to(dtype).to(DEVICE) for s in shapes]


def gradients(function: Any, given: list[Tensor], groups: int) -> list[Tensor]:
    leaves = [t.detach().requires_grad_() for t in given]
    y = function(*leaves, groups, EPSILON)
    slope = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return [y.detach(), *torch.autograd.grad(y, leaves, slope.to(y.dtype).to(DEVICE))]


def test_reference_norms_each_group_of_the_gated_values() -> None:
    x, z, weight = inputs(3, 24)
    gated = (x * silu(z)).view(3, 2, 4, 6)
    wanted = rms_norm(gated, (6,), eps=EPSILON).flatten(2) * weight
    torch.testing.assert_close(reference.gated_norm(x, z, weight, 4, EPSILON), wanted)


@pytest.mark.parametrize(("rows", "width", "groups"), [(1, 32, 1), (7, 96, 2), (5, 40, 4)])
def test_kernels_equal_fp64(rows: int, width: int, groups: int, poisoned_memory: None) -> None:
    given = inputs(rows, width, torch.float32)
    true = gradients(reference.gated_norm, [t.double() for t in given], groups)
    for found, other in zip(gradients(op.norm_kernels, given, groups), true, strict=True):
        assert found.isfinite().all(), "an element was not written"
        torch.testing.assert_close(found.double(), other, rtol=1e-4, atol=1e-5)


def test_kernels_take_a_slice_as_the_gate() -> None:
    x, _, weight = inputs(4, 32, torch.float32)
    packed = torch.randn(4, 2, 80, device=DEVICE)
    found = kernels.forward(x, packed[..., 16:48], weight, 1, EPSILON)
    wanted = reference.gated_norm(x, packed[..., 16:48], weight, 1, EPSILON)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


def test_the_op_passes_opcheck() -> None:
    given = tuple(t.requires_grad_() for t in inputs(3, 32, torch.float32))
    torch.library.opcheck(op.norm_kernels.traced, (*given, 2, EPSILON))


def test_inputs_that_do_not_fit_are_refused() -> None:
    x, z, weight = inputs(2, 12)
    for arguments in ((x, z[:1], weight), (x, z, weight[:4]), (x, z, weight, 5)):
        with pytest.raises(UserError, match="must be alike"):
            op.gated_norm(*arguments)
