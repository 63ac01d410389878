"""The device mesh: named dimensions, their degrees, and the group of each."""

from dataclasses import dataclass

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from flashtrain.errors import UserError

DATA, TENSOR = "data", "tensor"


@dataclass(frozen=True, kw_only=True)
class Degrees:
    """Ranks per dimension of parallelism. ``tensor`` is the innermost: its ranks are neighbours."""

    tensor: int = 1
    data: int = 1

    @property
    def world(self) -> int:
        """Ranks in all."""
        return self.tensor * self.data

    def validate(self) -> None:
        for name, degree in (("tensor", self.tensor), ("data", self.data)):
            if degree < 1:
                raise UserError(f"parallel.{name} is {degree}; it must be at least 1")


def build(degrees: Degrees, device_type: str) -> DeviceMesh:
    """The mesh ``(data, tensor)`` over all ranks of the initialised default group.

    Collective. Raises UserError if the degrees do not multiply to the number of ranks.
    """
    degrees.validate()
    world = dist.get_world_size()
    if degrees.world != world:
        raise UserError(
            f"parallel.tensor {degrees.tensor} x parallel.data {degrees.data} asks for {degrees.world} "
            f"ranks, but {world} were started"
        )
    return init_device_mesh(device_type, (degrees.data, degrees.tensor), mesh_dim_names=(DATA, TENSOR))
