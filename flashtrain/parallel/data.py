"""Data parallelism: FSDP2 whose all-gather and reduce-scatter are this engine's schedules."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.fsdp._fully_shard._fsdp_api import AllGather, ReduceScatter

from flashtrain.comm import into
from flashtrain.errors import UserError


class ScheduledAllGather(AllGather):
    """FSDP2's all-gather of flat parameter shards by the all-gather schedule.

    With ``group``, the ranks that it is among, FSDP2 reads what was gathered where it landed, while up to
    ``ahead`` other units are gathered ahead. FSDP2 drops an output when the streams that it gathers on come
    after what reads it, since the allocator may reuse the memory there: that is all that a loan asks for.
    """

    def __init__(self, site: str, group: str | None = None, ahead: int = 1) -> None:
        self.site, self._group, self._ahead = site, group, ahead

    def allocate(self, size: Sequence[Any], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        if self._group is not None:
            shape = torch.Size(size)
            lent = into.output(shape, dtype, device, self._group, self.site, self._copy, self._ahead)
            if lent is not None:
                return lent
        return torch.empty(*size, dtype=dtype, device=device)

    def _copy(self) -> None:
        """This unit's output is held for long: for a copy of its own it need not wait."""
        self._group = None

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, async_op: bool = False
    ) -> None:
        into.all_gather(output_tensor, input_tensor, group.group_name, self.site, self._ahead)


class ScheduledReduceScatter(ReduceScatter):
    """FSDP2's reduce-scatter of flat gradients: partials added in rank order in fp32, rounded once."""

    def __init__(self, site: str) -> None:
        self.site = site

    def allocate(self, size: Sequence[Any], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,
        group: dist.ProcessGroup,
        op: Any,
        async_op: bool = False,
    ) -> None:
        if op not in (dist.ReduceOp.SUM, dist.ReduceOp.AVG):
            raise NotImplementedError(
                f"gradients are reduced by sum or mean, not by {op}; for another divisor call "
                "set_force_sum_reduction_for_comms(True)"
            )
        scale = 1.0 / group.size() if op == dist.ReduceOp.AVG else 1.0
        into.reduce_scatter(output_tensor, input_tensor, group.group_name, self.site, scale)


@dataclass(frozen=True, kw_only=True)
class Sharding:
    """How data parallelism keeps parameters; it changes memory and time, no bit.

    ``reshard``: free a block's gathered parameters after its forward pass and gather them again for its
    backward pass. ``prefetch``: blocks whose parameters are gathered ahead of the one that runs; 1 is what
    FSDP2 does by itself, more take as many blocks' memory. On nvlink, of the largest block as many landing
    buffers as 2 more, if ``comm.arena_bytes`` allows them.
    """

    reshard: bool = True
    prefetch: int = 1

    def validate(self) -> None:
        """Raise UserError for a value out of range."""
        if self.prefetch < 1:
            raise UserError(f"fsdp.prefetch is {self.prefetch}; it must be at least 1")


def shard(
    model: nn.Module,
    units: Sequence[nn.Module],
    mesh: DeviceMesh,
    sharding: Sharding | None = None,
    absent: Collection[nn.Parameter] = (),
    kept: Collection[nn.Module] = (),
) -> nn.Module:
    """Apply FSDP2 to ``units`` (blocks, each gathered as one) and to what is left of ``model``.

    ``mesh`` is one-dimensional, the data-parallel ranks. Gradients are means over them. The collectives
    run in the order of the modules on every rank. ``absent``: parameters that none of these ranks holds.
    ``kept``: units whose parameters stay gathered from the forward to the backward pass in any case.
    """
    sharding, ignored = sharding or Sharding(), set(absent)
    for unit in units:
        reshard = sharding.reshard and unit not in kept
        fully_shard(unit, mesh=mesh, reshard_after_forward=reshard, ignored_params=ignored)
    fully_shard(model, mesh=mesh, ignored_params=ignored)
    names = {id(module): name or "model" for name, module in model.named_modules()}
    group = mesh.get_group().group_name
    for unit in (*units, model):
        assert isinstance(unit, FSDPModule)
        site = f"{names[id(unit)]} (data)"
        unit.set_custom_all_gather(ScheduledAllGather(site, group, sharding.prefetch))
        unit.set_custom_reduce_scatter(ScheduledReduceScatter(site))
    if sharding.prefetch > 1:
        # What is inside of another unit may not run in every step: it is gathered where it is called.
        inner = {module for unit in units for module in unit.modules() if module is not unit}
        blocks = [unit for unit in units if isinstance(unit, FSDPModule) and unit not in inner]
        _gather_ahead(blocks, sharding.prefetch)
    return model


def release(model: nn.Module) -> None:
    """Let go of gathered parameters that were kept, as after a forward pass alone: shards are the weights."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def _gather_ahead(units: Sequence[FSDPModule], count: int) -> None:
    """Let each unit start the gathers of the ``count`` that run after it, forward and backward."""
    for place, unit in enumerate(units):
        unit.set_modules_to_forward_prefetch(list(units[place + 1 : place + 1 + count]))
        unit.set_modules_to_backward_prefetch(list(units[max(0, place - count) : place])[::-1])
