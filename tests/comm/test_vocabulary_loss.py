"""Cross-entropy over a sharded vocabulary against the loss of one process."""

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import cross_entropy

from flashtrain.comm import transport
from flashtrain.comm.loss import vocabulary_parallel_cross_entropy
from tests.distributed import run_distributed

VOCABULARY = 24


def logits_of(case: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Whole logits ``[5, 3, V]`` and targets ``[5, 3]``."""
    generator = torch.Generator().manual_seed(len(case))
    logits = torch.randn(5, 3, VOCABULARY, generator=generator)
    targets = torch.randint(0, VOCABULARY, (5, 3), generator=generator)
    match case:
        case "large":
            logits *= 1e4
        case "far apart":
            logits[..., : VOCABULARY // 2] -= 2e4
            logits[..., -3:] += 3e4
        case "confident":
            logits.scatter_(-1, targets.unsqueeze(-1), 7.0)
        case "masked":  # a vocabulary that is padded with columns that must never win
            logits[..., 8:] = float("-inf")
            targets %= 8
        case "ignored":
            targets[1:3] = -100
    return logits.to(dtype), targets


def _against_one_process(rank: int, world: int) -> list[str]:
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    transport.configure(transport.Settings(transport="host"))
    group, failures = dist.group.WORLD.group_name, []
    for case in ("plain", "large", "far apart", "confident", "masked", "ignored"):
        for dtype in (torch.float32, torch.bfloat16):
            whole, targets = logits_of(case, dtype)
            reference = whole.double().requires_grad_()
            wanted = cross_entropy(reference.flatten(0, 1), targets.flatten())
            wanted.backward(torch.tensor(3.0, dtype=torch.float64))

            shard = whole.chunk(world, dim=-1)[rank].clone().requires_grad_()
            loss = vocabulary_parallel_cross_entropy(shard, targets, group, "loss")
            loss.backward(torch.tensor(3.0))
            gradient = reference.grad.chunk(world, dim=-1)[rank]
            if loss.dtype != torch.float32 or not torch.allclose(loss.double(), wanted, rtol=1e-6, atol=1e-6):
                failures.append(f"{case} {dtype}: loss {loss.item()}, not {wanted.item()}")
            # Every element is as near as its dtype can be: the rounding of p and the one of the result.
            relative, absolute = 2 * torch.finfo(dtype).eps, 1e-7
            if shard.grad.dtype != dtype or not torch.allclose(
                shard.grad.double(), gradient, relative, absolute
            ):
                worst = (shard.grad.double() - gradient).abs().max().item()
                failures.append(f"{case} {dtype}: gradient off by {worst}")
            everyone = [torch.empty(()) for _ in range(world)]
            dist.all_gather(everyone, loss.detach())
            if any(not torch.equal(other, loss.detach()) for other in everyone):
                failures.append(f"{case} {dtype}: ranks differ")
    return failures


@pytest.mark.parametrize("world", [2, 3, 4])
def test_loss_and_gradient_equal_those_of_one_process(world: int) -> None:
    assert run_distributed(_against_one_process, world) == [[]] * world
