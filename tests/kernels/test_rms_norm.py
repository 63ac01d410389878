"""RMSNorm, alone and with the residual addition: reference against the definition, kernels against fp64."""

from typing import Any

import pytest
import torch
from torch import Tensor

from flashtrain.errors import UserError
from flashtrain.kernels.rms_norm import op, reference
from tests.kernels.interpreter import DEVICE, interpreted

with interpreted():
    from flashtrain.kernels.rms_norm import triton as kernels

EPSILON = 1e-3


def inputs(rows: int, width: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """x and residual ``[rows, 2, width]``, weight ``[width]``."""
    draw = torch.Generator().manual_seed(rows)
    shapes = ((rows, 2, width), (rows, 2, width), (width,))
    return [torch.randn(s, generator=draw, dtype=torch.float64).to(dtype).to(DEVICE) for s in shapes]


def gradients(function: Any, given: list[Tensor]) -> list[Tensor]:
    """All outputs, then gradients of all inputs, for slopes of random signs and sizes."""
    leaves = [t.detach().requires_grad_() for t in given]
    found = function(*leaves, EPSILON)
    outputs = found if isinstance(found, tuple) else (found,)
    draw = torch.Generator().manual_seed(1)
    slopes = [
        torch.randn(y.shape, generator=draw, dtype=torch.float64).to(y.dtype).to(DEVICE) for y in outputs
    ]
    return [*(y.detach() for y in outputs), *torch.autograd.grad(outputs, leaves, slopes)]


def test_references_follow_the_definition() -> None:
    x, residual, weight = inputs(3, 24)
    normed, total = reference.add_rms_norm(x, residual, weight, EPSILON)
    wanted = total / (total.square().mean(-1, keepdim=True) + EPSILON).sqrt() * weight
    assert torch.equal(total, x + residual)
    torch.testing.assert_close(normed, wanted)
    torch.testing.assert_close(reference.rms_norm(total, weight, EPSILON), wanted)


# Over 8 rows each of the four blocks takes several; 96 and 40 columns leave idle ones.
@pytest.mark.parametrize(("rows", "width"), [(1, 32), (9, 96), (37, 40), (2, 1)])
@pytest.mark.parametrize("add", [True, False])
def test_kernels_equal_fp64(rows: int, width: int, add: bool, poisoned_memory: None) -> None:
    given = inputs(rows, width, torch.float32)
    kernel, wide = (op.add_norm_kernels, reference.add_rms_norm)
    if not add:
        kernel, wide, given = op.norm_kernels, reference.rms_norm, given[1:]
    true = gradients(wide, [t.double() for t in given])
    for found, other in zip(gradients(kernel, given), true, strict=True):
        assert found.isfinite().all(), "an element was not written"
        torch.testing.assert_close(found.double(), other, rtol=1e-4, atol=1e-5)


def test_no_rows_have_no_gradient_of_the_weight(poisoned_memory: None) -> None:
    normed, total, *found = gradients(op.add_norm_kernels, inputs(0, 32, torch.float32))
    assert normed.shape == total.shape == found[0].shape == (0, 2, 32)
    assert torch.equal(found[2], torch.zeros_like(found[2]))


def test_the_sum_is_rounded_before_the_norm_and_the_norm_once() -> None:
    """As in two steps: of bits all but a few, where sums in another order round the other way."""
    x, residual, weight = inputs(20, 64, torch.float16)
    normed, total = op.add_norm_kernels(x, residual, weight, EPSILON)
    assert torch.equal(total, x + residual)
    wanted = reference.rms_norm(total, weight, EPSILON)
    assert (normed != wanted).float().mean() < 0.01
    assert torch.equal(op.norm_kernels(total, weight, EPSILON), normed)


@pytest.mark.filterwarnings("ignore:Mismatch dtype")
def test_a_weight_in_fp32_leaves_the_dtype_of_x() -> None:
    x, residual, weight = inputs(5, 64, torch.float16)
    for found in (
        op.norm_kernels(x, weight.float(), EPSILON),
        *op.add_norm_kernels(x, residual, weight.float(), EPSILON),
        reference.rms_norm(x, weight.float(), EPSILON),
    ):
        assert found.dtype == torch.float16


def test_an_output_that_nothing_uses_has_no_gradient() -> None:
    given = [t.requires_grad_() for t in inputs(3, 32, torch.float32)]
    for number in (0, 1):
        slope = torch.ones(3, 2, 32, device=DEVICE)
        found = torch.autograd.grad(
            op.add_norm_kernels(*given, EPSILON)[number], given, slope, allow_unused=True
        )
        wanted = torch.autograd.grad(
            reference.add_rms_norm(*given, EPSILON)[number], given, slope, allow_unused=True
        )
        for one, other in zip(found, wanted, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_kernels_take_slices_and_columns_apart() -> None:
    _, residual, weight = inputs(4, 32, torch.float32)
    packed = torch.randn(4, 2, 80, device=DEVICE)
    strided = [packed[..., 16:48], residual.mT.contiguous().mT, weight]
    dense = [t.contiguous() for t in strided]
    for found, wanted in zip(
        gradients(op.add_norm_kernels, strided), gradients(op.add_norm_kernels, dense), strict=True
    ):
        assert torch.equal(found, wanted)


def test_the_backward_kernel_takes_slices_of_each_row() -> None:
    x, residual, weight = inputs(9, 32, torch.float32)
    wide = [torch.cat([t, t + 1], dim=-1)[..., :32] for t in (x, residual, x - residual)]
    wanted = kernels.backward(x, residual, x - residual, weight, EPSILON)
    for found, other in zip(kernels.backward(*wide, weight, EPSILON), wanted, strict=True):
        assert torch.equal(found, other)


def test_the_ops_pass_opcheck() -> None:
    x, residual, weight = (t.requires_grad_() for t in inputs(3, 32, torch.float32))
    torch.library.opcheck(op.norm_kernels.traced, (x, weight, EPSILON))
    torch.library.opcheck(op.add_norm_kernels.traced, (x, residual, weight, EPSILON))


@pytest.mark.parametrize("width", [64, 4096, 5120, 16384])
@pytest.mark.parametrize("itemsize", [2, 4])
def test_launches_fit_a_processor(width: int, itemsize: int) -> None:
    for launch, arrays in (
        (kernels.forward_launch(width, itemsize, True), 2),
        (kernels.backward_launch(width, itemsize, True), 3),
    ):
        ahead = (launch.stages - 1) * kernels.triton.next_power_of_2(width) * itemsize * arrays
        assert launch.blocks * ahead <= 220 * 1024
        assert launch.blocks * launch.warps <= 64
        assert launch.blocks <= 32
        assert launch.blocks * launch.warps * 32 * launch.registers <= 65536


def test_inputs_that_do_not_fit_are_refused() -> None:
    x, residual, weight = inputs(2, 12)
    for change, message in (
        ((x, residual, weight[:4]), "weight [4] must be as wide as x [2, 2, 12]"),
        ((x, residual[:1], weight), "the residual [1, 2, 12]"),
        ((x, residual.float(), weight), "torch.float32 must have one shape and dtype"),
    ):
        with pytest.raises(UserError) as raised:
            op.add_rms_norm(*change)
        assert message in str(raised.value)
    with pytest.raises(UserError, match="must be as wide"):
        op.rms_norm(torch.zeros(()), weight)
