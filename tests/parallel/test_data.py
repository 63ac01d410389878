"""FSDP2 with this engine's collectives plugged in."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from flashtrain.comm import collectives, into, transport
from flashtrain.comm.transport.base import Exchange
from flashtrain.errors import UserError
from flashtrain.kernels.ordered_sum import choice
from flashtrain.models.decoder import Decoder
from flashtrain.parallel import apply, data, mesh
from flashtrain.parallel.mesh import DATA
from tests.distributed import run_distributed


def poison() -> None:
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True


def _collectives(rank: int, world: int) -> list[str]:
    """The two hooks called as FSDP2 calls them."""
    poison()
    failures = []
    group = dist.group.WORLD
    gather, scatter = data.ScheduledAllGather("layer (data)"), data.ScheduledReduceScatter("layer (data)")
    elsewhere: list[str] = []
    real = Exchange.landing_buffer

    def landing_buffer(exchange: Exchange, *arguments: Any) -> torch.Tensor:
        elsewhere.append(exchange.schedule.op)
        return real(exchange, *arguments)

    Exchange.landing_buffer = landing_buffer
    for mover, kind, subchunks in (
        ("host", "direct", 1), ("group", "direct", 1), ("host", "direct", 2), ("host", "ring", 2)
    ):  # fmt: skip
        transport.configure(transport.Settings(transport=mover, kind=kind, subchunks=subchunks))
        traffic = transport.of(group.group_name, torch.device("cpu")).traffic
        for dtype in (torch.float32, torch.bfloat16):
            generator = torch.Generator().manual_seed(3)
            shards = torch.randn(world, 7, generator=generator).to(dtype)
            whole = gather.allocate([7 * world], dtype=dtype, device=torch.device("cpu"))
            wanted = torch.empty_like(whole)
            dist.all_gather_into_tensor(wanted, shards[rank])
            if gather(whole, shards[rank], group) is not None or not torch.equal(whole, wanted):
                failures.append(f"{mover} {dtype} gather")
            # 7 elements to each peer, however many ranks: what the schedule sends and nothing else.
            if traffic.bytes_sent != 7 * (world - 1) * dtype.itemsize:
                failures.append(f"{mover} {dtype} gather sent {traffic.bytes_sent} bytes")
            traffic.reset()

            gradients = torch.randn(world, 7 * world, generator=generator).to(dtype)
            exact = gradients.double().sum(dim=0)[rank * 7 : (rank + 1) * 7]
            size = gradients.double().abs().sum(dim=0)[rank * 7 : (rank + 1) * 7]
            for op, scale in ((dist.ReduceOp.SUM, 1.0), (dist.ReduceOp.AVG, 1.0 / world)):
                own = scatter.allocate([7], dtype=dtype, device=torch.device("cpu"))
                scatter(own, gradients[rank].clone(), group, op)
                rounded = exact.abs() if kind == "direct" else size  # a ring rounds on its way
                bound = torch.finfo(dtype).eps * rounded * scale + 1e-6 * size
                if not bool(((own.double() - exact * scale).abs() <= bound).all()):
                    failures.append(f"{mover} {dtype} {op}")
                if traffic.bytes_sent != 7 * (world - 1) * dtype.itemsize:
                    failures.append(f"{mover} {dtype} {op} sent {traffic.bytes_sent} bytes")
                traffic.reset()
            # Into memory of any kind, which takes a copy.
            strided = torch.empty(2, 7 * world, dtype=torch.float64).t()[:, 0]
            into.all_gather(strided, shards[rank], group.group_name)
            summed = torch.empty(2, 7, dtype=torch.float64).t()[:, 0]
            into.reduce_scatter(summed, gradients[rank], group.group_name, "", 1.0 / world)
            if not torch.equal(strided, wanted.double()) or not torch.equal(summed, own.double()):
                failures.append(f"{mover} {dtype} into other memory")
            traffic.reset()
        if "all_gather" in elsewhere:
            failures.append(f"{mover} {kind}: what is gathered lands elsewhere, and is copied")
        elsewhere.clear()
    try:
        into.all_gather(torch.empty(4 * world), torch.empty(3), group.group_name)
        failures.append("a shard of 3 of 4 rows was accepted")
    except UserError as error:
        if "holds 3 rows, but its share" not in str(error):
            failures.append(str(error))
    for op in (dist._make_nccl_premul_sum(0.5), dist.ReduceOp.MAX, dist.ReduceOp.PRODUCT):
        try:
            scatter(torch.empty(2), torch.ones(2 * world), group, op)
            failures.append(f"{op} was accepted")
        except NotImplementedError as error:
            if "by sum or mean" not in str(error) or "for another divisor call" not in str(error):
                failures.append(str(error))
    return failures


@pytest.mark.parametrize("world", [2, 3])
def test_hooks_equal_the_collectives_that_they_replace(world: int) -> None:
    assert run_distributed(_collectives, world) == [[]] * world


def _sharded(rank: int, world: int, dtype: torch.dtype) -> tuple[list[str], list[tuple[str, str]], int]:
    poison()
    transport.configure(transport.Settings(transport="host"))
    called: list[tuple[str, str]] = []
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(6, 10), nn.Linear(10, 5), nn.Linear(5, 3)).to(dtype)
    model = nn.Sequential(nn.Linear(6, 10), nn.Linear(10, 5), nn.Linear(5, 3)).to(dtype)
    model.load_state_dict(plain.state_dict())
    ranks = mesh.build(mesh.Degrees(data=world), "cpu")
    data.shard(model, list(model)[:2], ranks[DATA])
    mover = transport.of(ranks[DATA].get_group().group_name, torch.device("cpu"))
    real = mover.open

    def open(schedule: Any, site: str) -> Any:
        called.append((schedule.op, site))
        return real(schedule, site)

    mover.open = open
    inputs = torch.randn(world, 4, 6).to(dtype)
    written: list[int] = []
    add = choice.ordered_sum

    def ordered_sum(slots: torch.Tensor, scale: float, **options: Any) -> torch.Tensor:
        assert scale == 1.0 / world, "FSDP2 would divide by itself, in a pass of its own"
        written.append(options["out"].data_ptr())
        return add(slots, scale, **options)

    choice.ordered_sum = ordered_sum
    model(inputs[rank]).square().mean().backward()
    choice.ordered_sum = add
    found = {parameter.grad.to_local().untyped_storage().data_ptr() for parameter in model.parameters()}
    assert found == set(written), "a sum was copied before it became a gradient"

    gradients: dict[str, list[torch.Tensor]] = {}
    for part in inputs:  # the mean over ranks of gradients that each rank has rounded to its dtype
        plain.zero_grad()
        plain(part).square().mean().backward()
        for name, parameter in plain.named_parameters():
            gradients.setdefault(name, []).append(parameter.grad.double())
    failures = []
    for name, parameter in model.named_parameters():
        wanted = torch.stack(gradients[name]).mean(dim=0)
        actual = parameter.grad.full_tensor().double()
        relative, absolute = 3 * torch.finfo(dtype).eps, 1e-6 if dtype == torch.float32 else 1e-3
        if not torch.allclose(actual, wanted, relative, absolute):
            failures.append(f"{name}: off by {(actual - wanted).abs().max().item()}")
    return failures, called, mover.traffic.bytes_sent


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fsdp_gathers_and_reduces_through_the_schedules(dtype: torch.dtype) -> None:
    answers = run_distributed(_sharded, 3, dtype)
    for failures, called, sent in answers:
        assert not failures
        assert called == answers[0][1], "ranks that call in different orders wait for one another for ever"
        blocks = ["0 (data)", "1 (data)"]
        gathered = [site for op, site in called if op == "all_gather"]
        reduced = [site for op, site in called if op == "reduce_scatter"]
        # Forward gathers the root, then each block; backward gathers the blocks again, last one first.
        assert gathered == ["model (data)", *blocks, *reversed(blocks)]
        assert sorted(reduced) == [*blocks, "model (data)"]
        assert sent > 0


def _of_decoder(rank: int, world: int, tied: bool, prefetch: int) -> list[tuple[str, str]]:
    transport.configure(transport.Settings(transport="host"))
    called: list[tuple[str, str]] = []
    config = Decoder.Config(hidden=16, layers=2, heads=2, kv_heads=2, mlp_width=64, tied_embeddings=tied)
    ranks = mesh.build(mesh.Degrees(data=world), "cpu")
    model = apply.parallelize(Decoder(config), ranks, sharding=data.Sharding(prefetch=prefetch))
    mover = transport.of(ranks[DATA].get_group().group_name, torch.device("cpu"))
    real = mover.open

    def open(schedule: Any, site: str) -> Any:
        called.append((schedule.op, site.removesuffix(" (data)")))
        return real(schedule, site)

    mover.open = open
    model(*torch.randint(config.vocabulary, (2, 8, 1))).backward()
    return called


@pytest.mark.parametrize("prefetch", [1, 2])
@pytest.mark.parametrize("tied", [False, True])
def test_a_step_waits_for_one_end_of_the_model_at_a_time(tied: bool, prefetch: int) -> None:
    """Embedding and head are gathered once, the head behind the last block; a table that is both, at once."""
    ends = [] if tied else ["embedding", "head"]
    forward = ["model", *ends[:1], "layers.0", "layers.1", *ends[1:]]
    for called in run_distributed(_of_decoder, 2, tied, prefetch):
        assert [site for op, site in called if op == "all_gather"] == [*forward, "layers.1", "layers.0"]
        reduced = [site for op, site in called if op == "reduce_scatter"]
        assert sorted(reduced) == sorted(forward)
        assert reduced[:1] == (["layers.1"] if tied else ["head"])


def _matches_reference(rank: int, world: int) -> bool:
    """A gradient is the ordered fp32 sum of what the ranks hold, scaled and rounded once."""
    transport.configure(transport.Settings(transport="host"))
    gradients = torch.randn(world, 5 * world, generator=torch.Generator().manual_seed(0)).bfloat16()
    own = collectives.reduce_scatter(gradients[rank], dist.group.WORLD.group_name, "", 1 / world)
    mine = gradients[:, rank * 5 : (rank + 1) * 5].float()
    return torch.equal(own, ((mine[0] + mine[1] + mine[2]) * (1 / world)).bfloat16())


def test_means_are_added_in_rank_order_and_rounded_once() -> None:
    assert run_distributed(_matches_reference, 3) == [True] * 3
