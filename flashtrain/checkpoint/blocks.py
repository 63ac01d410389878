"""Which block of a tensor this rank holds, for plain tensors and for DTensors on any mesh."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.placement_types import _StridedShard

from flashtrain.checkpoint.manifest import TensorEntry
from flashtrain.errors import UserError

# What both safetensors and DCP's reader carry through unchanged.
_DTYPES = {
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.bool,
}


@dataclass(frozen=True)
class Block:
    """The block of a tensor that this rank holds: ``local`` starts at ``offset`` of a tensor of ``shape``.

    ``local`` shares memory with the tensor it was taken from, so filling it loads in place.
    """

    shape: tuple[int, ...]
    offset: tuple[int, ...]
    local: Tensor

    @property
    def is_empty(self) -> bool:
        """Whether this rank holds no element, as happens with more ranks than rows."""
        return self.local.numel() == 0

    def cut(self, whole: Tensor) -> Tensor:
        """What of the whole tensor, of ``shape``, is this rank's: a view."""
        sizes = zip(self.offset, self.local.shape, strict=True)
        return whole[tuple(slice(start, start + size) for start, size in sizes)]


def entry_of(where: str, tensor: Tensor) -> TensorEntry:
    """Shape and dtype of the whole tensor. Raises UserError if it cannot be stored."""
    if not isinstance(tensor, Tensor):
        raise UserError(f"{where} is a {type(tensor).__name__}, not a tensor: put plain values into meta")
    if tensor.dtype not in _DTYPES:
        raise UserError(f"{where} has dtype {tensor.dtype}, which checkpoints cannot hold: convert it first")
    if tensor.device.type == "meta":
        raise UserError(f"{where} is on the meta device and has no values: materialise it first")
    if tensor.layout != torch.strided:
        raise UserError(f"{where} has layout {tensor.layout}, which checkpoints cannot hold: make it dense")
    return TensorEntry(tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))


def block_of(where: str, tensor: Tensor) -> Block | None:
    """The block of ``tensor`` on this rank, or None if the rank is not part of the tensor's mesh.

    A plain tensor is taken to be the same on every rank. Raises UserError for partial sums and for
    placements whose rows on this rank are not one contiguous block.

    DCP's own computation is not used: where FSDP2 over a tensor-parallel dimension shards unevenly it
    follows the left-to-right meaning of ``_StridedShard``, while the memory holds what ``fully_shard``
    cut out of the tensor-parallel shard (7 rows, tp 2, dp 3: the last row is on another rank).
    """
    shape = tuple(tensor.shape)
    if not isinstance(tensor, DTensor):
        return Block(shape, (0,) * len(shape), tensor.detach())
    coordinate = tensor.device_mesh.get_coordinate()
    if coordinate is None:
        return None
    offset, size = [0] * len(shape), list(shape)
    for dim in range(len(shape)):
        for mesh_dim in _sharding_order(where, tensor, dim):
            # As torch.chunk and fully_shard cut: equal pieces, rounded up, until the rows run out.
            piece = -(-size[dim] // tensor.device_mesh.size(mesh_dim))
            start = min(piece * coordinate[mesh_dim], size[dim])
            offset[dim] += start
            size[dim] = min(piece, size[dim] - start)
    local = tensor.to_local().detach()
    if tuple(local.shape) != tuple(size):
        raise UserError(
            f"{where} with placements {tensor.placements} on mesh {tuple(tensor.device_mesh.shape)} holds "
            f"{list(local.shape)} on rank coordinate {list(coordinate)} where {size} was expected: "
            "shard it as distribute_tensor or fully_shard do"
        )
    return Block(shape, tuple(offset), local)


def _sharding_order(where: str, tensor: DTensor, dim: int) -> list[int]:
    """The mesh dimensions that shard tensor dimension ``dim``, in the order in which they cut it.

    Placements cut from left to right, but FSDP2 puts its mesh dimension on the left and cuts last, what
    tensor parallelism has left; it marks that with ``_StridedShard``, whose split factor is the number of
    pieces that were there before.
    """
    mesh, order = tensor.device_mesh, list[int]()
    for mesh_dim in reversed(range(mesh.ndim)):
        placement = tensor.placements[mesh_dim]
        if placement.is_replicate():
            continue
        if not isinstance(placement, Shard | _StridedShard):
            raise UserError(f"{where} has placement {placement}: reduce it before it is saved or loaded")
        if placement.dim % tensor.ndim != dim:
            continue
        if isinstance(placement, _StridedShard) and placement.split_factor > 1:
            pieces = math.prod(mesh.size(earlier) for earlier in order)
            if placement.split_factor != pieces:
                raise UserError(
                    f"{where} has placements {tensor.placements} on mesh {tuple(mesh.shape)}, whose rows "
                    "are not one block on each rank: shard it as distribute_tensor or fully_shard do"
                )
            order.append(mesh_dim)
        else:
            order.insert(0, mesh_dim)
    return order
