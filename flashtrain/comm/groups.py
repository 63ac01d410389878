"""Process groups by name: ops take a name, because torch.compile cannot carry a group."""

import torch.distributed as dist
from torch.distributed.distributed_c10d import _resolve_process_group


def resolve(name: str) -> dist.ProcessGroup:
    """The process group that ``group.group_name`` names. Raises RuntimeError if there is none."""
    return _resolve_process_group(name)  # type: ignore[arg-type, unused-ignore]


def backend(group: dist.ProcessGroup, device_type: str) -> str:
    """What moves tensors of ``device_type`` in ``group``: "gloo", "nccl", "fake", or "" for nothing.

    A group may hold one backend for each device type, such as "cpu:gloo,cuda:nccl".
    """
    parts = (part.partition(":") for part in dist.get_backend_config(group).split(","))
    return {device: name for device, _, name in parts}.get(device_type, "")
