"""FSDP2 on real GPUs: it reads what was gathered where it landed, and the bits are those of copies."""

import os
import random
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from flashtrain.comm import into, transport
from flashtrain.comm.transport.nvlink import NvlinkTransport
from flashtrain.parallel import data
from tests.distributed import run_distributed

GPUS = torch.cuda.device_count()
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(GPUS < 2, reason="needs two GPUs that reach each other's memory"),
]
WORLDS = [pytest.param(w, marks=pytest.mark.skipif(w > GPUS, reason=f"needs {w} GPUs")) for w in (2, 4)]
WIDTHS = (1024, 4099, 2048, 4099, 2048, 777, 1024)
STEPS = 12


def _train(rank: int, mesh: DeviceMesh, sharding: data.Sharding) -> list[Tensor]:
    """Losses, and this rank's weights after the last step; ranks copy out late, each at other units."""
    torch.manual_seed(0)
    layers = [nn.Linear(here, there) for here, there in pairwise(WIDTHS)]
    model = nn.Sequential(*layers).to("cuda", torch.bfloat16)
    data.shard(model, layers[:-1], mesh, sharding)
    delays = random.Random(rank)

    def late(*_: Any) -> None:
        torch.cuda._sleep(delays.choice((0, 0, 200_000, 4_000_000)))  # cycles: up to some milliseconds

    for layer in layers:
        layer.register_forward_pre_hook(late, prepend=True)  # before FSDP2 copies out
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    found: list[Tensor] = []
    for step in range(STEPS):
        x = torch.randn(512, WIDTHS[0], generator=torch.Generator().manual_seed(100 * step + rank))
        x = x.to("cuda", torch.bfloat16)
        if step % 3 == 2:
            with torch.no_grad():
                found.append(model(x).float().square().mean())
            data.release(model)
        loss = model(x).float().square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.detach())
    found += [parameter.to_local().detach().clone() for parameter in model.parameters()]  # type: ignore[attr-defined]
    torch.cuda.synchronize()
    return found


def _both(rank: int, world: int, prefetch: int, connections: str) -> dict[str, Any]:
    os.environ["CUDA_DEVICE_MAX_CONNECTIONS"] = connections  # read when CUDA starts
    torch.cuda.set_device(rank)
    landed = {"in place": 0, "copied": 0}
    begin_early, output = NvlinkTransport.begin_early, into.output

    def counted(mover: NvlinkTransport, messages: Any, sources: Any, site: str, out: Any = None) -> bool:
        lent = begin_early(mover, messages, sources, site, out)
        if out is not None:
            landed["in place" if lent else "copied"] += 1
        return lent

    NvlinkTransport.begin_early = counted  # type: ignore[method-assign]
    results = []
    for lends in (True, False):
        transport.configure(transport.Settings(transport="nvlink", timeout=30.0))
        into.output = output if lends else lambda *_, **__: None
        mesh = DeviceMesh.from_group(dist.new_group(), "cuda", mesh_dim_names=("data",))
        results.append(_train(rank, mesh, data.Sharding(prefetch=prefetch)))
        dist.barrier()
    first, second = results
    wrong = [number for number, (a, b) in enumerate(zip(first, second, strict=True)) if not torch.equal(a, b)]
    finite = all(bool(one.isfinite().all()) for one in first)
    torch.cuda.synchronize()
    dist.barrier()
    transport.shutdown()
    return {"wrong": wrong, "finite": finite, **landed}


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize(("prefetch", "connections"), [(1, "8"), (1, "1"), (2, "8"), (3, "32")])
def test_bits_of_outputs_in_place_are_those_of_copies(world: int, prefetch: int, connections: str) -> None:
    for result in run_distributed(_both, world, prefetch, connections, timeout=120):
        assert result["finite"]
        assert result["wrong"] == []
        # All of the one run, and all of the other.
        assert result["in place"] == result["copied"] > STEPS * 2 * len(WIDTHS[2:])
