"""Who is where: host, local rank, device and process of every rank."""

import os
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
import torch.distributed as dist

from flashtrain.checkpoint.ranks import Ranks
from flashtrain.errors import UserError


@dataclass(frozen=True)
class Place:
    """Where one rank runs. ``node`` numbers the launchers that started ranks, one on each host."""

    rank: int
    node: int
    host: str
    local_rank: int
    device: str
    pid: int

    def __str__(self) -> str:
        return f"rank {self.rank} (local {self.local_rank}, {self.device}, pid {self.pid})"


def survey(device: torch.device) -> list[Place]:
    """The places of all ranks, in rank order, on every rank. Collective over the default group."""
    mine = Place(
        rank=dist.get_rank(),
        node=int(os.environ.get("GROUP_RANK", 0)),
        host=platform.node(),
        local_rank=int(os.environ.get("LOCAL_RANK", 0)),
        device=str(device),
        pid=os.getpid(),
    )
    return [Place(**place) for place in Ranks(None).every(lambda: asdict(mine))]


def by_node(places: Sequence[Place]) -> dict[int, list[Place]]:
    """The places of each node, in the order of the nodes."""
    nodes: dict[int, list[Place]] = {}
    for place in sorted(places, key=lambda place: (place.node, place.rank)):
        nodes.setdefault(place.node, []).append(place)
    return nodes


def describe(places: Sequence[Place]) -> list[str]:
    """One line for each node."""
    return [
        f"node {node}, {there[0].host}: {', '.join(map(str, there))}"
        for node, there in by_node(places).items()
    ]


def check(places: Sequence[Place], nodes: int | None) -> None:
    """Raise UserError, alike on all ranks, if they are not spread evenly over ``nodes`` (None: any)."""
    found = by_node(places)
    hosts = ", ".join(f"{there[0].host} ({len(there)} ranks)" for there in found.values())
    if nodes is not None and len(found) != nodes:
        raise UserError(f"nodes is {nodes}, but the {len(places)} ranks run on {len(found)}: {hosts}")
    if len({len(there) for there in found.values()}) > 1:
        raise UserError(f"start as many processes on every node; these have joined: {hosts}")
