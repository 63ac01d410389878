"""Branches on a GPU each against both in fp64 on the CPU: loss and every gradient, twice the same bits."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from flashtrain.checkpoint.blocks import block_of
from flashtrain.comm import transport
from flashtrain.models.decoder import Decoder
from flashtrain.parallel import apply, mesh
from tests.distributed import run_distributed
from tests.nn.test_hybrid_gpu import BOUNDS, CONFIG, LAYOUTS, gradients
from tests.parallel.test_apply import step
from tests.parallel.test_branches import held

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs that reach each other's memory"),
]


def _errors(rank: int, world: int, layout: str, dtype: torch.dtype, length: int) -> dict[str, float]:
    """The relative error of the loss and of each gradient on this rank; inf where a second run differs."""
    torch.cuda.set_device(rank)
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    transport.configure(transport.Settings(transport="nvlink", timeout=60.0, tune=False))
    ranks = mesh.build(mesh.Degrees(branches=2), "cuda")
    config = replace(CONFIG, layout=LAYOUTS[layout])
    drawn = torch.randint(0, 256, (2, length, 2), generator=torch.Generator().manual_seed(1))
    plain = Decoder(config, torch.Generator().manual_seed(0)).to(dtype)
    wide = Decoder(config).double()
    wide.load_state_dict(plain.state_dict())
    true = gradients(wide, *drawn)
    runs: list[dict[str, Tensor]] = []
    for _ in range(2):
        model = Decoder(config, torch.Generator().manual_seed(0)).to(dtype).cuda()
        apply.parallelize(model, ranks, by_branches=True)
        loss = step(model, ranks, *drawn.cuda())
        runs.append({"loss": loss} | {name: p.grad for name, p in held(model).items()})
    found: dict[str, Any] = {}
    for name, one in runs[0].items():
        first, second = block_of(name, one), block_of(name, runs[1][name])
        assert first is not None
        assert second is not None
        wanted = true[name]
        for dim, start in enumerate(first.offset):
            wanted = wanted.narrow(dim, start, first.local.shape[dim])
        error = (first.local.double().cpu() - wanted).norm() / wanted.norm()
        found[name] = float(error) if torch.equal(first.local, second.local) else float("inf")
    transport.shutdown()
    return found


@pytest.mark.parametrize("dtype", list(BOUNDS))
@pytest.mark.parametrize("layout", ["parallel", "circulating", "mixers", "mamba1"])
def test_loss_and_gradients_are_those_of_fp64_and_the_same_twice(layout: str, dtype: torch.dtype) -> None:
    length = 333 if layout == "parallel" else 384
    for errors in run_distributed(_errors, 2, layout, dtype, length, timeout=240):
        assert len(errors) > 20
        for name, error in errors.items():
            assert error < BOUNDS[dtype], (name, error)
