"""What eager code calls past the dispatcher: the same bits, and seen by all that has to see them."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from flashtrain.kernels.operator import operator

RUNS = []


@operator("flashtrain_test::cube")
def cube(x: Tensor, factor: float) -> Tensor:
    RUNS.append(type(x))
    return x**3 * factor


@cube.register_fake
def _(x: Tensor, factor: float) -> Tensor:
    return torch.empty_like(x)


@operator("flashtrain_test::cube_backward")
def cube_backward(dy: Tensor, x: Tensor, factor: float) -> Tensor:
    RUNS.append(type(x))
    return dy * 3 * factor * x**2


@cube_backward.register_fake
def _(dy: Tensor, x: Tensor, factor: float) -> Tensor:
    return torch.empty_like(x)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    x, ctx.factor = inputs
    ctx.save_for_backward(x)


def _backward(context: Any, dy: Tensor) -> tuple[Tensor, None]:
    return cube_backward(dy, *context.saved_tensors, context.factor), None


cube.register_autograd(_backward, setup_context=_setup)


class Seen(TorchDispatchMode):
    """Names of the operators that torch's dispatcher has been given."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), named: Any = None) -> Any:
        self.names.append(function.name())
        return function(*arguments, **(named or {}))


def outcome(function: Any, x: Tensor) -> list[Tensor]:
    leaf = x.clone().requires_grad_()
    y = function(leaf, 2.0)
    return [y.detach(), *torch.autograd.grad(y, leaf, torch.ones_like(y))]


def test_eager_code_has_the_bits_of_the_operator_and_passes_by_the_dispatcher(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    x = torch.randn(7)
    wanted = outcome(cube.traced, x)
    for one in (cube, cube_backward):
        monkeypatch.setattr(one, "traced", None)
    assert all(map(torch.equal, outcome(cube, x), wanted))
    with torch.no_grad():
        assert torch.equal(cube(x, 2.0), wanted[0])


def test_modes_compilers_and_transforms_see_the_operator() -> None:
    x, names = torch.randn(7), ["flashtrain_test::cube", "flashtrain_test::cube_backward"]
    wanted = outcome(cube, x)
    with Seen() as mode:
        outcome(cube, x)
    assert [name for name in mode.names if name.startswith("flashtrain")] == names
    compiled = torch.compile(cube, backend="aot_eager", fullgraph=True)
    assert all(map(torch.equal, outcome(compiled, x), wanted))
    RUNS.clear()
    with torch._subclasses.FakeTensorMode() as fake:
        without_data = fake.from_tensor(x)
    assert cube(without_data, 2.0).shape == x.shape
    assert cube(x.to("meta"), 2.0).is_meta
    assert not RUNS, "they have no data"
    torch.testing.assert_close(torch.vmap(lambda row: cube(row, 2.0))(x), wanted[0])
    torch.library.opcheck(cube.traced, (x.requires_grad_(), 2.0))


def test_a_second_derivative_is_refused() -> None:
    x = torch.randn(7, requires_grad=True)
    (slope,) = torch.autograd.grad(cube(x, 2.0).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula was registered"):
        slope.sum().backward()
