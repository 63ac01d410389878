"""Branch parallelism: one of two ranks has the SSM of every block, the other the attention.

For blocks with both side by side: FlowHN (arXiv 2505.19472), whose split by FLOPs lets both ranks compute
equally long, and parallel heads. A branch is a plain module, whole on its rank; on the other its parameters
are on the meta device, for their shapes alone. All that is not of a branch is cut over the two ranks as by
tensor parallelism, activations by rows and products by columns, so no FLOP is computed twice.

A block's rows are gathered, each rank computes its branch, and a reduce-scatter brings every rank both
branches' outputs for its own rows. To what one rank has computed the other adds zeros, which changes no
value. That moves up to twice the bytes that are needed, in messages whose sizes do not depend on the windows.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from flashtrain.comm import collectives
from flashtrain.errors import UserError
from flashtrain.parallel.ssm import Piece
from flashtrain.parallel.tensor import _OverTensorGroup, _Style

# Which branch is whose.
RANKS = ("ssm", "attention")


class _OverBranches(_OverTensorGroup):
    def _whole(self, x: Tensor, tokens: int) -> Tensor:
        """All rows ``[S, B, H]`` of which ``x`` is this rank's shard."""
        total = self.rows.total if self.rows is not None else None
        flat = collectives.all_gather(x.reshape(-1, x.shape[-1]), self.group, self.site, total)
        return flat.view(tokens, -1, flat.shape[-1])

    def _compute(self, piece: Piece, x: Tensor) -> Tensor:
        _, branch, compute = piece
        if branch == RANKS[self.rank]:
            return compute(x)
        zeros: Tensor = _Elsewhere.apply(x)
        return zeros

    def _own_rows(self, partial: Tensor, x: Tensor) -> Tensor:
        """This rank's rows of the sum of all ranks' ``partial [S, B, n]``, shaped as ``x``, its shard."""
        if torch.is_grad_enabled() and not partial.requires_grad:
            # This rank may have nothing to train in what the other has: both exchange in every pass.
            partial.requires_grad_()
        shard = collectives.reduce_scatter(partial.reshape(-1, partial.shape[-1]), self.group, self.site)
        return shard.view(*x.shape[:-1], shard.shape[-1])


class _Elsewhere(torch.autograd.Function):
    """Zeros in place of what another rank computes: in the graph, so that both exchange in every pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return torch.zeros_like(x)

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> Tensor:
        return torch.zeros_like(slopes[0])


class BranchRouting(_OverBranches, nn.Module):
    """FlowHN's routing: each rank computes the pieces of its branch, in their order."""

    def forward(self, x: Tensor, pieces: Sequence[Piece]) -> Tensor:
        """``x [S/2, B, H]``, or a shard ``[rows, H]``, -> the same; see the class that this one replaces."""
        counts = [count for count, _, _ in pieces]
        parts = self._whole(x, sum(counts)).split(counts)
        found = [self._compute(piece, part) for piece, part in zip(pieces, parts, strict=True)]
        return self._own_rows(torch.cat(found), x)


class BranchesBeside(_OverBranches, nn.Module):
    """Branches that see the same tokens: each rank computes its own on all of them."""

    def forward(self, x: Tensor, pieces: Sequence[Piece]) -> tuple[Tensor, ...]:
        """``x [S/2, B, H]``, or a shard ``[rows, H]``, -> as many; see the class that this one replaces."""
        whole = self._whole(x, pieces[0][0])
        found = torch.cat([self._compute(piece, whole) for piece in pieces], dim=-1)
        return self._own_rows(found, x).chunk(len(pieces), dim=-1)


class RoutedToBranches(_Style):
    """Replace a module ``routing(x, pieces)`` by one that leaves each branch to its rank."""

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        return self._convert(module, nn.Module, BranchRouting, device_mesh, {})


class BesideByBranches(_Style):
    """Replace a module ``beside(x, pieces)`` by one that leaves each branch to its rank."""

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        return self._convert(module, nn.Module, BranchesBeside, device_mesh, {})


@dataclass
class OfRank(_Style):
    """Leave a branch to one ``rank``: whole there, without memory elsewhere."""

    rank: int = 0

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        here = device_mesh.get_local_rank() == self.rank
        cast(Any, module).branch_is_here = here
        leave_out(module)
        return module


def check(model: nn.Module, ranks: int) -> None:
    """Raise UserError if the blocks of ``model`` cannot be computed by ``ranks``, a branch each."""
    if ranks != len(RANKS):
        raise UserError(f"a block has {len(RANKS)} branches, which are for as many ranks, not for {ranks}")
    for name, block in model.get_submodule("layers").named_children():
        if not (hasattr(block, "routing") or hasattr(block, "beside")):
            raise UserError(
                f"layers.{name} is a {type(block).__name__}, which has no attention and SSM side by side: "
                "ranks cannot have a branch each"
            )


def leave_out(model: nn.Module) -> None:
    """Free the memory of parameters that are for other ranks, also where it was allocated anew since."""
    for _, branch in _branches(model):
        for part in [] if branch.branch_is_here else branch.modules():
            for name, parameter in list(part.named_parameters(recurse=False)):
                setattr(part, name, nn.Parameter(parameter.detach().to("meta"), requires_grad=False))


def owned(model: nn.Module) -> set[str]:
    """Names of the parameters of branches, those here and those elsewhere."""
    return {f"{name}.{own}" for name, branch in _branches(model) for own, _ in branch.named_parameters()}


def modules(model: nn.Module) -> set[nn.Module]:
    """All modules of branches, those here and those elsewhere."""
    return {module for _, branch in _branches(model) for module in branch.modules()}


def absent(model: nn.Module) -> list[nn.Parameter]:
    """The parameters of branches that other ranks hold."""
    elsewhere = [branch for _, branch in _branches(model) if not branch.branch_is_here]
    return [parameter for branch in elsewhere for parameter in branch.parameters()]


def _branches(model: nn.Module) -> list[tuple[str, nn.Module]]:
    return [(name, part) for name, part in model.named_modules() if hasattr(part, "branch_is_here")]


__all__ = ["BesideByBranches", "BranchRouting", "BranchesBeside", "OfRank", "RoutedToBranches"]
