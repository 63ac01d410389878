"""Projection and cross-entropy over a sharded vocabulary against whole logits in fp64."""

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import cross_entropy, linear

from flashtrain.comm import transport
from flashtrain.comm.loss import linear_cross_entropy
from flashtrain.errors import UserError
from flashtrain.kernels.weight_gradient import WeightGradient
from tests.distributed import run_distributed

HIDDEN, VOCABULARY = 20, 24
FACTOR = 3.0


def operands(rows: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(rows)
    x, weight = (torch.randn(n, HIDDEN, generator=draw).to(dtype) for n in (rows, VOCABULARY))
    targets = torch.randint(0, VOCABULARY, (rows,), generator=draw)
    targets[rows // 2] = -100 if rows > 1 else targets[0]
    return x, weight, targets


def _against_one_process(rank: int, world: int) -> list[str]:
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    group, failures = dist.group.WORLD.group_name, []
    for mover, kind in (("host", "direct"), ("host", "ring"), ("group", "direct")):
        transport.configure(transport.Settings(transport=mover, kind=kind))
        for rows in (6 * world, 7, 5 * world + 1, 1):
            for dtype, chunk_rows in ((torch.float32, 2), (torch.float64, 5), (torch.bfloat16, 100)):
                failures += _case(
                    rank, world, group, rows, dtype, chunk_rows, f"{mover} {kind} {rows} {dtype}"
                )
    return failures


def _case(
    rank: int, world: int, group: str, rows: int, dtype: torch.dtype, chunk_rows: int, case: str
) -> list[str]:
    failures = []
    x, weight, targets = operands(rows, dtype)
    wide = [t.clone().double().requires_grad_() for t in (x, weight)]
    wanted = cross_entropy(linear(*wide), targets)
    wanted.backward(torch.tensor(FACTOR, dtype=torch.float64))
    true = [wide[0].grad.tensor_split(world)[rank], wide[1].grad.chunk(world)[rank]]
    chunk_bytes = chunk_rows * world * VOCABULARY * x.element_size()
    for main in (False, True):
        own = [x.tensor_split(world)[rank].clone(), weight.chunk(world)[rank].clone()]
        own = [t.requires_grad_() for t in own]
        total = WeightGradient(own[1]) if main else None
        loss = linear_cross_entropy(*own, targets, group, "head", total, chunk_bytes)
        loss.backward(torch.tensor(FACTOR, dtype=loss.dtype))
        found = [own[0].grad, own[1].grad if total is None else total.total]
        bound = {torch.float32: 1e-5, torch.float64: 1e-12, torch.bfloat16: 2e-2}[dtype]
        if abs(loss.item() - wanted.item()) > bound * wanted.item():
            failures.append(f"{case}: loss {loss.item()}, not {wanted.item()}")
        for name, one, other in zip(("dx", "dw"), found, true, strict=True):
            if not one.double().sub(other).norm() <= bound * (wide[0].grad.norm() + wide[1].grad.norm()):
                failures.append(f"{case}: {name} off by {one.double().sub(other).norm()}")
        if main and own[1].grad is not None:
            failures.append(f"{case}: a gradient beside the main one")
        with torch.no_grad():
            alone = linear_cross_entropy(*own, targets, group, "head", None, chunk_bytes)
        everyone = [torch.empty_like(loss) for _ in range(world)]
        dist.all_gather(everyone, loss.detach())
        if any(not torch.equal(other, alone) for other in everyone):
            failures.append(f"{case}: ranks or the pass without gradients differ")
    return failures


@pytest.mark.parametrize("world", [2, 3])
def test_loss_and_gradients_equal_those_of_one_process(world: int) -> None:
    assert run_distributed(_against_one_process, world) == [[]] * world


def _one_side(rank: int, world: int) -> list[float]:
    """How far gradients are off where x or the weight wants none; a shard that does not fit is refused."""
    transport.configure(transport.Settings(transport="host"))
    group = dist.group.WORLD.group_name
    x, weight, targets = operands(8, torch.float32)
    own = [x.tensor_split(world)[rank].clone(), weight.chunk(world)[rank].clone()]
    both = [t.clone().requires_grad_() for t in own]
    linear_cross_entropy(*both, targets, group).backward()
    found = []
    for index in (0, 1):
        leaves = [t.clone().requires_grad_(place == index) for place, t in enumerate(own)]
        linear_cross_entropy(*leaves, targets, group).backward()
        found.append(float((leaves[index].grad - both[index].grad).norm()))
    with pytest.raises(UserError, match=r"head: 8 targets over 2 ranks are 4 rows on rank \d, but .* has 3"):
        linear_cross_entropy(own[0][:3], own[1], targets, group, "head")
    return found


def test_what_wants_no_gradient_gets_none() -> None:
    for found in run_distributed(_one_side, 2):
        assert max(found) < 1e-6
