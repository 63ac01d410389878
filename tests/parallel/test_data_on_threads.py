"""FSDP2 over nvlink transports: it reads what was gathered where it landed, in time. GPUs made of threads."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist

from flashtrain.comm import transport
from flashtrain.models.decoder import Decoder
from flashtrain.parallel import apply, data, mesh
from tests.comm.transport import fake_gpu, fake_ranks
from tests.distributed import run_distributed

pytest.importorskip("flashtrain._core", reason="the C++ extension is not built")


def _train(degrees: mesh.Degrees, sharding: data.Sharding, between: Callable[[Any], None]) -> dict[str, Any]:
    """Weights after some steps, with forward passes alone between them, and the losses."""
    config = Decoder.Config(hidden=20, layers=2, heads=2, kv_heads=2, mlp_width=128)
    torch.manual_seed(0)
    model = apply.parallelize(Decoder(config), mesh.build(degrees, "cpu"), sharding=sharding)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    for _ in range(2):
        between(model)
        tokens = torch.randint(config.vocabulary, (2, 8, 2))
        with torch.no_grad():
            losses.append(float(model(*tokens)))
        data.release(model)
        loss = model(*tokens)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    weights = {name: p.to_local().detach().clone() for name, p in model.named_parameters()}  # type: ignore[union-attr]
    return {"losses": torch.tensor(losses), **weights}


def _hold(model: Any) -> None:
    """What no pass does: gather a unit long before it runs."""
    model.layers[1].unshard(async_op=True)


def _nothing(_: Any) -> None: ...


# Sharding, what comes before each forward pass, bytes of the arena; how many landing buffers it has then, for
# how many of 24 gathers FSDP2 asks for one, and how many land there.
CASES: dict[str, tuple[data.Sharding, Callable[[Any], None], int, tuple[int, int, int]]] = {
    "resharded": (data.Sharding(), _nothing, 1 << 30, (3, 24, 24)),
    "kept": (data.Sharding(reshard=False), _nothing, 1 << 30, (3, 20, 20)),
    "two ahead": (data.Sharding(prefetch=2), _nothing, 1 << 30, (4, 24, 24)),
    # Once it has moved, a unit of three gathers a step asks no more.
    "held": (data.Sharding(), _hold, 1 << 30, (3, 19, 19)),
    "a small budget": (data.Sharding(), _nothing, 4 << 20, (2, 24, 0)),
}


def _cases(rank: int, world: int, tensor: int, names: list[str], driver: str) -> list[str]:
    degrees, real, failures = mesh.Degrees(data=world // tensor, tensor=tensor), transport._choose, []
    transport.configure(transport.Settings(transport="host"))
    wanted = _train(degrees, data.Sharding(), _nothing)
    for name in names:
        sharding, between, budget, expected = CASES[name]
        made: list[fake_ranks.Eager] = []

        def choose(
            group: dist.ProcessGroup,
            device: torch.device,
            buffers: int = 2,
            made: list[fake_ranks.Eager] = made,
            budget: int = budget,
        ) -> Any:
            first, second, *_ = dist.get_process_group_ranks(group)
            if second - first < tensor:  # neighbours compute together
                return real(group, device)
            made.append(fake_ranks.connect(group, driver, buffers, arena_bytes=budget))
            return made[-1]

        transport.configure(transport.Settings(transport="host"))  # chooses anew
        transport._choose = choose
        actual = _train(degrees, sharding, between)
        transport._choose = real
        failures += [f"{name}: {key}" for key in wanted if not torch.equal(wanted[key], actual[key])]
        lends = [(m.arena.buffers, m.asked, m.direct) for m in made if m.loans is not None]
        if lends != [expected] or len(made) != 2:
            failures.append(f"{name}: {lends}, {expected} expected; {len(made)} transports")
    return failures


@pytest.mark.parametrize(
    ("world", "tensor", "names"), [(2, 1, [*CASES]), (3, 1, ["resharded"]), (4, 2, ["resharded"])]
)
def test_fsdp_reads_what_was_gathered_where_it_landed(world: int, tensor: int, names: list[str]) -> None:
    """To the bits of another transport; what peers may write is poisoned as soon as they may."""
    assert run_distributed(_cases, world, tensor, names, fake_gpu.driver()) == [[]] * world
