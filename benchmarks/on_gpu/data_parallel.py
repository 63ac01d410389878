"""A training step under FSDP2 with NCCL's collectives, with the op's, and with none.

Three copies of one decoder, sharded alike, step in turn: forward, backward, AdamW, in bf16. The copy without
communication differs in one thing: where the others exchange, it copies its own shard to the places of all
ranks, and takes its own part of a gradient for the sum. So it launches the same products on values alike,
with FSDP2's own copies, and what a step takes longer than its step is the exposed communication, the
slower products beside transfers included. Its losses mean nothing.

A host that is no further than the device sets the pace, and each collective takes some of its time: that is
noted as well, of both calls that FSDP2 makes into one (``allocate`` and the collective itself).
"""

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import shapes
import torch
import torch.distributed as dist
from on_gpu.modes import Call, host_issued
from on_gpu.ranks import Budget, Ranks
from on_gpu.report import Report
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.fsdp._fully_shard._fsdp_api import AllGather, ReduceScatter

from flashtrain.comm.groups import resolve
from flashtrain.models.decoder import Decoder
from flashtrain.parallel import data

TOKEN_SETS = 4
WARM_UP = 3
LEARNING_RATE = 1e-4
TOLERANCE = 1e-2  # relative, of the first losses of two copies
Shard = Callable[[Decoder, DeviceMesh], Any]


class _Allocate:
    def allocate(self, size: Sequence[Any], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device)


class NoAllGather(_Allocate, AllGather):
    """Puts the own shard in the places of all ranks."""

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, async_op: bool = False
    ) -> None:
        output_tensor.view(group.size(), -1).copy_(input_tensor.view(1, -1).expand(group.size(), -1))


class NoReduceScatter(_Allocate, ReduceScatter):
    """Takes the own part of a gradient for the sum over the ranks."""

    def __call__(
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,
        group: dist.ProcessGroup,
        op: Any,
        async_op: bool = False,
    ) -> None:
        output_tensor.copy_(input_tensor.view(group.size(), -1)[group.rank()].view_as(output_tensor))


class Timed:
    """Another collective of FSDP2; ``spent`` grows by the seconds of the host in each of its calls."""

    def __init__(self, inner: Any, spent: list[float]) -> None:
        self._inner, self._spent = inner, spent

    def allocate(self, *arguments: Any, **options: Any) -> Any:
        started = time.perf_counter()
        found = self._inner.allocate(*arguments, **options)
        self._spent[-1] += time.perf_counter() - started
        return found

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        started = time.perf_counter()
        found = self._inner(*arguments, **options)
        self._spent[-1] += time.perf_counter() - started
        self._spent.append(0.0)
        return found


def _parameter_groups(unit: Any) -> list[Any]:
    """What FSDP2 keeps of a unit; torch has one, or a list of them."""
    state = unit._get_fsdp_state()
    found: list[Any] = getattr(state, "_fsdp_param_groups", None) or [state._fsdp_param_group]
    return [group for group in found if group is not None]


def _plain(model: Decoder, mesh: DeviceMesh) -> None:
    for unit in (*model.layers, model):
        fully_shard(unit, mesh=mesh)


def _scheduled(model: Decoder, mesh: DeviceMesh) -> None:
    data.shard(model, list(model.layers), mesh)


def _silent(model: Decoder, mesh: DeviceMesh) -> None:
    _plain(model, mesh)
    for unit in (*model.layers, model):
        assert isinstance(unit, FSDPModule)
        unit.set_custom_all_gather(NoAllGather())
        unit.set_custom_reduce_scatter(NoReduceScatter())


class Copy:
    """One copy of the model, with its optimizer; ``step(n)`` trains on token set ``n``."""

    def __init__(self, ranks: Ranks, shard: Shard, group: dist.ProcessGroup, tokens: list[Tensor]) -> None:
        device, self._tokens = ranks.device.device, tokens
        with torch.device(device):
            config = shapes.MODELS[ranks.settings.trained]
            self.model: nn.Module = Decoder(config, torch.Generator(device).manual_seed(0))
        self.model.to(torch.bfloat16)
        shard(self.model, DeviceMesh.from_group(group, device.type, mesh_dim_names=("data",)))
        self.gathers, self.scatters = [0.0], [0.0]  # seconds of the host, one a collective
        for unit in self.model.modules():
            for group in _parameter_groups(unit) if isinstance(unit, FSDPModule) else ():
                group._all_gather_comm = Timed(group._all_gather_comm, self.gathers)
                group._reduce_scatter_comm = Timed(group._reduce_scatter_comm, self.scatters)
        self._optimizer = torch.optim.AdamW(self.model.parameters(), lr=LEARNING_RATE, fused=True)

    def step(self, number: int) -> Tensor:
        """The loss before the update, not waited for."""
        tokens = self._tokens[number]
        loss = self.model(tokens[:-1], tokens[1:])
        loss.backward()
        self._optimizer.step()
        self._optimizer.zero_grad()
        return loss.detach()


def measure(ranks: Ranks, report: Report) -> None:
    """One row for each number of sequences a rank."""
    settings = ranks.settings
    config = shapes.MODELS[settings.trained]
    names = [f"{settings.trained}, {batch} x {settings.sequence} a rank" for batch in settings.batches]
    report.plan("dp", names)
    exposed = "step less the step of a copy whose collectives copy locally"
    report.note("dp", {"exposed": exposed, "host_us": "of the first rank in a collective, median"})
    budget = Budget(settings.seconds)
    scheduled = resolve(ranks.new_group())
    for index, (name, batch) in enumerate(zip(names, settings.batches, strict=True)):
        if (left := budget.left()) <= 0:
            return
        ranks.alive(f"dp {name}")
        random = torch.Generator().manual_seed(ranks.rank)
        shape = (settings.sequence + 1, batch)
        tokens = [
            torch.randint(config.vocabulary, shape, generator=random).to(ranks.device.device)
            for _ in range(TOKEN_SETS)
        ]
        copies = {
            "nccl": Copy(ranks, _plain, ranks.collective, tokens),
            "ours": Copy(ranks, _scheduled, scheduled, tokens),
            "none": Copy(ranks, _silent, ranks.collective, tokens),
        }
        report.add("dp", name, _row(ranks, copies, batch, left / (len(names) - index)))
        del copies


def _row(ranks: Ranks, copies: dict[str, Copy], batch: int, seconds: float) -> dict[str, Any]:
    losses = {name: [float(copy.step(n)) for n in range(WARM_UP)] for name, copy in copies.items()}
    if not abs(losses["ours"][0] / losses["nccl"][0] - 1) <= TOLERANCE:
        raise RuntimeError(f"the first losses differ: {losses['ours'][0]} and {losses['nccl'][0]} with NCCL")
    ranks.alive()
    for copy in copies.values():
        copy.gathers[:], copy.scatters[:] = [0.0], [0.0]
    calls: dict[str, Call] = {name: copy.step for name, copy in copies.items()}
    times = host_issued(calls, ranks, seconds=seconds / 2, sets=TOKEN_SETS)
    ms = {name: found.summary() for name, found in times.items()}
    tokens = ranks.world * batch * ranks.settings.sequence
    exposed = {name: round(ms[name]["median"] - ms["none"]["median"], 4) for name in ("nccl", "ours")}
    return {
        "model": ranks.settings.trained,
        "parameters": sum(p.numel() for p in copies["nccl"].model.parameters()),
        "batch": batch,
        "sequence": ranks.settings.sequence,
        "ms": ms,
        "exposed_ms": exposed,
        "host_us": {
            name: {"gather": _microseconds(copy.gathers), "scatter": _microseconds(copy.scatters)}
            for name, copy in copies.items()
        },
        "tokens_per_second": {
            name: round(tokens / s["median"] * 1e3) for name, s in ms.items() if name != "none"
        },
        "over_nccl": round(ms["nccl"]["median"] / ms["ours"]["median"], 4),
        "losses": {name: losses[name] for name in ("nccl", "ours")},
    }


def _microseconds(spent: list[float]) -> float:
    """The median; the last one is that of a collective yet to come."""
    return round(1e6 * statistics.median(spent[:-1]), 1)
