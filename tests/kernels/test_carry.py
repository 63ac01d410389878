"""Carriers: what every rank has to send is at its peers, flags and all; in the interpreter, or on one GPU."""

import threading
import time
from typing import Any

import pytest
import torch
from torch import Tensor

from flashtrain.comm import schedule
from flashtrain.comm.schedule import Schedule
from flashtrain.comm.transport.landing import Landing
from tests.kernels.interpreter import DEVICE, ON_GPU, load

modules = load()
carried = modules.carried
carry, kernels, prepared = modules.carry, modules.kernels, modules.prepared
Config, Part = modules.config.Config, modules.plan.Part

EPOCH, COLUMNS = 7, 16
TILE = Config(64, 64, 32, 2, 4, group=2) if ON_GPU else Config(16, 32, 16, 2, 4, group=2)
ROWS = [[24, 24], [17, 16, 15, 16], [20, 0, 45], [0, 33, 0], [1, 1]]


def words(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.int32, device=DEVICE)


class Ranks:
    """Landing buffers and flags of all ranks on one device, and carriers of each."""

    def __init__(self, plans: list[Schedule], width: int) -> None:
        self.plans, self.world, self.width = plans, len(plans), width
        heights = [Landing(plan).rows(plan.rank) for plan in plans]
        self.landed = [torch.full((rows, width), float("nan")).half().to(DEVICE) for rows in heights]
        self.flags, self.told = ([words(self.world, COLUMNS) for _ in plans] for _ in range(2))
        self.counters = words(COLUMNS)

    def carry(
        self, rank: int, source: Tensor, cargos: list[Any], blocks: int, ready: Tensor, teams: int
    ) -> None:
        places = [
            [landed.data_ptr() for landed in self.landed],
            *([table[rank].data_ptr() for table in tables] for tables in (self.flags, self.told)),
        ]
        directory = torch.tensor(places, dtype=torch.int64, device=DEVICE)
        every = self.plans[rank].gathers
        carrier = carry.Carrier(
            cargos, blocks, every=every, teams=teams, rank=rank, world=self.world, device=torch.device(DEVICE)
        )
        values = {
            "source": source.view(torch.int32), "directory": directory, "counters": self.counters,
            "ready": ready, "stop": words(1), "cargos": carrier.cargos, "epoch": EPOCH,
            "messages": len(cargos), "rank": rank,
        }  # fmt: skip
        if carrier.launch is None:
            carry.carry_kernel[(blocks,)](*(values[name] for name in carrier.names), **carrier.constants)
        else:
            given = [v.data_ptr() if isinstance(v, Tensor) else v for v in map(values.get, carrier.names)]
            carrier.launch.start(blocks, torch.cuda.current_stream().cuda_stream, given)
            torch.cuda.synchronize()
        assert not self.counters.any()


def contribution(plan: Schedule, chunk: int, source: int, width: int) -> Tensor:
    _, offset, rows = plan.chunks[chunk]
    grid = torch.arange(rows)[:, None] * 8 + torch.arange(width)[None] + 100 * offset + 1000 * source
    return (grid % 2039).half().to(DEVICE)


def assert_arrived(ranks: Ranks, messages: int) -> None:
    for plan, landed, flags, told in zip(ranks.plans, ranks.landed, ranks.flags, ranks.told, strict=True):
        where = Landing(plan)
        for expect in (expect for step in plan.steps for expect in step.expects):
            found = landed[where.span(plan.rank, expect.chunk, expect.slot)]
            assert torch.equal(found, contribution(plan, expect.chunk, expect.src, ranks.width)), expect
        for table in (flags, told):
            for peer in range(ranks.world):
                up = [EPOCH if peer != plan.rank and column < messages else 0 for column in range(COLUMNS)]
                assert table[peer].tolist() == up


@pytest.mark.parametrize(("subchunks", "parts", "blocks"), [(1, 1, 1), (2, 1, 5), (1, 2, 4), (3, 2, 2)])
@pytest.mark.parametrize("rows", ROWS)
def test_every_peer_gets_all_rows_of_a_rank(rows: list[int], subchunks: int, parts: int, blocks: int) -> None:
    inner = 40
    plans = [schedule.all_gather(rows, rank, subchunks=subchunks, in_turn=True) for rank in range(len(rows))]
    ranks = Ranks(plans, inner)
    w = torch.randint(-4, 5, (32, inner)).half().to(DEVICE)
    whole = torch.cat(
        [contribution(plans[0], c, plans[0].chunks[c].owner, inner) for c in range(len(plans[0].chunks))]
    )
    expected = torch.empty(sum(rows), 32, dtype=torch.float16, device=DEVICE)
    kernels.matmul(whole % 16, w, expected, config=TILE)
    for plan in plans:
        own = whole[plan.own_rows].clone()
        kernel = gather(plan, own, whole, w, parts)
        cargos = carried.gathered(plan, 2 * inner, kernel.column_ranges(parts))
        assert len(cargos) == subchunks * parts
        ranks.carry(plan.rank, own, cargos, blocks, words(1), teams=2)
    assert_arrived(ranks, subchunks * parts)
    for plan, landed, flags in zip(plans, ranks.landed, ranks.flags, strict=True):
        own = whole[plan.own_rows] % 16
        kernel = gather(plan, own, whole, w, parts)
        out = torch.full_like(expected, float("nan"))
        kernel(own, landed.remainder(16), w, flags, EPOCH, out)
        assert torch.equal(out, expected)


def gather(plan: Schedule, own: Tensor, whole: Tensor, w: Tensor, parts: int) -> Any:
    chunks = []
    for step in plan.steps:
        owner, offset, rows = plan.chunks[step.compute]
        column = step.compute % plan.subchunks * parts
        chunks.append(Part(owner * COLUMNS + column, offset, rows, owner == plan.rank))
    out = torch.empty(whole.shape[0], w.shape[0], dtype=whole.dtype, device=DEVICE)
    return prepared.GatherMatmul(own, whole, w, out, tuple(chunks), parts=parts, config=TILE)


@pytest.mark.parametrize(("subchunks", "blocks"), [(1, 1), (2, 5), (3, 3)])
@pytest.mark.parametrize("rows", ROWS)
def test_every_owner_gets_its_partials(rows: list[int], subchunks: int, blocks: int) -> None:
    width = 24
    plans = [
        schedule.reduce_scatter(rows, rank, subchunks=subchunks, in_turn=True) for rank in range(len(rows))
    ]
    ranks = Ranks(plans, width)
    for plan in plans:
        partials = torch.cat([contribution(plan, c, plan.rank, width) for c in range(len(plan.chunks))])
        ready = words(len(plan.steps))
        ready[: len(plan.steps) - subchunks] = EPOCH  # the own ones, last, are nobody's to carry
        cargos = carried.scattered(plan, 2 * width)
        ranks.carry(plan.rank, partials, cargos, blocks, ready, teams=len(rows) - 1)
    assert_arrived(ranks, subchunks)


@pytest.mark.skipif(ON_GPU, reason="there the tests of the transport have late products")
def test_a_carrier_waits_until_its_partial_is_ready() -> None:
    """Another thread fills in the partials and only then says so."""
    rows, width = [24, 24], 24
    plans = [schedule.reduce_scatter(rows, rank, in_turn=True) for rank in range(2)]
    ranks, ready = Ranks(plans, width), words(2)
    whole = torch.cat([contribution(plans[0], chunk, 0, width) for chunk in range(2)])
    partials = torch.full_like(whole, float("nan"))

    def compute() -> None:
        time.sleep(0.2)
        partials.copy_(whole)
        ready.fill_(EPOCH)

    product = threading.Thread(target=compute)
    product.start()
    ranks.carry(0, partials, carried.scattered(plans[0], 2 * width), 1, ready, teams=1)
    product.join()
    assert torch.equal(ranks.landed[1][: rows[1]], whole[rows[0] :])
