"""Blocks that carry chunks to peers, on multiprocessors of their own, beside a product.

Beside a product a copying block that shares its multiprocessor gets half the links' bandwidth; one that has
it for itself, with 32 warps, gets all. Stores to all peers at once need no ranks in step, as copy engines
do, and no start of a copy for each chunk. What they take from the product is their multiprocessors.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from flashtrain.kernels.launch import INTERPRETED, Argument, Pointer, launch
from flashtrain.kernels.overlapped_matmul.signals import deliver, wait_flag

UNIT_BYTES = 16
_WARPS, _UNITS = 32, 4096  # a block moves so many units at a time: four a thread
_CARGO = tl.constexpr(8)  # fields of a Cargo


class Cargo(NamedTuple):
    """A rectangle of the source in units of 16 bytes: ``rows`` of ``width``, ``pitch`` apart, from ``start``.

    At the receiver it begins at ``landing``, rows as far apart. ``column`` is its flag there; ``owner``
    receives it, or all peers; ``signal`` says that it is ready, where it is not from the beginning.
    """

    start: int
    rows: int
    width: int
    pitch: int
    landing: int
    column: int
    owner: int
    signal: int


@triton.jit
def receiver(directory, peer, landing):  # type: ignore[no-untyped-def]
    there = tl.load(directory + peer).to(tl.pointer_type(tl.int32))
    return tl.multiple_of(there, 16) + landing * 4


@triton.jit
def carry_kernel(  # type: ignore[no-untyped-def]
    source,
    directory,
    counters,
    ready,
    stop,
    cargos,
    epoch,
    messages,
    rank,
    WORLD: tl.constexpr,
    EVERY: tl.constexpr,
    TEAMS: tl.constexpr,
    UNITS: tl.constexpr,
):
    """Carry all ``cargos``, ``EVERY`` one to all peers, else each to its owner once it is ready.

    Blocks form ``TEAMS`` that take messages in turn: while one waits until the peers have what it stored,
    another stores.
    """
    team = tl.program_id(0) % TEAMS
    member = tl.program_id(0) // TEAMS
    members = (tl.num_programs(0) - team + TEAMS - 1) // TEAMS
    for message in range(team, messages, TEAMS):
        cargo = cargos + message * _CARGO
        start = tl.load(cargo).to(tl.int64)
        units = tl.load(cargo + 1) * tl.load(cargo + 2)
        width = tl.load(cargo + 2)
        pitch = tl.load(cargo + 3)
        landing = tl.load(cargo + 4).to(tl.int64)
        owner = tl.load(cargo + 6)
        if not EVERY:
            start += wait_flag(ready + tl.load(cargo + 7), epoch, stop, 1)
        for first in range(member * UNITS, units, members * UNITS):
            unit = first + tl.arange(0, UNITS)
            row = unit // width
            words = ((row * pitch + unit - row * width) * 4)[:, None] + tl.arange(0, 4)[None, :]
            inside = (unit < units)[:, None]
            # Past the first-level cache, which knows nothing of what the product has written by TMA.
            piece = tl.load(source + start * 4 + words, mask=inside, other=0, cache_modifier=".cg")
            if EVERY:
                for step in tl.static_range(1, WORLD):
                    peer = (rank + WORLD - step) % WORLD
                    tl.store(receiver(directory, peer, landing) + words, piece, mask=inside)
            else:
                tl.store(receiver(directory, owner, landing) + words, piece, mask=inside)
        begin = 0 if EVERY else owner
        end = WORLD if EVERY else owner + 1
        column = tl.load(cargo + 5)
        deliver(counters + message, members, directory, column, epoch, begin, end, rank, WORLD)


class Carrier:
    """``carry_kernel`` prepared for ``cargos`` and ``blocks``, each of which wants a multiprocessor.

    ``every``: each cargo goes to all peers. Building it compiles; it keeps no tensor of the caller's alive.
    """

    def __init__(
        self,
        cargos: Sequence[Cargo],
        blocks: int,
        *,
        every: bool,
        teams: int,
        rank: int,
        world: int,
        device: torch.device,
    ) -> None:
        self.cargos = torch.tensor([*cargos], dtype=torch.int32).reshape(-1, len(Cargo._fields)).to(device)
        self.blocks, self.rank = blocks, rank
        self._arguments: dict[str, Argument] = {
            "source": Pointer(torch.int32, aligned=True),
            "directory": Pointer(torch.int64),
            **{name: Pointer(torch.int32) for name in ("counters", "ready", "stop", "cargos")},
            **dict.fromkeys(("epoch", "messages", "rank")),
        }
        self.constants = {
            "WORLD": world,
            "EVERY": every,
            "TEAMS": min(teams, blocks),
            "UNITS": 8 if INTERPRETED else _UNITS,
        }
        self.launch: Any = None  # of flashtrain._core; none under the interpreter
        if not INTERPRETED:
            self.launch, _ = launch(
                carry_kernel, self._arguments, self.constants, warps=_WARPS, stages=1, device=device
            )

    @property
    def names(self) -> list[str]:
        """Of the kernel's parameters, in the order in which ``launch`` takes their values."""
        return list(self._arguments)

    def template(self, **addresses: int) -> list[int]:
        """A value for each of ``names``: the cargos, how many, the rank, and what is given; all else 0."""
        known = {
            "cargos": self.cargos.data_ptr(), "messages": len(self.cargos), "rank": self.rank, **addresses,
        }  # fmt: skip
        return [known.get(name, 0) for name in self._arguments]
