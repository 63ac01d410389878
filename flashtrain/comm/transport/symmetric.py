"""Device memory that all ranks of a group map, by ``torch.distributed._symmetric_memory``.

The only file that touches that private module; what is used of it is the same in torch 2.11 and 2.13. Memory
comes from the backend "CUDA" (virtual memory management, handles passed through sockets in ``$TMPDIR``), not
from the caching allocator, and needs no multicast.
"""

import os
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

ALIGNMENT = 2 << 20  # granularity of the driver's mappings


@dataclass(frozen=True)
class SymmetricBuffer:
    """``memory`` ``[bytes]`` uint8 of this rank; ``addresses`` of every rank's, as this process maps them."""

    memory: Tensor
    addresses: tuple[int, ...]


def allocate(nbytes: int, device: torch.device, group: dist.ProcessGroup) -> SymmetricBuffer:
    """A buffer of ``nbytes`` on every rank, not initialised; it is freed with its ``memory``.

    Collective, and slow: processes exchange file descriptors. Raises RuntimeError if ranks cannot map each
    other's memory.
    """
    from torch._C._distributed_c10d import _SymmetricMemory

    # symm_mem.empty may take a piece of a memory pool, whose offset can differ between ranks.
    memory = _SymmetricMemory.empty_strided_p2p((nbytes,), (1,), torch.uint8, device)
    handle = _SymmetricMemory.rendezvous(memory, group.group_name)
    if handle is None:
        raise RuntimeError("symmetric memory did not rendezvous")
    # buffer_ptrs are the bases of the allocations, not the addresses of the tensors (pytorch#162193).
    offset = getattr(handle, "offset", 0)
    if offset != 0 or handle.buffer_ptrs[group.rank()] != memory.data_ptr():
        raise RuntimeError(f"symmetric memory begins at offset {offset} of its allocation, not at 0")
    return SymmetricBuffer(memory, tuple(handle.buffer_ptrs))


def facts(device: torch.device) -> str:
    """What the other ranks must know of this rank's device: machine, device, devices within its reach.

    Raises RuntimeError if symmetric memory runs on another backend than CUDA.
    """
    from torch.distributed import _symmetric_memory as symmetric_memory

    backend = symmetric_memory.get_backend(device)
    if backend != "CUDA":
        raise RuntimeError(
            f"symmetric memory uses the backend {backend}, not CUDA (environment: TORCH_SYMMMEM)"
        )
    with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
        machine = file.read().strip()
    own = device.index if device.index is not None else torch.cuda.current_device()
    visible, reached = [], []
    for index in range(torch.cuda.device_count()):
        name = str(torch.cuda.get_device_properties(index).uuid)
        visible.append(name)
        if index == own or torch.cuda.can_device_access_peer(own, index):
            reached.append(name)
    namespace = os.stat("/proc/self/ns/pid").st_ino
    return ";".join((f"{machine}/{namespace}", visible[own], ",".join(visible), ",".join(reached)))


def refusal(everyone: list[str]) -> str:
    """Why ranks with these facts cannot share device memory, or nothing; the same verdict on every rank."""
    for rank, text in enumerate(everyone):
        if text.startswith("error:"):
            return f"rank {rank}: {text.removeprefix('error:')}"
    parsed = [text.split(";") for text in everyone]
    for rank, (machine, device, visible, reached) in enumerate(parsed):
        for peer, (peer_machine, peer_device, _, _) in enumerate(parsed):
            if rank == peer:
                continue
            if machine != peer_machine:
                return f"ranks {rank} and {peer} run on different machines or in different containers"
            if device == peer_device:
                return f"ranks {rank} and {peer} share one GPU"
            # A device that this rank does not see cannot be asked about; the trial tells.
            if peer_device in visible.split(",") and peer_device not in reached.split(","):
                return f"the GPU of rank {rank} cannot reach that of rank {peer} (no NVLink, no peer access)"
    return ""
