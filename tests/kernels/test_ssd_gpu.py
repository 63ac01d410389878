"""The SSD kernels and those beside them on a GPU: full tiles, bf16, every size they take, against fp64.

Triton 3.4 to 3.7.0 miscompiles some chunked backward kernels on Hopper (flash-linear-attention#640), so every
gradient is compared for every dtype: an error of a thousandth is a rounding, one of a tenth is not.
"""

import pytest
import torch
from torch import Tensor

from flashtrain.kernels.causal_conv import op as conv
from flashtrain.kernels.causal_conv import reference as conv_reference
from flashtrain.kernels.gated_norm import op as norm
from flashtrain.kernels.gated_norm import reference as norm_reference
from flashtrain.kernels.ssd import op, reference
from flashtrain.nn.ssm import Mamba2

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]
BOUNDS = {torch.bfloat16: 8e-3, torch.float16: 1e-3, torch.float32: 2e-5}
# Sums over all tokens of terms of both signs: what is left of them may be small beside their errors.
CANCELLING = {"A": 4.0, "dt_bias": 4.0}
NAMES = ("y", "final", "x", "dt", "A", "B", "C", "D", "dt_bias", "initial_state")


@pytest.fixture(autouse=True)
def the_same_draws_in_every_run() -> None:
    torch.manual_seed(0)


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, device="cuda")


def inputs(
    batch: int, sequence: int, heads: int, width: int, groups: int, states: int, dtype: torch.dtype
) -> list[Tensor]:
    """x in sequence-first memory, B and C as slices of one tensor: as a layer hands them over."""
    x = random(sequence, batch, heads, width).to(dtype).transpose(0, 1)
    packed = random(batch, sequence, 2 * groups * states).to(dtype)
    keys, queries = (t.unflatten(-1, (groups, states)) for t in packed.chunk(2, dim=-1))
    rate = -torch.empty(heads, device="cuda").uniform_(1, 16)
    dt = random(batch, sequence, heads).to(dtype)
    return [x, dt, rate, keys, queries, random(heads), random(heads) - 4, random(batch, heads, width, states)]


def error(found: Tensor, true: Tensor) -> float:
    assert not found.isnan().any(), "an element was not written"
    return float((found.double() - true).norm() / true.norm())


def outcome(function: object, given: list[Tensor], slopes: tuple[Tensor, Tensor]) -> list[Tensor]:
    leaves = [t.detach().requires_grad_() for t in given]
    outputs = function(*leaves)  # type: ignore[operator]
    return [*(t.detach() for t in outputs), *torch.autograd.grad(outputs, leaves, slopes)]


def compare(given: list[Tensor], bound: float) -> None:
    slopes = torch.randn_like(given[0]), torch.randn_like(given[7])
    true = outcome(reference.chunked, [t.double() for t in given], tuple(t.double() for t in slopes))
    found = outcome(op.ssd_kernels, given, slopes)
    for name, one, other in zip(NAMES, found, true, strict=True):
        assert error(one, other) < bound * CANCELLING.get(name, 1.0), name
    for one, other in zip(found, outcome(op.ssd_kernels, given, slopes), strict=True):
        assert torch.equal(one, other), "other bits in a second run"


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize(("batch", "sequence", "groups"), [(2, 1024, 1), (1, 777, 4), (3, 1, 1)])
def test_every_output_and_gradient_equals_fp64(
    batch: int, sequence: int, groups: int, dtype: torch.dtype, poisoned_memory: None
) -> None:
    compare(inputs(batch, sequence, 16, 64, groups, 128, dtype), BOUNDS[dtype])


@pytest.mark.parametrize(("width", "states"), [(16, 16), (32, 64), (64, 32), (64, 16), (16, 128)])
def test_every_size(width: int, states: int, poisoned_memory: None) -> None:
    compare(inputs(1, 300, 6, width, 2, states, torch.bfloat16), BOUNDS[torch.bfloat16])


def test_errors_do_not_grow_with_the_sequence() -> None:
    given = inputs(1, 16384, 4, 64, 1, 128, torch.bfloat16)
    compare(given, BOUNDS[torch.bfloat16])


def test_two_pieces_equal_one() -> None:
    x, dt, rate, keys, queries, skip, bias, state = inputs(2, 500, 8, 64, 1, 128, torch.float32)
    whole = op.ssd(x, dt, rate, keys, queries, skip, None, bias, state)
    first, carried = op.ssd(
        x[:, :133], dt[:, :133], rate, keys[:, :133], queries[:, :133], skip, None, bias, state
    )
    second, final = op.ssd(
        x[:, 133:], dt[:, 133:], rate, keys[:, 133:], queries[:, 133:], skip, None, bias, carried
    )
    assert error(torch.cat([first, second], dim=1), whole[0].double()) < 1e-5
    assert error(final, whole[1].double()) < 1e-5


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("tail", [True, False])
def test_convolution_equals_fp64(tail: bool, dtype: torch.dtype, poisoned_memory: None) -> None:
    x, weight, bias = random(700, 2, 600).to(dtype).transpose(0, 1), random(600, 4), random(600)
    given = [x, weight, bias, *([random(2, 3, 600).to(dtype)] if tail else [])]
    leaves = [t.requires_grad_() for t in given]
    wide = [t.detach().double().requires_grad_() for t in given]
    y = conv.conv_kernels(*leaves, *([] if tail else [None]))
    true = conv_reference.causal_conv(*wide)
    slope = torch.randn_like(y)
    pairs = zip(
        [y.detach(), *torch.autograd.grad(y, leaves, slope)],
        [true.detach(), *torch.autograd.grad(true, wide, slope.double())],
        strict=True,
    )
    for found, other in pairs:
        assert error(found, other) < BOUNDS[dtype]


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize(("width", "groups"), [(4096, 1), (1536, 3)])
def test_norm_equals_fp64(width: int, groups: int, dtype: torch.dtype, poisoned_memory: None) -> None:
    given = [random(2000, width).to(dtype).requires_grad_() for _ in range(2)]
    given.append(random(width).requires_grad_())
    wide = [t.detach().double().requires_grad_() for t in given]
    y = norm.norm_kernels(*given, groups, 1e-5)
    true = norm_reference.gated_norm(*wide, groups, 1e-5)
    slope = torch.randn_like(y)
    pairs = zip(
        [y.detach(), *torch.autograd.grad(y, given, slope)],
        [true.detach(), *torch.autograd.grad(true, wide, slope.double())],
        strict=True,
    )
    for found, other in pairs:
        assert error(found, other) < BOUNDS[dtype]


def test_the_layer_equals_itself_on_the_cpu() -> None:
    torch.manual_seed(0)
    layer = Mamba2(128, 8, 32, 64, groups=2)
    x = torch.randn(200, 2, 128)
    true = layer(x)
    true.square().mean().backward()
    wanted = [p.grad.clone() for p in layer.parameters() if p.grad is not None]
    layer.zero_grad()
    layer.cuda()
    found = layer(x.cuda())
    found.square().mean().backward()
    assert error(found.detach(), true.detach().double().cuda()) < 1e-4
    for parameter, other in zip(layer.parameters(), wanted, strict=True):
        assert parameter.grad is not None
        assert error(parameter.grad, other.double().cuda()) < 1e-3
    with torch.inference_mode():
        state = layer.extend(x[:150].cuda(), None)[1]
        for t in range(150, 200):
            row, state = layer.step(x[t].cuda(), state)
            assert error(row, true[t].detach().double().cuda()) < 1e-3
