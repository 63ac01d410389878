"""Causal convolution with bias and SiLU: reference against torch, kernels against fp64, pieces and whole."""

import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import conv1d, pad, silu

from flashtrain.errors import UserError
from flashtrain.kernels.causal_conv import op, reference
from tests.kernels.interpreter import DEVICE, interpreted

with interpreted():
    from flashtrain.kernels.causal_conv import triton as kernels


def inputs(sequence: int, taps: int, tail: bool, dtype: torch.dtype = torch.float64) -> list[Any]:
    """x (sequence first in memory), weight, bias, tail; 40 columns, so that a block has idle ones."""
    draw = torch.Generator().manual_seed(sequence)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw, dtype=torch.float64).to(dtype).to(DEVICE)

    x = random(sequence, 2, 40).transpose(0, 1)
    return [x, random(40, taps), random(40) if tail else None, random(2, taps - 1, 40) if tail else None]


def gradients(function: Any, given: list[Any]) -> list[Tensor]:
    """The output, then gradients of the inputs that are there, for a slope of random signs and sizes."""
    leaves = [None if t is None else t.detach().requires_grad_() for t in given]
    y = function(*leaves)
    slope = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    slope = slope.to(y.dtype).to(DEVICE)
    return [y.detach(), *torch.autograd.grad(y, [t for t in leaves if t is not None], slope)]


def test_reference_is_a_causal_depthwise_convolution() -> None:
    x, weight, _, _ = inputs(9, 4, False)
    by_torch = conv1d(pad(x.mT, (3, 0)), weight.unsqueeze(1), groups=40).mT
    torch.testing.assert_close(reference.causal_conv(x, weight), silu(by_torch))


@pytest.mark.parametrize("sequence", [1, 2, 37, 67, 130])
@pytest.mark.parametrize(("taps", "tail"), [(4, True), (4, False), (2, True), (1, False)])
def test_kernels_equal_fp64(sequence: int, taps: int, tail: bool, poisoned_memory: None) -> None:
    given = inputs(sequence, taps, tail, torch.float32)
    true = gradients(reference.causal_conv, [None if t is None else t.double() for t in given])
    for found, other in zip(gradients(op.conv_kernels, given), true, strict=True):
        assert found.isfinite().all(), "an element was not written"
        torch.testing.assert_close(found.double(), other, rtol=1e-5, atol=1e-4)


def test_kernels_keep_the_memory_order_of_x_and_take_slices() -> None:
    x, weight, *_ = inputs(12, 4, False, torch.float32)
    y = kernels.forward(x, weight, None, None)
    assert y.stride() == x.stride()
    wide = torch.randn(2, 12, 64, device=DEVICE)
    y = kernels.forward(wide[..., 8:48], weight, None, None)
    torch.testing.assert_close(y, reference.causal_conv(wide[..., 8:48], weight), rtol=1e-5, atol=1e-5)


def test_the_op_passes_opcheck() -> None:
    given = inputs(5, 4, True, torch.float32)
    torch.library.opcheck(op.conv_kernels.traced, tuple(t.requires_grad_() for t in given))
    torch.library.opcheck(op.conv_kernels.traced, (*given[:2], None, None), test_utils=("test_faketensor",))


@pytest.mark.parametrize("cuts", [[5], [1, 2], [1, 2, 3, 4], [8]])
def test_pieces_with_their_tails_equal_one(cuts: list[int]) -> None:
    x, weight, bias, tail = (t.cpu().requires_grad_() for t in inputs(9, 4, True))
    whole, last = op.causal_conv(x, weight, bias, tail)
    pieces, carried = [], tail
    for begin, end in zip([0, *cuts], [*cuts, 9], strict=True):
        piece, carried = op.causal_conv(x[:, begin:end], weight, bias, carried)
        pieces.append(piece)
    torch.testing.assert_close(torch.cat(pieces, dim=1), whole)
    assert torch.equal(carried, last)
    slopes, leaves = (torch.randn_like(whole), torch.randn_like(last)), (x, weight, bias, tail)
    found = torch.autograd.grad((torch.cat(pieces, dim=1), carried), leaves, slopes)
    for one, other in zip(found, torch.autograd.grad((whole, last), leaves, slopes), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 5)}, "must be [B, S, D]"),
        ({"x": torch.zeros(2, 0, 40)}, "must be [B, S, D]"),
        ({"weight": torch.zeros(39, 4)}, "weight is [39, 4]"),
        ({"bias": torch.zeros(4)}, "bias is [4]"),
        ({"tail": torch.zeros(2, 4, 40)}, "tail is [2, 4, 40]"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(change: dict[str, Tensor], message: str) -> None:
    given = dict(zip(("x", "weight", "bias", "tail"), inputs(5, 4, True), strict=True)) | change
    with pytest.raises(UserError) as raised:
        op.causal_conv(**given)
    assert message in str(raised.value)


CARRIED = """
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from flashtrain.kernels.causal_conv.triton import backward_kernel as kernel

pointers = {"x", "weight", "dy", "dx", "sums"}
given = {"TAPS": 4, "HAS_BIAS": False, "HAS_TAIL": False, "BT": 64, "BD": 256}
given |= dict.fromkeys(("bias", "tail", "d_tail"))
names = [p.name for p in kernel.params]
kinds = {n: "constexpr" if n in given else "*fp32" if n in pointers else "i32" for n in names}
source = ASTSource(kernel, kinds, {(names.index(n),): value for n, value in given.items()})
text = compile(source, target=GPUTarget("cuda", 90, 32)).asm["ttir"]
loop = next(line for line in text.splitlines() if "scf.for" in line)
print(loop.split("iter_args(")[1].split(")")[0].count("="))
"""


def test_compiled_the_loop_hands_on_all_that_it_hands_on_interpreted() -> None:
    """Triton takes names that begin as one value and are handed on in turn for constants of a loop.

    The interpreter does not: so the loop is compiled here, which needs no GPU. It carries three inputs, three
    slopes, four sums of dweight and one of dbias, and four rows that were loaded ahead.
    """
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    ran = subprocess.run(
        [sys.executable, "-c", CARRIED], env=environment, capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stderr
    assert int(ran.stdout) == 15
