"""What ranks with a GPU each do in the tests of CUDA graphs."""

import os
import time
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor, nn

from flashtrain.comm import collectives, ops, transport
from flashtrain.comm.schedule import split_rows
from flashtrain.errors import TransportError, UserError
from tests.comm.transport.gpu_ranks import draw, start, stop

# Rows, inputs, outputs of products in bf16, which are fused, and in fp32, which are not.
_CAPTURED = (
    ((512, 256, 384), torch.bfloat16),
    ((1001, 264, 520), torch.bfloat16),
    ((4096, 1024, 1024), torch.bfloat16),
    ((1, 64, 64), torch.bfloat16),
    ((300, 64, 128), torch.float32),
)


class _Layers:
    """Forward and backward of a column and a row product of one shape, on inputs that stay in place."""

    def __init__(
        self, group: str, rank: int, world: int, shape: tuple[int, int, int], dtype: torch.dtype
    ) -> None:
        self.group, self.rows = group, shape[0]
        rows, inputs, outputs = shape
        mine = split_rows(rows, world)[rank]
        self.inputs = [
            draw(10 * rank + number, *size, dtype=dtype)
            for number, size in enumerate(
                ((mine, inputs), (outputs, inputs), (rows, outputs), (inputs, outputs), (mine, inputs))
            )
        ]
        self.results: tuple[Tensor, ...] = ()

    def refresh(self, generator: torch.Generator) -> None:
        for tensor in self.inputs:
            tensor.copy_(torch.randn(tensor.shape, generator=generator, device="cuda"))

    def run(self, backward: bool) -> tuple[Tensor, ...]:
        x, w, hidden, v, dy = self.inputs
        y, x_full = ops.all_gather_matmul(x, w, self.group, "up", self.rows)
        z = ops.matmul_reduce_scatter(hidden, v, self.group, "down")
        if not backward:
            return y, x_full, z
        column = ops.column_gradients(hidden, x, w, self.group, "up")
        row = ops.row_gradients(dy, hidden, v, self.group, "down")
        reduced = collectives.reduce_scatter(hidden, self.group, "reduce", 0.5)
        return y, x_full, z, *column, *row, reduced


def replayed(rank: int, world: int, connections: str, turns: int) -> tuple[int, int]:
    """Replay graphs in turn with fresh inputs: how many results were compared with calls, how many differ."""
    os.environ["CUDA_DEVICE_MAX_CONNECTIONS"] = connections  # read when CUDA starts
    group, _ = start(rank, graphs=True)
    parts = [_Layers(group, rank, world, *form) for form in _CAPTURED]
    graphs = []
    for number, part in enumerate(parts):
        part.run(True)
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            part.results = part.run(backward=number % 2 == 0)
        graphs.append(graph)
    everything = torch.cuda.CUDAGraph()
    with torch.cuda.graph(everything, capture_error_mode="thread_local"):
        together = [part.run(backward=True) for part in parts]
    generator = torch.Generator("cuda").manual_seed(rank)
    compared, wrong = 0, torch.zeros((), dtype=torch.int64, device="cuda")
    for turn in range(turns):
        which = turn * 7 % (len(parts) + 1)
        running = parts if which == len(parts) else parts[which : which + 1]
        for part in running:
            part.refresh(generator)
        if (turn + rank) % 5 == 0:
            torch.cuda._sleep(1_000_000)
        if which == len(parts):
            everything.replay()
            found = together
        else:
            graphs[which].replay()
            found = [running[0].results]
        for part, results in zip(running, found, strict=True):
            for one, wanted in zip(results, part.run(backward=len(results) > 3), strict=True):
                wrong += (one != wanted).any()
                compared += 1
    torch.cuda.synchronize()
    for mover in transport.in_use():
        mover.check()
    stop()
    return compared, int(wrong)


class _Block(nn.Module):
    def __init__(self, group: str, rank: int) -> None:
        super().__init__()
        self.group = group
        self.up = nn.Parameter(draw(rank, 512, 256, dtype=torch.bfloat16) / 16)
        self.down = nn.Parameter(draw(10 + rank, 256, 512, dtype=torch.bfloat16) / 16)

    def forward(self, x: Tensor) -> Tensor:
        y, _ = ops.all_gather_matmul(x, self.up, self.group, "up", return_gather=False)
        return ops.matmul_reduce_scatter(torch.relu(y), self.down, self.group, "down")


def graphed(rank: int, world: int) -> int:
    """Train a block through ``make_graphed_callables`` and without; how many tensors differ."""
    group, _ = start(rank, graphs=True)
    plain, captured = (_Block(group, rank).cuda() for _ in range(2))
    sample = draw(20 + rank, 128, 256, dtype=torch.bfloat16).requires_grad_()
    replaying: Callable[[Tensor], Tensor] = torch.cuda.make_graphed_callables(captured, (sample,))
    wrong = 0
    for turn in range(10):
        outcomes = []
        for module, call in ((plain, plain), (captured, replaying)):
            x = draw(100 * turn + rank, 128, 256, dtype=torch.bfloat16).requires_grad_()
            y = call(x)
            module.zero_grad()
            y.float().square().mean().backward()
            outcomes.append([y, x.grad, module.up.grad, module.down.grad])
            with torch.no_grad():
                for parameter in module.parameters():
                    parameter -= parameter.grad
        wrong += sum(not torch.equal(one, other) for one, other in zip(*outcomes, strict=True))
    stop()
    return wrong


def refused(rank: int, world: int) -> list[str]:
    """What is said of captures without ``graphs``, and with them of shapes that have not run before."""
    messages = []
    torch.cuda.set_device(rank)
    x, w = (draw(rank, 128, 64, dtype=torch.bfloat16) for _ in range(2))
    for graphs in (False, True):
        group, _ = start(rank, graphs=graphs)
        for rows in (128, 64):
            if rows == 128 and not graphs:
                ops.matmul_reduce_scatter(x, w, group, "down")
            torch.cuda.synchronize()
            try:
                with torch.cuda.graph(torch.cuda.CUDAGraph(), capture_error_mode="thread_local"):
                    ops.matmul_reduce_scatter(x[:rows], w, group, "down")
            except UserError as error:
                messages.append(str(error))
        stop()
    return messages


def stopped(rank: int, world: int) -> tuple[str, float]:
    """The last rank stops replaying; what is raised, after how many seconds. New transports work."""
    torch.cuda.set_device(rank)
    transport.configure(transport.Settings(transport="nvlink", timeout=2.0, tune=False, graphs=True))
    group = dist.new_group().group_name
    x, w = draw(rank, 256 * world, 256, dtype=torch.bfloat16), draw(rank, 512, 256, dtype=torch.bfloat16)

    def product() -> Tensor:
        return ops.matmul_reduce_scatter(x, w, group, "layers.3.mlp.down")

    expected = product().clone()
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        found = product()
    for _ in range(3):
        graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(found, expected)
    dist.barrier()
    if rank == world - 1:
        time.sleep(4)
    began, message = time.monotonic(), ""
    try:
        for _ in range(30):
            graph.replay()
        torch.cuda.synchronize()  # must return
        for _ in range(100):
            product()
    except TransportError as error:
        message = str(error)
    took = time.monotonic() - began
    torch.cuda.synchronize()
    dist.barrier()
    del graph
    transport.configure(transport.Settings(transport="nvlink", timeout=30.0, tune=False))
    assert torch.equal(product(), expected)
    stop()
    return message, took
