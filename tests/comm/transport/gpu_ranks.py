"""What ranks with a GPU each do in the tests of the nvlink transport."""

import os
import random
import time
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from flashtrain.comm import chunked, collectives, fused, ops, products, transport, tune
from flashtrain.comm.schedule import split_rows
from flashtrain.comm.transport.group import GroupTransport
from flashtrain.comm.transport.nvlink import NvlinkTransport
from flashtrain.errors import TransportError
from flashtrain.kernels.ordered_sum.reference import ordered_sum

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# Rows, inputs, outputs: even, ragged, fewer rows than ranks, nothing at all.
SHAPES = ((512, 256, 384), (1001, 264, 520), (3, 128, 64), (1, 64, 64), (0, 64, 64))


def start(rank: int, **settings: Any) -> tuple[str, str]:
    """Names of two groups of all ranks: the first on nvlink, the second on NCCL."""
    torch.cuda.set_device(rank)
    # Bits are compared between calls of equal shape: no other reductions, no other kernels.
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
    transport.configure(
        transport.Settings(**{"transport": "nvlink", "timeout": 30.0, "tune": False, **settings})
    )
    over_nvlink, over_nccl = dist.new_group(), dist.new_group(backend="nccl")
    device = torch.device("cuda", rank)
    assert isinstance(transport.of(over_nvlink.group_name, device), NvlinkTransport)
    transport.assign(over_nccl.group_name, "cuda", GroupTransport(over_nccl, 30.0))
    return over_nvlink.group_name, over_nccl.group_name


def stop() -> None:
    torch.cuda.synchronize()
    dist.barrier()
    transport.shutdown()


def draw(seed: int, *size: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed)).to(dtype).cuda()


def both_layers(
    group: str, rank: int, world: int, shape: tuple[int, int, int], dtype: torch.dtype
) -> dict[str, Tensor]:
    """Forward and backward of a column and a row product; everything random, weights and shards per rank."""
    rows, inputs, outputs = shape
    mine = split_rows(rows, world)[rank]
    results: dict[str, Tensor] = {}
    for keep in (False, True):
        x = draw(rank, mine, inputs, dtype=dtype).requires_grad_()
        w = draw(10 + rank, outputs, inputs, dtype=dtype).requires_grad_()
        y, x_full = ops.all_gather_matmul(x, w, group, "up", rows, keep)
        y.backward(draw(20 + rank, rows, outputs, dtype=dtype))
        assert x.grad is not None
        assert w.grad is not None
        results |= {
            f"{name} {keep}": t for name, t in (("y", y), ("x_full", x_full), ("dx", x.grad), ("dw", w.grad))
        }
    x = draw(30 + rank, rows, inputs, dtype=dtype).requires_grad_()
    w = draw(40 + rank, outputs, inputs, dtype=dtype).requires_grad_()
    y = ops.matmul_reduce_scatter(x, w, group, "down")
    y.backward(draw(50 + rank, mine, outputs, dtype=dtype))
    assert x.grad is not None
    assert w.grad is not None
    results |= {"row y": y, "row dx": x.grad, "row dw": w.grad}
    results["gathered"] = collectives.all_gather(draw(rank, mine, 5, dtype=dtype), group, "gather", rows)
    results["reduced"] = collectives.reduce_scatter(
        draw(60 + rank, rows, 3, dtype=dtype), group, "reduce", 1 / world
    )
    return {name: tensor.detach() for name, tensor in results.items()}


def replayed(
    rank: int, world: int, shape: tuple[int, int, int], dtype: torch.dtype, subchunks: int
) -> dict[str, Tensor]:
    """What the direct schedules say, step by step on one device: y of both products."""
    rows, inputs, outputs = shape
    counts = split_rows(rows, world)
    offsets = [sum(counts[:owner]) for owner in range(world)]
    shards = [draw(owner, counts[owner], inputs, dtype=dtype) for owner in range(world)]
    # A product's bits may depend on how its operand is aligned: where it lay in the gathered tensor.
    whole = torch.cat(shards)
    w = draw(10 + rank, outputs, inputs, dtype=dtype)
    y = torch.empty(rows, outputs, dtype=dtype, device="cuda")
    for owner in range(world):
        source = shards[rank] if owner == rank else whole[offsets[owner] :]
        at = 0
        for size in split_rows(counts[owner], subchunks):
            begin = offsets[owner] + at
            chunked.product(source[at : at + size], w, y[begin : begin + size])
            at += size
    slots = torch.empty(world, counts[rank], outputs, dtype=dtype, device="cuda")
    for source in range(world):
        x = draw(30 + source, rows, inputs, dtype=dtype)
        w = draw(40 + source, outputs, inputs, dtype=dtype)
        at = 0
        for size in split_rows(counts[rank], subchunks):
            begin = offsets[rank] + at
            out = torch.empty(rows, outputs, dtype=dtype, device="cuda")[begin : begin + size]
            chunked.product(
                x[begin : begin + size], w, out if source != rank else slots[rank, at : at + size]
            )
            if source != rank:
                slots[source, at : at + size] = out
            at += size
    return {"y False": y, "row y": ordered_sum(slots)}


def fused_bits(rank: int, world: int, subchunks: int) -> int:
    """Compare the fused products with the same kernel on whole operands; the number of comparisons."""
    from flashtrain.kernels.overlapped_matmul.triton import matmul

    def product(x: Tensor, w: Tensor) -> Tensor:
        out = torch.full((x.shape[0], w.shape[0]), float("nan"), dtype=x.dtype, device="cuda")
        matmul(x, w, out)
        return out

    group, _ = start(rank, subchunks=subchunks)
    compared = 0
    for dtype in DTYPES[:2]:
        for rows, inputs, outputs in SHAPES[:4]:
            counts = split_rows(rows, world)
            own = slice(sum(counts[:rank]), sum(counts[: rank + 1]))

            def gathered(seed: int, width: int, counts: Any = counts, dtype: Any = dtype) -> Tensor:
                return torch.cat([draw(seed + c, counts[c], width, dtype=dtype) for c in range(world)])

            partials = [
                product(draw(30 + c, rows, inputs, dtype=dtype), draw(40 + c, outputs, inputs, dtype=dtype))
                for c in range(world)
            ]
            gradients = [
                chunked_product(
                    draw(20 + c, rows, outputs, dtype=dtype), draw(10 + c, outputs, inputs, dtype=dtype).t()
                )
                for c in range(world)
            ]
            x, dy = gathered(0, inputs), gathered(50, outputs)
            wanted = {
                "y": product(x, draw(10 + rank, outputs, inputs, dtype=dtype)),
                "x_full": x,
                "dx": ordered_sum(torch.stack([partial[own] for partial in gradients])),
                "row y": ordered_sum(torch.stack([partial[own] for partial in partials])),
                "row dx": product(dy, draw(40 + rank, outputs, inputs, dtype=dtype).t()),
            }
            for _ in range(2):
                found = both_layers(group, rank, world, (rows, inputs, outputs), dtype)
                row = (
                    draw(30 + rank, rows, inputs, dtype=dtype),
                    draw(40 + rank, outputs, inputs, dtype=dtype),
                )
                column = (
                    draw(rank, counts[rank], inputs, dtype=dtype),
                    draw(10 + rank, outputs, inputs, dtype=dtype),
                )
                for carriers in (1, 5, 16):
                    assert torch.equal(carried(*row, group, rows, subchunks, carriers), found["row y"])
                    for parts in (1, 3):
                        y = carried(*column, group, rows, subchunks, carriers, parts)
                        assert torch.equal(y, found["y False"])
                for name, expected in wanted.items():
                    for key in (name,) if name in found else (f"{name} False", f"{name} True"):
                        assert torch.equal(found[key], expected), (key, dtype, rows, subchunks)
                        compared += 1
    stop()
    return compared


def beside_nccl(rank: int, world: int, rounds: int) -> int:
    """Products of pairs of ranks while NCCL reduces between the pairs; how many were wrong.

    Ranks are late at random, so that here a product comes first and there a collective.
    """
    blocks = 8
    os.environ["NCCL_MAX_CTAS"] = os.environ["NCCL_MIN_CTAS"] = str(blocks)
    torch.cuda.set_device(rank)
    transport.configure(transport.Settings(transport="nvlink", timeout=20.0, tune=False, spare_sms=blocks))
    half = world // 2
    pairs = [dist.new_group([first, first + 1]) for first in range(0, world, 2)]
    across = [dist.new_group([rank, rank + half], backend="nccl") for rank in range(half)]
    pair, other = pairs[rank // 2], across[rank % half]
    mine, rows, delays = rank % 2, 8192, random.Random(rank)
    w = [draw(seed, 2048, 2048, dtype=torch.bfloat16) for seed in (0, 1)]
    x = [draw(seed, rows, 2048, dtype=torch.bfloat16) for seed in (2, 3)]
    sums, side = torch.ones(64 << 20, device="cuda"), torch.cuda.Stream()
    wanted: Tensor | None = None
    wrong = torch.zeros((), dtype=torch.int64, device="cuda")
    for number in range(rounds):
        with torch.cuda.stream(side):
            torch.cuda._sleep(delays.randrange(200_000))
            dist.all_reduce(sums, op=dist.ReduceOp.AVG, group=other)
        torch.cuda._sleep(delays.randrange(200_000))
        y = carried(x[mine], w[mine], pair.group_name, rows, 2, 12)
        up, _ = ops.all_gather_matmul(y, w[mine], pair.group_name, f"up {number}", rows)
        wanted = up.clone() if wanted is None else wanted
        wrong += (up != wanted).any()
    side.synchronize()
    found = int(wrong) + int((sums != 1).any())
    stop()
    return found


def carried(
    x: Tensor, w: Tensor, group: str, rows: int, subchunks: int, carriers: int, parts: int = 0
) -> Tensor:
    """``RS(x · wᵀ)``, or ``AG(x) · wᵀ`` in ``parts``, whose chunks are moved by so many blocks."""
    mover = transport.of(group, x.device)
    assert isinstance(mover, NvlinkTransport)
    op = "all_gather" if parts else "reduce_scatter"
    plan = products.plan_of(op, split_rows(rows, mover.world), group, subchunks, in_turn=True)
    if parts:
        return fused.FusedGather(mover, plan, x, w, carriers=carriers, parts=parts)(x, w, "carried")
    return fused.FusedScatter(mover, plan, x, w, carriers=carriers)(x, w, "carried")


def chunked_product(x: Tensor, w: Tensor) -> Tensor:
    out = torch.empty(x.shape[0], w.shape[0], dtype=x.dtype, device="cuda")
    chunked.product(x, w, out)
    return out


def tuned(rank: int, world: int, cache: str) -> tuple[float, list[str]]:
    """Largest relative error of tuned products, and the kept choices after measuring them once and twice."""
    os.environ["XDG_CACHE_HOME"] = cache
    group, _ = start(rank, tune=True)
    worst, kept = 0.0, []
    for _ in range(2):
        for rows, inputs, outputs in ((1024, 512, 768), (1000, 264, 520)):
            found = both_layers(group, rank, world, (rows, inputs, outputs), torch.bfloat16)
            counts = split_rows(rows, world)
            x = torch.cat([draw(c, counts[c], inputs, dtype=torch.bfloat16) for c in range(world)]).double()
            exact = x @ draw(10 + rank, outputs, inputs, dtype=torch.bfloat16).double().t()
            worst = max(worst, float((found["y False"].double() - exact).norm() / exact.norm()))
        dist.barrier()
        kept.append((tune.folder() / "tuned.json").read_text())
        # Made anew, from what is kept.
        transport.configure(transport.settings())
    stop()
    return worst, kept


def bits(rank: int, world: int, kind: str, subchunks: int) -> int:
    """Compare nvlink with NCCL and with the replay; the number of comparisons."""
    nvlink, nccl = start(rank, kind=kind, subchunks=subchunks, fused=False)
    compared = 0
    for dtype in DTYPES:
        for shape in SHAPES:
            ours = both_layers(nvlink, rank, world, shape, dtype)
            expected = {"NCCL": both_layers(nccl, rank, world, shape, dtype)}
            if kind == "direct":
                expected["replay"] = replayed(rank, world, shape, dtype, subchunks)
            for source, tensors in expected.items():
                for name, wanted in tensors.items():
                    assert torch.equal(ours[name], wanted), (source, name, dtype, shape, kind, subchunks)
                    compared += 1
    stop()
    return compared


def _pattern(rank: int, salt: int, rows: int, columns: int) -> Tensor:
    """Small whole numbers: products and sums of them are exact in bf16."""
    grid = torch.arange(rows, device="cuda")[:, None] * 7 + torch.arange(columns, device="cuda")[None] * 3
    return ((grid + rank * 5 + salt * 11) % 5 - 2).bfloat16()


def stress(rank: int, world: int, operations: int, connections: str) -> dict[str, float]:
    """Operations back to back on two groups, fresh data each, ranks late at random; the host never waits."""
    os.environ["CUDA_DEVICE_MAX_CONNECTIONS"] = connections  # read when CUDA starts
    torch.cuda.set_device(rank)
    transport.configure(transport.Settings(transport="nvlink", timeout=30.0, tune=False))
    groups = [dist.new_group().group_name for _ in range(2)]
    choice, delays = random.Random(9), random.Random(rank)
    wrong = torch.zeros((), dtype=torch.int64, device="cuda")
    side = torch.cuda.Stream()
    memory = began = 0.0
    warm = min(100, operations // 2)
    for salt in range(operations):
        rows = choice.choice((4 * world, 16 * world + 1, 256 * world + 3, 1, 2048 * world))
        inputs, outputs = choice.choice(((16, 32), (32, 8), (16, 1024)))
        group, kind = groups[choice.randrange(2)], choice.randrange(4)
        stream = side if choice.random() < 0.2 else torch.cuda.default_stream()
        if delays.random() < 0.1:
            torch.cuda._sleep(delays.randrange(2_000_000))  # up to a millisecond
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            counts = split_rows(rows, world)
            begin = sum(counts[:rank])
            whole = [_pattern(source, salt, rows, inputs) for source in range(world)]
            w = [_pattern(source, salt + 1, outputs, inputs) for source in range(world)]
            if kind == 0:
                x = torch.cat([whole[c][: counts[c]] for c in range(world)])
                found, _ = ops.all_gather_matmul(
                    whole[rank][: counts[rank]], w[rank], group, f"up {salt}", rows
                )
                wanted = x @ w[rank].t()
            elif kind in (1, 3):
                if kind == 1:
                    found = ops.matmul_reduce_scatter(whole[rank], w[rank], group, f"down {salt}")
                else:
                    found = carried(whole[rank], w[rank], group, rows, 1 + salt % 2, 1 + salt % 20)
                partials = [whole[c][begin : begin + counts[rank]] @ w[c].t() for c in range(world)]
                wanted = ordered_sum(torch.stack(partials))
            else:
                found = collectives.all_gather(whole[rank][: counts[rank]], group, f"gather {salt}", rows)
                wanted = torch.cat([whole[c][: counts[c]] for c in range(world)])
            wrong += (found != wanted).any() | torch.tensor(found.shape != wanted.shape, device="cuda")
        torch.cuda.current_stream().wait_stream(stream)
        if salt == warm:
            torch.cuda.synchronize()
            memory, began = torch.cuda.mem_get_info()[0], time.perf_counter()
    torch.cuda.synchronize()
    taken = time.perf_counter() - began
    torch.cuda.empty_cache()
    grown = memory - torch.cuda.mem_get_info()[0]
    for mover in transport.in_use():
        mover.check()
    stop()
    return {"wrong": float(wrong), "grown": grown, "seconds": taken}


def stopped(rank: int, world: int, behind: int, connections: str) -> dict[str, Any]:
    """The last rank stops before its third operation; ``behind`` kernels wait behind those of the others."""
    os.environ["CUDA_DEVICE_MAX_CONNECTIONS"] = connections
    torch.cuda.set_device(rank)
    transport.configure(transport.Settings(transport="nvlink", timeout=2.0, tune=False))
    group = dist.new_group().group_name
    w = draw(rank, 512, 256, dtype=torch.bfloat16)

    def product() -> Tensor:
        return ops.matmul_reduce_scatter(
            draw(rank, 256 * world, 256, dtype=torch.bfloat16), w, group, "layers.3.mlp.down"
        )

    for _ in range(2):
        product()
    torch.cuda.synchronize()
    dist.barrier()
    if rank == world - 1:
        time.sleep(4)
    began, message = time.monotonic(), ""
    try:
        for _ in range(200):
            y = product()
            for _ in range(behind):
                y = y + 1
            torch.cuda.synchronize()  # must return
    except TransportError as error:
        message = str(error)
    took = time.monotonic() - began
    # The context is as good as before: new transports work.
    dist.barrier()
    transport.configure(transport.Settings(transport="nvlink", timeout=30.0, tune=False))
    again = product()
    reference = ordered_sum(torch.stack([
        (draw(c, 256 * world, 256, dtype=torch.bfloat16) @ draw(c, 512, 256, dtype=torch.bfloat16).t())[
            256 * rank : 256 * (rank + 1)
        ]
        for c in range(world)
    ]))  # fmt: skip
    error = float((again.float() - reference.float()).abs().max() / reference.float().abs().max())
    stop()
    return {"message": message, "took": took, "error": error}
