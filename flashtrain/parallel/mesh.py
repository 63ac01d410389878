"""The device mesh: named dimensions, their degrees, and the group of each."""

from dataclasses import dataclass

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from flashtrain.errors import UserError

DATA, CONTEXT, TENSOR = "data", "context", "tensor"


@dataclass(frozen=True, kw_only=True)
class Degrees:
    """Ranks per dimension of parallelism. ``tensor`` is the innermost: its ranks are neighbours.

    ``branches`` 2, for blocks of attention and SSM side by side: one rank has the SSM of each, another the
    attention. They take the place of two tensor-parallel ranks. ``context`` ranks have a segment each of the
    same sequences.
    """

    tensor: int = 1
    data: int = 1
    branches: int = 1
    context: int = 1

    @property
    def world(self) -> int:
        """Ranks in all."""
        return self.tensor * self.data * self.branches * self.context

    def __str__(self) -> str:
        """The settings and their values, for messages."""
        shown = {name: n for name, n in vars(self).items() if name in (TENSOR, DATA) or n > 1}
        return " x ".join(f"parallel.{name} {degree}" for name, degree in shown.items())

    def validate(self) -> None:
        for name, degree in vars(self).items():
            if degree < 1:
                raise UserError(f"parallel.{name} is {degree}; it must be at least 1")
        if self.branches > 2:
            raise UserError(f"parallel.branches is {self.branches}; it must be 1 or 2, as a block has two")
        for name in (TENSOR, CONTEXT):
            if self.branches > 1 and getattr(self, name) > 1:
                raise UserError(
                    f"parallel.branches is {self.branches} and parallel.{name} {getattr(self, name)}: "
                    "set one of them to 1"
                )


def build(degrees: Degrees, device_type: str) -> DeviceMesh:
    """The mesh ``(data, tensor)``, or ``(data, context, tensor)``, over all ranks of the default group.

    Ranks of branches are in the dimension ``tensor``. Collective. Raises UserError if the degrees do not
    multiply to the number of ranks.
    """
    degrees.validate()
    world = dist.get_world_size()
    if degrees.world != world:
        raise UserError(f"{degrees} asks for {degrees.world} ranks, but {world} were started")
    shape = {DATA: degrees.data, CONTEXT: degrees.context, TENSOR: degrees.tensor * degrees.branches}
    if degrees.context == 1:
        del shape[CONTEXT]
    return init_device_mesh(device_type, tuple(shape.values()), mesh_dim_names=tuple(shape))


def token_ranks(mesh: DeviceMesh) -> DeviceMesh:
    """The ranks that have the same part of each parameter and see other tokens, as one dimension.

    Those of ``data``, and of ``context`` where ``mesh`` has it. Collective at its first use.
    """
    names = [name for name in (DATA, CONTEXT) if name in (mesh.mesh_dim_names or ())]
    if len(names) == 1:
        return mesh[names[0]]
    return mesh[tuple(names)]._flatten("tokens")
