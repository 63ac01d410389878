"""Tensor and sequence parallelism as styles for ``torch.distributed.tensor.parallel.parallelize_module``.

Between a row-parallel and the next column-parallel layer the activations are sharded by rows, so norms
and residual additions see 1/W of the sequence. Activations are ``[sequence, batch, hidden]``; a shard is
a contiguous block of their flattened rows. Where the sequence divides by W a shard keeps three
dimensions, ``[sequence/W, batch, hidden]``; where it does not, shards are ``[rows, hidden]`` with the
rows that ``torch.tensor_split`` gives each rank, and the layers need a ``Rows`` to learn the total.

Parameters become DTensors (``Shard(0)`` column and vocabulary, ``Shard(1)`` row), so FSDP2 and
torch.distributed.checkpoint compose. Every rank must hold the same full parameters beforehand. What is
not sharded (norm weights, row biases) sees this rank's rows only: after the backward pass its gradient
must be summed over the group, see ``flashtrain.parallel.apply.sum_replicated_gradients``.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.parallel import ParallelStyle

from flashtrain.comm import embedding, loss, ops, transport
from flashtrain.errors import UserError


@dataclass
class Rows:
    """The rows of the whole activation now in flight, where they cannot be told from a shard."""

    total: int | None = None


class _OverTensorGroup:
    """What a parallelised module knows beside its parameters."""

    group: str
    rank: int
    world: int
    rows: Rows | None
    site: str = ""

    def _join(self, mesh: DeviceMesh, rows: Rows | None) -> None:
        process_group = mesh.get_group()
        self.group, self.rows = process_group.group_name, rows
        self.rank, self.world = process_group.rank(), process_group.size()

    def _shard_like(self, shard: Tensor, whole: Tensor) -> Tensor:
        """Give row shard ``[rows, n]`` of ``whole [..., k]`` the dimensions of whole, where they divide."""
        if whole.dim() > 2 and whole.shape[0] % self.world == 0:
            return shard.view(whole.shape[0] // self.world, *whole.shape[1:-1], shard.shape[-1])
        return shard


class _Local(torch.autograd.Function):
    """The local shard of a DTensor, which has no gradient where nothing gives the shard one.

    That is so of a weight whose products all add to its ``main_grad``. ``DTensor.to_local`` of torch 2.11
    makes zeros of its size then, which the optimizer would add.
    """

    @staticmethod
    def forward(ctx: Any, parameter: DTensor) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.mesh, ctx.placements = parameter.device_mesh, parameter.placements
        local = parameter.to_local()
        return local.view_as(local)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor | None) -> DTensor | None:
        if gradient is None:
            return None
        return DTensor.from_local(gradient, ctx.mesh, ctx.placements, run_check=False)


def _local(parameter: Tensor) -> Tensor:
    if not isinstance(parameter, DTensor):
        return parameter
    if torch.compiler.is_compiling():  # there every gradient is autograd's
        return parameter.to_local()
    local: Tensor = _Local.apply(parameter)
    return local


def _main_grad(weight: Tensor) -> Any:
    """Where the optimizer wants the weight's gradient added up in fp32, if it does."""
    return getattr(weight, "main_grad", None)


class ColumnParallelLinear(_OverTensorGroup, nn.Linear):
    """``y [S, B, N/W] = AG(x_shard [S/W, B, K]) · w_shard [N/W, K]ᵀ + b_shard``."""

    def forward(self, x: Tensor) -> Tensor:
        return self._product(x, *self._operands())

    def _product(self, x: Tensor, weight: Tensor, bias: Tensor | None, main: Any = None) -> Tensor:
        total = self.rows.total if self.rows is not None else None
        flat = x.reshape(-1, x.shape[-1])
        keep = transport.settings().keep_gather
        # The gathered input is wanted by the weight gradient alone, if that does not gather it again.
        y, _ = ops.all_gather_matmul(flat, weight, self.group, self.site, total, keep, keep, main)
        if bias is not None:
            y = y + bias
        # As torch's own linear does it: no view, of which FSDP2 warns.
        shape = [x.shape[0] * self.world, *x.shape[1:-1], y.shape[-1]]
        return torch.ops.aten._unsafe_view(y, shape) if x.dim() > 2 else y

    def _operands(self) -> tuple[Tensor, Tensor | None, Any]:
        bias = None if self.bias is None else _local(self.bias)
        return _local(self.weight), bias, _main_grad(self.weight)


class VocabularyParallelHeadLinear(ColumnParallelLinear):
    """``head(x_shard [S/W, B, H])`` -> logits ``[S, B, V/W]``, or with whole ``targets [S, B]`` their loss.

    The mean loss is the same on every rank, and its logits exist in chunks of rows alone.
    """

    def forward(self, x: Tensor, targets: Tensor | None = None) -> Tensor:
        if targets is None:
            return super().forward(x)
        flat, weight, whole = x.reshape(-1, x.shape[-1]), _local(self.weight), targets.reshape(-1)
        if ops.traced(flat, weight):  # a compiler can fuse the loss itself, if it sees it
            return loss.vocabulary_parallel_cross_entropy(super().forward(x), targets, self.group, self.site)
        main = _main_grad(self.weight)
        return loss.linear_cross_entropy(flat, weight, whole, self.group, self.site, main)


class ColumnParallelPackedLinear(ColumnParallelLinear):
    """A column-parallel layer that is one product with another: ``packing`` joins both shards."""

    def forward(  # type: ignore[override]
        self, x: Tensor, other: nn.Linear, packing: Any
    ) -> Tensor:
        bias = None if self.bias is None else packing.join(_local(self.bias), _local(other.bias))
        main = packing.gradient(self.weight, other.weight)
        return self._product(x, packing.join(_local(self.weight), _local(other.weight)), bias, main)


class RowParallelLinear(_OverTensorGroup, nn.Linear):
    """``y_shard [S/W, B, N] = RS(x [S, B, K/W] · w_shard [N, K/W]ᵀ) + b``."""

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        y = ops.matmul_reduce_scatter(
            flat, _local(self.weight), self.group, self.site, _main_grad(self.weight)
        )
        if self.bias is not None:
            y = y + self.bias
        return self._shard_like(y, x)


class VocabularyParallelEmbedding(_OverTensorGroup, nn.Embedding):
    """Rows of the table are sharded; ``tokens [S, B]`` (the same on every rank) -> ``[S/W, B, H]``."""

    def forward(self, tokens: Tensor) -> Tensor:
        table, main = _local(self.weight), _main_grad(self.weight)
        first, vocabulary = self.rank * table.shape[0], self.world * table.shape[0]
        # FSDP2 wants no views of what a module gives it.
        whole = tokens if tokens.shape[0] % self.world == 0 else tokens.reshape(-1)
        return embedding.vocabulary_parallel_embedding(
            whole, table, first, vocabulary, self.group, self.site, main
        )


@dataclass
class _Style(ParallelStyle):
    rows: Rows | None = None

    def _convert(
        self, module: nn.Module, wanted: type, becomes: type, mesh: DeviceMesh, shards: dict[str, int]
    ) -> nn.Module:
        """Make ``module`` a ``becomes``; ``shards`` maps parameters to the dimension they are cut along."""
        if not isinstance(module, wanted):
            raise UserError(
                f"{type(self).__name__} applies to {wanted.__name__}, not to {type(module).__name__}"
            )
        present = {name: dim for name, dim in shards.items() if getattr(module, name) is not None}
        for name, dim in present.items():
            shape = module.get_parameter(name).shape
            if shape[dim] % mesh.size():
                raise UserError(
                    f"dimension {dim} of {name} {list(shape)} of {type(module).__name__} does not divide by "
                    f"the tensor-parallel degree {mesh.size()}"
                )
        for name, dim in present.items():
            _shard(module, name, dim, mesh)
        # The module keeps its parameters, hooks and name; only what forward does changes.
        module.__class__ = becomes
        module._join(mesh, self.rows)  # type: ignore[operator]
        return module


def _shard(module: nn.Module, name: str, dim: int, mesh: DeviceMesh) -> None:
    parameter = module.get_parameter(name)
    local = parameter.detach().chunk(mesh.size(), dim)[mesh.get_local_rank()].contiguous()
    sharded = DTensor.from_local(local, mesh, [Shard(dim)], run_check=False)
    setattr(module, name, nn.Parameter(sharded, requires_grad=parameter.requires_grad))


class ColumnParallel(_Style):
    """Shard an ``nn.Linear`` by output features; its input is sharded by rows, its output is not."""

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        shards = {"weight": 0, "bias": 0}
        return self._convert(module, nn.Linear, ColumnParallelLinear, device_mesh, shards)


class VocabularyParallelHead(_Style):
    """Shard an ``nn.Linear`` that also gives the loss, ``head(x, targets)``, by its rows, the vocabulary."""

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        if getattr(module, "bias", None) is not None:
            raise UserError("VocabularyParallelHead applies to a Linear without bias: give it bias=False")
        return self._convert(module, nn.Linear, VocabularyParallelHeadLinear, device_mesh, {"weight": 0})


class ColumnParallelPacked(_Style):
    """As ``ColumnParallel``, for a layer called as ``layer(x, other, packing)`` with one of that style."""

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        shards = {"weight": 0, "bias": 0}
        return self._convert(module, nn.Linear, ColumnParallelPackedLinear, device_mesh, shards)


class RowParallel(_Style):
    """Shard an ``nn.Linear`` by input features; its output is sharded by rows. The bias is replicated."""

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        return self._convert(module, nn.Linear, RowParallelLinear, device_mesh, {"weight": 1})


class VocabularyParallel(_Style):
    """Shard an ``nn.Embedding`` by vocabulary; its output is sharded by rows."""

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        return self._convert(module, nn.Embedding, VocabularyParallelEmbedding, device_mesh, {"weight": 0})


class SequenceParallel(_Style):
    """Run a module (a norm, dropout) on row shards. Its parameters stay whole on every rank."""

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        return module


__all__ = [
    "ColumnParallel",
    "ColumnParallelPacked",
    "RowParallel",
    "Rows",
    "SequenceParallel",
    "VocabularyParallel",
    "VocabularyParallelHead",
]
