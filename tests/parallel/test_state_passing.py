"""Mamba-2 over segments of a sequence: outputs, states and gradients of one rank, on two and three."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

from flashtrain.comm import transport
from flashtrain.errors import UserError
from flashtrain.nn.ssm import Mamba2
from flashtrain.parallel.state_passing import StatePassing
from tests.distributed import run_distributed
from tests.parallel.test_apply import off, poison

HIDDEN = 12


def mixer(dtype: torch.dtype) -> Mamba2:
    torch.manual_seed(0)
    layer = Mamba2(HIDDEN, 4, 8, 6, groups=2)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        layer.log_rate.sub_(2.0)  # slow decay, so that states reach far
    return layer.to(dtype)


def compute(layer: nn.Module, x: Tensor, slope: Tensor, slope_of_state: Tensor) -> dict[str, Tensor]:
    """Output, state and all gradients."""
    x = x.detach().requires_grad_()
    y, state = layer.extend(x, None)  # type: ignore[operator]
    torch.autograd.backward((y, state.ssm), (slope, slope_of_state))
    found = {"y": y.detach(), "state": state.ssm.detach(), "tail": state.tail.detach(), "x": x.grad}
    return found | {name: p.grad for name, p in layer.named_parameters()}


def _segments(rank: int, world: int, name: str, dtype: torch.dtype, cuts: list[int]) -> dict[str, Any]:
    poison()
    transport.configure(transport.Settings(transport=name))
    mesh = init_device_mesh("cpu", (world,), mesh_dim_names=("context",))
    draw = torch.Generator().manual_seed(3)
    x, slope = (torch.randn(cuts[-1], 2, HIDDEN, generator=draw, dtype=dtype) for _ in range(2))
    of_state = torch.randn(2, 4, 8, 6, generator=draw, dtype=dtype)
    plain, layer = mixer(dtype), mixer(dtype)
    StatePassing()._apply(layer, mesh)
    wanted = compute(plain, x, slope, of_state)
    first, last = [0, *cuts][rank], cuts[rank]
    own = of_state if rank == world - 1 else torch.zeros_like(of_state)
    found = compute(layer, x[first:last], slope[first:last], own)
    for part in ("y", "x"):
        wanted[part] = wanted[part][first:last]
    errors = {part: off(found[part], wanted[part]) for part in ("y", "x")}
    if rank == world - 1:
        errors |= {part: off(found[part], wanted[part]) for part in ("state", "tail")}
    for part, _ in plain.named_parameters():
        torch.distributed.all_reduce(found[part])
        errors[part] = off(found[part], wanted[part])
    errors["bits"] = float(
        not torch.equal(found["y"], compute(layer, x[first:last], slope[first:last], own)["y"])
    )
    return errors


@pytest.mark.parametrize(
    ("name", "dtype", "bound", "cuts"),
    [
        ("host", torch.float64, 1e-12, [6, 13]),
        ("group", torch.float32, 2e-5, [6, 13]),
        ("host", torch.float64, 1e-12, [3, 100, 170]),
        ("host", torch.float32, 2e-5, [64, 128, 192]),
    ],
)
def test_segments_equal_the_whole_with_every_gradient(
    name: str, dtype: torch.dtype, bound: float, cuts: list[int]
) -> None:
    for errors in run_distributed(_segments, len(cuts), name, dtype, cuts):
        assert {part: error for part, error in errors.items() if not error <= bound} == {}


def _refused(rank: int, world: int) -> list[str]:
    mesh, found = init_device_mesh("cpu", (world,)), []
    layer = StatePassing()._apply(mixer(torch.float32), mesh)
    state = mixer(torch.float32).empty_state(1)
    for call in (
        lambda: StatePassing()._apply(nn.Linear(2, 2), mesh),
        lambda: layer(torch.randn(2, 1, HIDDEN)),
        lambda: layer.extend(torch.randn(8, 1, HIDDEN), state),  # type: ignore[operator]
    ):
        try:
            call()
        except UserError as error:
            found.append(str(error))
    return found


def test_what_cannot_be_passed_is_refused() -> None:
    wanted = [
        "StatePassing applies to Mamba2, not to Linear",
        "a segment of 2 tokens on one rank is shorter than the convolution's 3 before a token: use longer "
        "sequences or fewer ranks",
        "a mixer that passes states between ranks starts at the sequence's first token",
    ]
    assert run_distributed(_refused, 2) == [wanted] * 2
