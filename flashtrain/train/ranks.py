"""Joining the ranks of a run, and saying who they are."""

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from flashtrain.comm import transport
from flashtrain.errors import UserError
from flashtrain.parallel.mesh import CONTEXT, DATA, TENSOR, token_ranks
from flashtrain.train.rendezvous import agent_store


@contextmanager
def joined(timeout: float) -> Iterator[torch.device]:
    """Initialise the default process group; yields this rank's device.

    Under torchrun the ranks it started are used, otherwise this process is the only rank. Raises UserError if
    the machine has GPUs, and none for this rank.
    """
    launched = "RANK" in os.environ
    device = torch.device("cpu")
    if torch.cuda.is_available():
        local, gpus = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
        if local >= gpus:
            raise UserError(
                f"there is no GPU for local rank {local}, as this machine has {gpus}: start fewer ranks on "
                "it (parallel.tensor, parallel.data)"
            )
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    patience = timedelta(seconds=timeout)
    if launched and (store := agent_store(timeout)) is not None:
        rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        dist.init_process_group(backend, timeout=patience, store=store, rank=rank, world_size=world)
    elif launched:
        dist.init_process_group(backend, timeout=patience)
    else:
        dist.init_process_group(backend, timeout=patience, store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield device
    finally:
        transport.shutdown()
        dist.destroy_process_group()


def log_to_stderr() -> None:
    """Show this package's log on stderr: all of rank 0, of other ranks warnings alone, with the rank."""
    logger = logging.getLogger("flashtrain")
    rank = dist.get_rank()
    if not logger.handlers:
        handler = logging.StreamHandler(sys.stderr)
        prefix = "" if rank == 0 else f"rank {rank}: "
        handler.setFormatter(logging.Formatter(f"[%(name)s] {prefix}%(message)s"))
        logger.addHandler(handler)
    logger.setLevel(logging.INFO if rank == 0 else logging.WARNING)


def describe(mesh: DeviceMesh, device: torch.device, by_branches: bool = False) -> str:
    """Who computes and what moves the bytes, in one line. Collective: it chooses the transports.

    ``by_branches``: ranks of the tensor dimension have a branch of each block.
    """
    parts = []
    for dimension in (TENSOR, CONTEXT, DATA):
        if dimension not in (mesh.mesh_dim_names or ()):
            continue
        ranks = mesh[dimension]
        if ranks.size() > 1:
            # Data parallelism reduces over context ranks, too.
            over = token_ranks(mesh) if dimension == DATA else ranks
            mover = transport.of(over.get_group().group_name, device)
            how = "branch" if by_branches and dimension == TENSOR else dimension
            parts.append(f"{how} parallel over {ranks.size()} ranks by {mover.name}")
    where = (
        torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"CPU, {torch.get_num_threads()} threads"
    )
    return f"{' and '.join(parts) or 'one rank'} ({where} a rank)"
