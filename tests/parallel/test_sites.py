"""The survey of sites says what really runs: it is held against what the ops were asked for."""

from dataclasses import replace
from types import ModuleType
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

from flashtrain.comm import collectives, into, ops, transport
from flashtrain.models.decoder import Decoder
from flashtrain.parallel import tensor
from flashtrain.parallel.apply import parallelize
from flashtrain.parallel.mesh import DATA, TENSOR
from flashtrain.parallel.sites import Site, survey
from tests.distributed import run_distributed

CPU = torch.device("cpu")
TINY = Decoder.Config(vocabulary=64, hidden=32, layers=2, heads=4, kv_heads=2, mlp_width=128)


def surveyed(
    rank: int, world: int, dimension: str, settings: transport.Settings, rows: int
) -> tuple[list[Site], dict[str, bool]]:
    """The survey, and for each site that communicated in one pass whether a product ran beside it."""
    transport.configure(settings)
    other = DATA if dimension == TENSOR else TENSOR
    shape = (1, world) if dimension == TENSOR else (world, 1)
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=(DATA, TENSOR))
    assert mesh[other].size() == 1
    model = Decoder(TINY, torch.Generator().manual_seed(0))
    parallelize(model, mesh)
    sites = survey(model, mesh, rows, CPU)
    ran: dict[str, bool] = {}

    def spy(module: ModuleType, name: str, with_product: bool) -> None:
        real = getattr(module, name)

        def seen(*args: Any, **kwargs: Any) -> Any:
            position = 2 if module is collectives else 3
            site = kwargs.get("site") or args[position]
            ran[site] = ran.get(site, False) or with_product
            return real(*args, **kwargs)

        setattr(module, name, seen)

    for name in ("all_gather", "reduce_scatter"):
        spy(collectives, name, with_product=False)
        spy(into, name, with_product=False)
    for name in ("all_gather_matmul", "matmul_reduce_scatter"):
        spy(ops, name, with_product=True)
    tokens = torch.arange(rows).reshape(rows, 1) % 64
    model(tokens, tokens).backward()
    transport.shutdown()
    return sites, ran


def test_tensor_sites_are_what_the_ops_do() -> None:
    results = run_distributed(surveyed, 2, TENSOR, transport.Settings(transport="group"), 8)
    (sites, ran), (others, _) = results
    assert sites == others
    at_end = {"replicated gradients", "gradient norm"}
    assert {site.name for site in sites} - at_end == set(ran)
    assert {site.name: site.overlapped for site in sites if site.name not in at_end} == ran
    assert sum(ran.values()) == 4 * TINY.layers + 1
    down = next(site for site in sites if site.name == "layers.1.mlp.down")
    assert down.why.startswith("2 chunks of 4 rows, moved by group")
    assert replace(down, why="") == Site(
        name="layers.1.mlp.down",
        product="[8, 128] x [128, 32]",
        forward="product, then reduce-scatter",
        backward="all-gather, then product, which serves the weight gradient too",
        overlapped=True,
        why="",
    )
    embedding = next(site for site in sites if site.name == "embedding")
    assert (embedding.overlapped, embedding.why) == (False, "a look-up: there is no product beside it")


def test_data_sites_are_what_the_ops_do() -> None:
    (sites, ran), _ = run_distributed(surveyed, 2, DATA, transport.Settings(transport="group"), 8)
    at_end = {"gradient norm", "mean loss"}
    assert {site.name for site in sites} - at_end == set(ran)
    assert not any(ran.values())
    assert not any(site.overlapped for site in sites)
    block = next(site for site in sites if site.name == "layers.0 (data)")
    assert "FSDP2 waits for it" in block.why


def unusual(rank: int, world: int) -> list[Site]:
    """A layer that the plan leaves out, fewer rows than ranks, and a gather that is kept."""
    transport.configure(transport.Settings(transport="group", keep_gather=True, subchunks=3))
    mesh = init_device_mesh("cpu", (world,), mesh_dim_names=(TENSOR,))
    model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 4))
    parallelize(model, mesh, plan={"0": tensor.ColumnParallel()})
    found = [*survey(model, mesh, 5, CPU), *survey(model, mesh, 1, CPU)]
    transport.shutdown()
    return found


def test_what_is_not_overlapped_says_why() -> None:
    cut, whole, _, _, short, *_ = run_distributed(unusual, 2)[0]
    assert (cut.overlapped, cut.why[:51]) == (True, "2 chunks of 2 rows or one more, each in 3 pieces, m")
    assert cut.backward.endswith("weight gradient from the gather that was kept")
    assert (whole.overlapped, whole.why) == (False, "whole on every rank, on its own rows alone")
    assert (short.overlapped, short.why) == (False, "1 rows over 2 ranks: some have no chunk to compute")


def alone(rank: int, world: int) -> list[Site]:
    mesh = init_device_mesh("cpu", (1, 1), mesh_dim_names=(DATA, TENSOR))
    model = Decoder(TINY)
    return survey(parallelize(model, mesh), mesh, 8, CPU)


def test_one_rank_has_no_site() -> None:
    assert run_distributed(alone, 1) == [[]]
