"""SwiGLU's product on packed gate and up: reference against the definition, kernels against fp64."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import silu

from flashtrain.errors import UserError
from flashtrain.kernels.swiglu import op, reference
from tests.kernels.interpreter import DEVICE, interpreted

with interpreted():
    from flashtrain.kernels.swiglu import triton  # noqa: F401 - interpreted from here on


def packed(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    draw = torch.Generator().manual_seed(len(shape))
    return (3 * torch.randn(*shape, generator=draw, dtype=torch.float64)).to(dtype).to(DEVICE)


def gradients(function: Any, given: Tensor) -> list[Tensor]:
    leaf = given.detach().requires_grad_()
    y = function(leaf)
    slope = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).half()  # exact in every dtype
    return [y.detach(), *torch.autograd.grad(y, leaf, slope.to(y.dtype).to(DEVICE))]


def test_reference_follows_the_definition_block_by_block() -> None:
    given = packed(3, 384)
    blocks = given.split(64, dim=-1)
    gate, up = torch.cat(blocks[::2], dim=-1), torch.cat(blocks[1::2], dim=-1)
    torch.testing.assert_close(reference.swiglu(given), silu(gate) * up)


# 3 x 5 x 3 pairs of blocks are a whole program and a part of one.
@pytest.mark.parametrize("shape", [(128,), (1, 256), (3, 5, 384), (0, 128)])
def test_kernels_equal_fp64(shape: tuple[int, ...], poisoned_memory: None) -> None:
    given = packed(*shape, dtype=torch.float32)
    true = gradients(reference.swiglu, given.double())
    for found, other in zip(gradients(op.swiglu_kernels, given), true, strict=True):
        assert found.isfinite().all(), "an element was not written"
        torch.testing.assert_close(found.double(), other, rtol=1e-5, atol=1e-6)


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")
def test_large_gates_of_either_sign_are_no_overflow() -> None:
    given = packed(1, 128, dtype=torch.float32)
    given[0, :2] = torch.tensor([-500.0, 500.0])
    true = gradients(reference.swiglu, given.double())
    for found, other in zip(gradients(op.swiglu_kernels, given), true, strict=True):
        torch.testing.assert_close(found.double(), other, rtol=1e-5, atol=1e-6)


def test_half_precision_is_rounded_once() -> None:
    given = packed(4, 128, dtype=torch.float16)
    true = gradients(reference.swiglu, given.double())
    for function in (op.swiglu_kernels, reference.swiglu):
        for found, other in zip(gradients(function, given), true, strict=True):
            assert (found != other.half()).float().mean() < 0.01, "values are not the nearest"


def test_kernels_take_slices_and_columns_apart() -> None:
    dense = packed(4, 256, dtype=torch.float32)
    for strided in (dense.mT.contiguous().mT, torch.cat([dense, dense], dim=-1)[:, :256]):
        for found, wanted in zip(
            gradients(op.swiglu_kernels, strided), gradients(op.swiglu_kernels, dense), strict=True
        ):
            assert torch.equal(found, wanted)


def test_the_op_passes_opcheck() -> None:
    torch.library.opcheck(op.swiglu_kernels.traced, (packed(3, 128, dtype=torch.float32).requires_grad_(),))


@pytest.mark.parametrize("shape", [(2, 64), (2, 192), ()])
def test_a_width_without_whole_pairs_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(UserError, match="must be a multiple of 128 wide"):
        op.swiglu(torch.zeros(shape))
