"""Segments on a GPU each against whole sequences in fp64 on the CPU: every gradient, twice the same bits."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from flashtrain.checkpoint.blocks import block_of
from flashtrain.comm import transport
from flashtrain.models.decoder import Decoder
from flashtrain.parallel import apply, context, mesh
from flashtrain.train.step import mean_over_tokens
from tests.distributed import run_distributed
from tests.nn.test_hybrid_gpu import BOUNDS, CONFIG, LAYOUTS, gradients

GPUS = torch.cuda.device_count()
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(GPUS < 2, reason="needs two GPUs that reach each other's memory"),
]


def _errors(
    rank: int, world: int, degrees: mesh.Degrees, layout: str | None, dtype: torch.dtype
) -> dict[str, float]:
    """The relative error of the loss and of each gradient on this rank; inf where a second run differs."""
    torch.cuda.set_device(rank)
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    transport.configure(transport.Settings(transport="nvlink", timeout=60.0, tune=False))
    ranks = mesh.build(degrees, "cuda")
    config = CONFIG if layout is None else replace(CONFIG, layout=LAYOUTS[layout])
    drawn = torch.randint(0, 256, (2, 334, 2), generator=torch.Generator().manual_seed(1))
    plain = Decoder(config, torch.Generator().manual_seed(0)).to(dtype)
    wide = Decoder(config).double()
    wide.load_state_dict(plain.state_dict())
    true = gradients(wide, *drawn)
    tokens, targets = (context.own_segment(part.t(), ranks).t().contiguous().cuda() for part in drawn)
    runs: list[dict[str, Tensor]] = []
    for _ in range(2):
        model = Decoder(config, torch.Generator().manual_seed(0)).to(dtype).cuda()
        apply.parallelize(model, ranks)
        loss = model(tokens, targets)
        loss.backward()
        apply.sum_replicated_gradients(model, ranks)
        whole = {"loss": mean_over_tokens(loss.detach(), ranks)}
        runs.append(whole | {name: p.grad for name, p in model.named_parameters()})
    found: dict[str, Any] = {}
    for name, one in runs[0].items():
        first, second = block_of(name, one), block_of(name, runs[1][name])
        assert first is not None
        assert second is not None
        wanted = true[name]
        for dim, start in enumerate(first.offset):
            wanted = wanted.narrow(dim, start, first.local.shape[dim])
        # Of all of the parameter, as a rank may hold a single number of it, that cancels.
        error = (first.local.double().cpu() - wanted).norm() / true[name].norm()
        found[name] = float(error) if torch.equal(first.local, second.local) else float("inf")
    transport.shutdown()
    return found


@pytest.mark.parametrize("dtype", list(BOUNDS))
@pytest.mark.parametrize("layout", ["pattern", "parallel", None])
@pytest.mark.parametrize(
    "degrees",
    [
        mesh.Degrees(context=2),
        pytest.param(
            mesh.Degrees(context=2, tensor=2), marks=pytest.mark.skipif(GPUS < 4, reason="needs 4 GPUs")
        ),
    ],
    ids=str,
)
def test_loss_and_gradients_are_those_of_fp64_and_the_same_twice(
    degrees: mesh.Degrees, layout: str | None, dtype: torch.dtype
) -> None:
    for errors in run_distributed(_errors, degrees.world, degrees, layout, dtype, timeout=240):
        assert len(errors) > 20
        for name, error in errors.items():
            assert error < BOUNDS[dtype], (name, error)
