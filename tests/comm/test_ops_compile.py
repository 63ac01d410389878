"""The ops under torch.compile, opcheck, fake tensors, meta tensors and a fake group of 64 ranks."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from flashtrain.comm import collectives, ops, transport
from flashtrain.models.decoder import Decoder
from flashtrain.parallel import apply, mesh
from tests.distributed import run_distributed


@pytest.fixture
def one_rank() -> Iterator[str]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.group.WORLD.group_name
    transport.shutdown()
    dist.destroy_process_group()


@pytest.fixture(params=[0, 3, 63])
def rank_of_64(request: pytest.FixtureRequest) -> Iterator[int]:
    """One rank of a group whose peers do not exist: messages arrive at once and hold nothing."""
    dist.init_process_group("fake", store=FakeStore(), rank=request.param, world_size=64)
    yield request.param
    transport.shutdown()
    dist.destroy_process_group()


def samples(rank: int, world: int, group: str) -> list[tuple[Any, tuple[Any, ...]]]:
    """Arguments of every op, ragged ones among them."""

    def normal(*shape: int, grad: bool = True) -> Tensor:
        return torch.randn(*shape, generator=generator).requires_grad_(grad)

    def plain(*shape: int) -> Tensor:
        return normal(*shape, grad=False)

    generator = torch.Generator().manual_seed(rank)
    rows = 2 * world + 1
    mine = 2 + (rank == 0)
    return [
        (collectives.all_gather, (normal(mine, 2, 3), group, "site", rows)),
        (collectives.all_gather, (normal(4, 3), group)),
        (collectives.reduce_scatter, (normal(rows, 2, 3), group, "site", 0.5)),
        (ops._registered_gather, (normal(mine, 6), normal(5, 6), group, "site", rows)),
        (ops._registered_gather, (normal(4, 6), normal(5, 6), group, "site", None, True)),
        (ops._registered_gather, (normal(mine, 6), normal(5, 6), group, "site", rows, False, False)),
        (ops._registered_scatter, (normal(rows, 6), normal(5, 6), group, "site")),
        (ops._registered_column, (plain(rows, 4), plain(mine, 6), plain(4, 6), group)),
        (ops._registered_column, (plain(rows, 4), plain(rows, 6), plain(4, 6), group, "site", True)),
        (ops._registered_row, (plain(mine, 4), plain(rows, 6), plain(4, 6), group)),
    ]


def _opcheck(rank: int, world: int) -> None:
    for op, arguments in samples(rank, world, dist.group.WORLD.group_name):
        torch.library.opcheck(op, arguments)


def test_opcheck_on_one_rank(one_rank: str) -> None:
    _opcheck(0, 1)


def test_opcheck_on_two_ranks() -> None:
    run_distributed(_opcheck, 2)


def mlp(x: Tensor, up: Tensor, down: Tensor, group: str, rows: int) -> Tensor:
    y, _ = ops.all_gather_matmul(x, up, group, "up", rows)
    return ops.matmul_reduce_scatter(torch.nn.functional.silu(y), down, group, "down")


def _compiled(rank: int, world: int, dynamic: bool) -> list[str]:
    group, different = dist.group.WORLD.group_name, []
    # aot_eager runs the traced forward and backward graphs, operator by operator, without a code generator.
    compiled = torch.compile(mlp, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for rows in (8, 7, 12) if dynamic else (8, 7):
        generator = torch.Generator().manual_seed(rows)
        x = torch.randn(rows, 16, generator=generator).tensor_split(world)[rank]
        up = torch.randn(world, 8, 16, generator=generator)[rank]
        down = torch.randn(world, 16, 8, generator=generator)[rank]
        upstream = torch.randn(rows, 16, generator=generator).tensor_split(world)[rank]
        results = []
        for run in (mlp, compiled):
            leaves = [t.clone().requires_grad_() for t in (x, up, down)]
            z = run(*leaves, group, rows)
            z.backward(upstream)
            results.append([z.detach(), *(leaf.grad for leaf in leaves)])
        for name, eager, traced in zip(("z", "dx", "d up", "d down"), *results, strict=True):
            if not torch.equal(eager, traced):
                different.append(f"M={rows}: {name}")
    return different


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_layers_give_the_bits_of_eager_ones(dynamic: bool) -> None:
    assert run_distributed(_compiled, 2, dynamic) == [[], []]


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_shapes_at_64_ranks(rank_of_64: int, device: str) -> None:
    group = dist.group.WORLD.group_name
    rows, mine = 100, 2 if rank_of_64 < 36 else 1  # tensor_split: the first 100 - 64 get one more

    def leaf(*shape: int) -> Tensor:
        return torch.zeros(*shape, device=device, requires_grad=True)

    x, w, a, v = leaf(mine, 16), leaf(8, 16), leaf(rows, 8), leaf(16, 8)
    y, x_full = ops.all_gather_matmul(x, w, group, "", rows)
    z = ops.matmul_reduce_scatter(a, v, group)
    assert (y.shape, x_full.shape, z.shape) == ((rows, 8), (rows, 16), (mine, 16))
    (y.sum() + x_full.sum() + z.sum()).backward()
    assert all(t.grad.shape == t.shape and t.grad.device.type == device for t in (x, w, a, v))
    assert collectives.all_gather(x, group, "", rows).shape == (rows, 16)
    assert collectives.reduce_scatter(a, group).shape == (mine, 8)
    assert collectives.all_reduce(a, group).shape == a.shape


def wide_decoder() -> Decoder:
    """The smallest of its kind that 64 divides."""
    return Decoder(Decoder.Config(hidden=128, layers=2, heads=64, kv_heads=64, mlp_width=64 * 64))


def local_shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {
        name: tuple(p.to_local().shape if isinstance(p, DTensor) else p.shape)
        for name, p in model.named_parameters()
    }


def one_pass(model: nn.Module, degrees: mesh.Degrees, device: str, sequence: int) -> Tensor:
    ranks = mesh.build(degrees, "cpu")
    apply.parallelize(model, ranks)
    tokens = torch.zeros(sequence, 1, dtype=torch.long, device=device)
    loss = model(tokens, tokens)
    loss.backward()
    apply.sum_replicated_gradients(model, ranks)
    assert all(p.grad is not None and p.grad.shape == p.shape for p in model.parameters())
    return loss


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("sequence", [64, 100, 3])
def test_decoder_at_tensor_64(rank_of_64: int, device: str, sequence: int) -> None:
    with torch.device(device):
        model = wide_decoder()
    loss = one_pass(model, mesh.Degrees(tensor=64), device, sequence)
    assert loss.shape == ()
    assert loss.device.type == device
    shapes = local_shapes(model)
    assert shapes["embedding.weight"] == shapes["head.weight"] == (4, 128)
    assert shapes["layers.1.attention.qkv.weight"] == (6, 128)
    assert shapes["layers.1.attention.out.weight"] == (128, 2)
    assert shapes["layers.0.mlp.gate_up.weight"] == (128, 128)
    assert shapes["layers.0.mlp.down.weight"] == (128, 64)
    assert shapes["norm.weight"] == (128,)


def test_decoder_at_tensor_8_times_data_8(rank_of_64: int) -> None:
    """On CPU tensors alone: FSDP2 refuses to run with parameters on the meta device."""
    model = wide_decoder()
    assert one_pass(model, mesh.Degrees(tensor=8, data=8), "cpu", 64).shape == ()
    shapes = local_shapes(model)
    assert shapes["layers.0.mlp.down.weight"] == (16, 512)  # [128, 4096] over data x tensor
    assert shapes["layers.0.mlp.gate_up.weight"] == (128, 128)  # [8192, 128] over both, along one dimension
    assert shapes["norm.weight"] == (16,)
