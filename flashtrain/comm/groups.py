"""Process groups by name: ops take a name, because torch.compile cannot carry a group."""

import torch.distributed as dist
from torch.distributed.distributed_c10d import _resolve_process_group


def resolve(name: str) -> dist.ProcessGroup:
    """The process group that ``group.group_name`` names. Raises RuntimeError if there is none."""
    return _resolve_process_group(name)  # type: ignore[arg-type, unused-ignore]
