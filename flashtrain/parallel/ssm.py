"""Tensor parallelism of hybrids: Mamba-2 over its heads, Mamba-1 over its channels, FlowHN's row shards."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.nn.functional import linear

from flashtrain.comm import collectives, ops, transport
from flashtrain.errors import UserError
from flashtrain.parallel.tensor import _local, _OverTensorGroup, _shard, _Style


class Mixer(Protocol):
    """What ``SSMHeads`` needs to know of a mixer whose heads do not meet before the output projection.

    ``rows_of`` names for each parameter what its rows belong to, ``heads`` or ``groups`` of them. All that
    the mixer computes reads sizes off what ``_own`` gives, by default the parameter, and it is x times
    ``packed`` first of all.
    """

    heads: int
    groups: int

    def rows_of(self) -> Mapping[str, str]: ...
    def packed(self) -> Tensor: ...


class SSMHeadsMixer(_OverTensorGroup):
    """``H/W`` heads of a mixer over all rows, from a shard of the rows of x; goes before the mixer's class.

    Where there are fewer groups than ranks, their parameters are whole on every rank, which takes the rows
    of the group that its heads are in. Their gradients are then those of this rank's heads, and have to be
    summed as those of norm weights are.
    """

    def sizes(self) -> tuple[int, int]:
        """Inputs and outputs of the product with the packed weight, on all ranks together."""
        rows, inputs = cast(Mixer, self).packed().shape
        return inputs, self.world * rows

    def _own(self, name: str) -> Tensor:
        parameter: Tensor = cast(Any, super())._own(name)
        if isinstance(parameter, DTensor):
            return parameter.to_local()
        mixer = cast(Mixer, self)
        return parameter.chunk(mixer.groups)[self.rank * mixer.groups // self.world]

    def _project(self, x: Tensor) -> Tensor:
        """``y [S, B, N/W] = AG(x_shard [S/W, B, K]) · w_shard [N/W, K]ᵀ``, as a column-parallel layer."""
        total = self.rows.total if self.rows is not None else None
        flat, keep = x.reshape(-1, x.shape[-1]), transport.settings().keep_gather
        weight = cast(Mixer, self).packed()
        y, _ = ops.all_gather_matmul(flat, weight, self.group, self.site, total, keep, keep)
        return y.view(x.shape[0] * self.world, *x.shape[1:-1], y.shape[-1]) if x.dim() > 2 else y


class SummedLinear(_OverTensorGroup, nn.Linear):
    """``y [..., N] = AR(x [..., K/W] · w_shard [N, K/W]ᵀ)``: whole on every rank, which goes on differently.

    For an output that is small beside x, as Mamba-1's step sizes, keys and queries are. The gradient of y is
    the sum of what the ranks made of it, likewise an all-reduce.
    """

    def forward(self, x: Tensor) -> Tensor:
        partial = linear(x, _local(self.weight))
        total: Tensor = _AllReduce.apply(partial, self.group, self.site)
        return total


class _AllReduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, partial: Tensor, group: str, site: str) -> Tensor:
        ctx.group, ctx.site = group, site
        return collectives.all_reduce(partial, group, site)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor, None, None]:
        return collectives.all_reduce(slopes[0], ctx.group, ctx.site), None, None


class Summed(_Style):
    """Shard an ``nn.Linear`` without bias by input features; its output is whole on every rank."""

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        if getattr(module, "bias", None) is not None:
            raise UserError("Summed applies to a Linear without bias: give it bias=False")
        return self._convert(module, nn.Linear, SummedLinear, device_mesh, {"weight": 1})


class SSMHeads(_Style):
    """Shard a mixer by heads: each part of its weights by itself. What its heads meet in is apart.

    Raises UserError if heads do not divide by the degree, or groups neither divide by it nor divide it.
    """

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        if not hasattr(module, "rows_of"):
            raise UserError(f"SSMHeads applies to Mamba1 and Mamba2, not to {type(module).__name__}")
        mixer, world = cast(Mixer, module), device_mesh.size()
        whole_groups = mixer.groups % world == 0
        if mixer.heads % world or not (whole_groups or world % mixer.groups == 0):
            raise UserError(
                f"{mixer.heads} heads in {mixer.groups} groups of {type(module).__name__} do not divide by "
                f"the tensor-parallel degree {world}"
            )
        for name, of in mixer.rows_of().items():
            if of == "heads" or whole_groups:
                owner, _, own = name.rpartition(".")
                _shard(module.get_submodule(owner), own, 0, device_mesh)
        # A class of its own under both: this wing knows no mixer to derive from.
        kind = type(module)
        module.__class__ = type(f"Parallel{kind.__name__}", (SSMHeadsMixer, kind), {})
        cast(SSMHeadsMixer, module)._join(device_mesh, self.rows)
        return module


# Of how many tokens, of which branch, and what computes it on [S, B, H].
Piece = tuple[int, str, Callable[[Tensor], Tensor]]


class RowRouting(_OverTensorGroup, nn.Module):
    """FlowHN's routing of row shards: every piece becomes a sequence whose rows are sharded anew.

    The pieces' tokens lie on few ranks, since a shard is a contiguous block of rows, so all rows are gathered
    and every rank takes its share of each piece; each piece then goes through the usual parallel layers,
    which gather and scatter beside their products. Their outputs are gathered and cut likewise. Each rank
    uses other rows, so the reduce-scatter of the backward pass adds zeros to the one gradient that there is.
    The two gathers have no product beside them.
    """

    def forward(self, x: Tensor, pieces: Sequence[Piece]) -> Tensor:
        """``x [S/W, B, H]``, or a shard ``[rows, H]``, -> the same; see the class that this one replaces."""
        assert self.rows is not None
        assert self.rows.total is not None
        total = self.rows.total
        batch = total // sum(count for count, _, _ in pieces)
        parts = self._gathered(x, total).split([count * batch for count, _, _ in pieces])
        found = []
        for part, (count, _, compute) in zip(parts, pieces, strict=True):
            self.rows.total = count * batch
            found.append(self._gathered(compute(self._cut(part, count, batch)), count * batch))
        self.rows.total = total
        return self._cut(torch.cat(found), total // batch, batch)

    def _gathered(self, shard: Tensor, rows: int) -> Tensor:
        return collectives.all_gather(shard.reshape(-1, shard.shape[-1]), self.group, self.site, rows)

    def _cut(self, whole: Tensor, sequence: int, batch: int) -> Tensor:
        """This rank's shard of ``whole [S·B, H]``, with three dimensions where the sequence divides."""
        own = whole.tensor_split(self.world)[self.rank]
        return own.view(-1, batch, own.shape[-1]) if sequence % self.world == 0 else own


class RowRouted(_Style):
    """Replace a module ``routing(x, pieces)`` by one whose x is sharded by rows."""

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        return self._convert(module, nn.Module, RowRouting, device_mesh, {})
