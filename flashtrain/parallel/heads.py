"""Tensor parallelism of projections to heads that several ranks may need.

A module of such a projection has ``share(part, parts)``: which rows of which parameters make the output of
one of ``parts`` ranks, in order. A parameter of which each rank needs its own block, in rank order, is
sharded. Any other is whole on every rank, which computes with its rows alone: one product, gathered once, as
if all were sharded, and the gradient of the input is complete, since the ranks' parts of it are added up
anyway. The gradient of such a parameter holds what this rank's heads made of it, and is summed over the group
after the backward pass with those of the norms (``sum_replicated_gradients``).
"""

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from flashtrain.errors import UserError
from flashtrain.parallel import tensor

Run = tuple[str, int, int]


class HeadParallelLinear(tensor.ColumnParallelLinear):
    """``y [S, B, n] = AG(x_shard [S/W, B, K]) · wᵀ + b`` of the rows that make this rank's heads."""

    taken: tuple[Run, ...]

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, rows={self.taken}"

    def _operands(self) -> tuple[Tensor, Tensor | None, None]:
        weight = self._rows("weight")
        assert weight is not None
        # Rows of several parameters: autograd takes their gradients apart again.
        return weight, self._rows("bias"), None

    def _rows(self, kind: str) -> Tensor | None:
        found = []
        for name, start, stop in self.taken:
            parameter = getattr(self, name.replace("weight", kind))
            if parameter is None:
                return None
            found.append(tensor._local(parameter)[start:stop])
        return found[0] if len(found) == 1 else torch.cat(found)


class HeadParallel(tensor._Style):
    """Split a projection to heads by output heads; its input is sharded by rows, its output is not.

    An ``nn.Linear`` that says nothing about shares is split as by ``ColumnParallel``.
    """

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        if not hasattr(module, "share"):
            return tensor.ColumnParallel(self.rows)._apply(module, device_mesh)
        world, rank = device_mesh.size(), device_mesh.get_local_rank()
        try:
            parts = [module.share(part, world) for part in range(world)]  # type: ignore[operator]
        except UserError as error:
            raise UserError(f"{error}; choose parallel.tensor among their divisors") from None
        sizes = [sum(stop - start for _, start, stop in part.rows) for part in parts]
        if len(set(sizes)) > 1:
            raise UserError(
                f"these pairs give {world} ranks {min(sizes)} to {max(sizes)} rows of Q, K and V to compute: "
                "put pairs that share heads side by side, in shares that need equally many"
            )
        taken: dict[Run, Run] = {run: run for run in parts[rank].rows}
        for name in {name for name, _, _ in parts[rank].rows}:
            runs = [[(start, stop) for other, start, stop in part.rows if other == name] for part in parts]
            rows = module.get_parameter(name).shape[0]
            size = rows // world
            if rows % world == 0 and runs == [[(r * size, (r + 1) * size)] for r in range(world)]:
                taken[name, *runs[rank][0]] = (name, 0, size)
                for kind in ("weight", "bias"):
                    own = name.replace("weight", kind)
                    if getattr(module, own) is not None:
                        tensor._shard(module, own, 0, device_mesh)
        module.pairing, module.by_unit = parts[rank].pairing, parts[rank].by_unit
        module.__class__ = HeadParallelLinear
        module.taken = tuple(taken.values())  # type: ignore[assignment]
        module._join(device_mesh, self.rows)  # type: ignore[operator]
        return module


__all__ = ["HeadParallel", "HeadParallelLinear"]
