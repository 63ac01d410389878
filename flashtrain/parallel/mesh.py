"""The device mesh: named dimensions, their degrees, and the group of each."""

from dataclasses import dataclass

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from flashtrain.errors import UserError

DATA, TENSOR = "data", "tensor"


@dataclass(frozen=True, kw_only=True)
class Degrees:
    """Ranks per dimension of parallelism. ``tensor`` is the innermost: its ranks are neighbours.

    ``branches`` 2, for blocks of attention and SSM side by side: one rank has the SSM of each, another the
    attention. They take the place of two tensor-parallel ranks.
    """

    tensor: int = 1
    data: int = 1
    branches: int = 1

    @property
    def world(self) -> int:
        """Ranks in all."""
        return self.tensor * self.data * self.branches

    def __str__(self) -> str:
        """The settings and their values, for messages."""
        degrees = {name: degree for name, degree in vars(self).items() if name != "branches" or degree > 1}
        return " x ".join(f"parallel.{name} {degree}" for name, degree in degrees.items())

    def validate(self) -> None:
        for name, degree in vars(self).items():
            if degree < 1:
                raise UserError(f"parallel.{name} is {degree}; it must be at least 1")
        if self.branches > 2:
            raise UserError(f"parallel.branches is {self.branches}; it must be 1 or 2, as a block has two")
        if self.branches > 1 and self.tensor > 1:
            raise UserError(
                f"parallel.branches is {self.branches} and parallel.tensor {self.tensor}: "
                "set one of them to 1"
            )


def build(degrees: Degrees, device_type: str) -> DeviceMesh:
    """The mesh ``(data, tensor)`` over all ranks of the initialised default group.

    Ranks of branches are in the dimension ``tensor``. Collective. Raises UserError if the degrees do not
    multiply to the number of ranks.
    """
    degrees.validate()
    world = dist.get_world_size()
    if degrees.world != world:
        raise UserError(f"{degrees} asks for {degrees.world} ranks, but {world} were started")
    shape = degrees.data, degrees.tensor * degrees.branches
    return init_device_mesh(device_type, shape, mesh_dim_names=(DATA, TENSOR))
