"""Decomposed peer-to-peer schedules: who computes which chunk when, and sends it where.

A collective is split into one transfer per pair of ranks, and the matrix product around it into one
partial product per chunk, so that every transfer but an unavoidable end runs beside a product
(arXiv 2604.24013, algorithms 1, 2 and 5). The order is held in a ``Schedule``, an immutable list of
steps for one rank. Nothing else decides an order: the simulator checks this list and every transport
runs it.

Chunk computed by rank r at step i of W (all indices modulo W):

    op               kind     computes     transfers during step i
    all_gather       direct   r + i        own chunk to r-i-1; chunk r+i+1 arrives from its owner
    all_gather       ring     r - i        chunk r-i on to r+1; chunk r-i-1 arrives from r-1
    reduce_scatter   direct   r + 1 + i    partial of r+1+i to its owner; a partial of r arrives from r-1-i
    reduce_scatter   ring     r - 1 - i    running sum of r-1-i to r+1; that of r-2-i arrives from r-1
    all_to_all       direct   r + 1 + i    as reduce_scatter direct, without the addition

So an all-gather starts with the chunk that the rank owns, and a reduce-scatter ends with it. The last
step of every schedule is silent. In a direct schedule all ranks have distinct sources and distinct
destinations at every step, so no link carries two chunks at once.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, NamedTuple

Operation = Literal["all_gather", "reduce_scatter", "all_to_all"]
Kind = Literal["direct", "ring"]


class Chunk(NamedTuple):
    """Rows ``[offset, offset + rows)`` of the gathered tensor; they belong to rank ``owner``."""

    owner: int
    offset: int
    rows: int


class Send(NamedTuple):
    """Send ``chunk`` to rank ``dst``, where it fills the slot of rank ``slot``."""

    chunk: int
    dst: int
    slot: int


class Expect(NamedTuple):
    """``chunk`` arrives from rank ``src`` and fills the slot of rank ``slot``."""

    chunk: int
    src: int
    slot: int


class Step(NamedTuple):
    """Compute ``compute``; during this step put ``sends`` on their way and take in ``expects``.

    An expected chunk must have landed before this rank finishes with the chunk of the same number:
    before its product in a gather, after its product (to be added or placed) in a scatter.
    """

    compute: int
    sends: tuple[Send, ...]
    expects: tuple[Expect, ...]


class Wait(NamedTuple):
    """Block until ``expect`` has landed."""

    step: int
    expect: Expect


class Compute(NamedTuple):
    """Run the product of ``chunk``."""

    step: int
    chunk: int


class Transfer(NamedTuple):
    """Start ``sends`` and take in ``expects``; returns at once."""

    step: int
    sends: tuple[Send, ...]
    expects: tuple[Expect, ...]


Action = Wait | Compute | Transfer


@dataclass(frozen=True)
class Schedule:
    """The steps of one rank.

    ``chunks`` lists all chunks of the gathered tensor, ``subchunks`` of them per rank in row order, so
    chunk ``c`` belongs to rank ``c // subchunks``. Rows may be ragged and chunks may be empty; an empty
    chunk is computed and sent like any other.
    """

    op: Operation
    kind: Kind
    world: int
    rank: int
    subchunks: int
    chunks: tuple[Chunk, ...]
    steps: tuple[Step, ...]

    @property
    def rows(self) -> int:
        """Rows of the gathered tensor."""
        return sum(chunk.rows for chunk in self.chunks)

    @property
    def gathers(self) -> bool:
        """Whether products consume what arrives (all-gather) or produce what is sent."""
        return self.op == "all_gather"

    @property
    def own(self) -> range:
        """The chunks that belong to this rank."""
        return range(self.rank * self.subchunks, (self.rank + 1) * self.subchunks)

    @property
    def own_rows(self) -> slice:
        """The rows of the gathered tensor that belong to this rank."""
        return self.rows_of(self.rank)

    def rows_in(self, chunk: int) -> slice:
        """The rows of the gathered tensor that ``chunk`` holds."""
        _, offset, rows = self.chunks[chunk]
        return slice(offset, offset + rows)

    def rows_of(self, rank: int) -> slice:
        """The rows of the gathered tensor that belong to ``rank``."""
        mine = self.chunks[rank * self.subchunks : (rank + 1) * self.subchunks]
        return slice(mine[0].offset, mine[-1].offset + mine[-1].rows)

    def actions(self) -> Iterator[Action]:
        """The steps as the flat program that executors, transports and the simulator run.

        In a gather a step waits for its chunk, starts its transfers, then computes; in a scatter it
        computes, waits for what is to be added to the chunk, then starts its transfers.
        """
        arriving: dict[int, list[Expect]] = {}
        for step in self.steps:
            for expect in step.expects:
                arriving.setdefault(expect.chunk, []).append(expect)
        for index, step in enumerate(self.steps):
            waits = [Wait(index, expect) for expect in arriving.get(step.compute, ())]
            transfer = Transfer(index, step.sends, step.expects)
            silent = not (step.sends or step.expects)
            if self.gathers:
                yield from waits
                if not silent:
                    yield transfer
                yield Compute(index, step.compute)
            else:
                yield Compute(index, step.compute)
                yield from waits
                if not silent:
                    yield transfer


def split_rows(rows: int, parts: int) -> tuple[int, ...]:
    """Sizes of ``parts`` contiguous pieces of ``rows`` rows, as ``torch.tensor_split`` cuts them."""
    size, longer = divmod(rows, parts)
    return tuple(size + 1 if part < longer else size for part in range(parts))


def _cut(rows_per_rank: Sequence[int], subchunks: int) -> tuple[Chunk, ...]:
    chunks, offset = [], 0
    for owner, rows in enumerate(rows_per_rank):
        for size in split_rows(rows, subchunks):
            chunks.append(Chunk(owner, offset, size))
            offset += size
    return tuple(chunks)


def _order(own_first: bool, world: int, subchunks: int, in_turn: bool) -> list[tuple[int, int]]:
    """(i, sub-chunk) of every step: one chunk after the other, or those of others ``in_turn``."""
    order = [(i, sub) for i in range(world) for sub in range(subchunks)]
    if in_turn:
        own = 0 if own_first else world - 1
        order.sort(key=lambda step: ((step[0] == own) != own_first, step[1], step[0]))
    return order


@lru_cache(maxsize=4096)
def _build(
    op: Operation, kind: Kind, rows: tuple[int, ...], rank: int, subchunks: int, in_turn: bool = False
) -> Schedule:
    world = len(rows)
    if not 0 <= rank < world:
        raise ValueError(f"rank {rank} is not one of {world} ranks")
    if subchunks < 1:
        raise ValueError(f"subchunks must be at least 1, not {subchunks}")
    if min(rows) < 0:
        raise ValueError(f"row counts must not be negative: {rows}")
    if in_turn and kind != "direct":
        raise ValueError("in a ring every chunk goes to one neighbour: there is nobody to take turns")

    def chunk(owner: int, sub: int) -> int:
        return owner % world * subchunks + sub

    order = _order(op == "all_gather", world, subchunks, in_turn)
    steps = []
    for place, (i, sub) in enumerate(order):
        last = place >= len(order) - subchunks
        match op, kind:
            case "all_gather", "direct":
                compute = chunk(rank + i, sub)
                # What is computed after as many steps as a rank has sub-chunks.
                ahead, part = (0, 0) if last else order[place + subchunks]
                sends = [Send(chunk(rank, part), (rank - ahead) % world, rank)]
                source = (rank + ahead) % world
                expects = [Expect(chunk(source, part), source, source)]
            case "all_gather", "ring":
                compute = chunk(rank - i, sub)
                sends = [Send(compute, (rank + 1) % world, (rank - i) % world)]
                expects = [Expect(chunk(rank - i - 1, sub), (rank - 1) % world, (rank - i - 1) % world)]
            case (("reduce_scatter" | "all_to_all"), "direct"):
                compute = chunk(rank + 1 + i, sub)
                sends = [Send(compute, (rank + 1 + i) % world, rank)]
                expects = [Expect(chunk(rank, sub), (rank - 1 - i) % world, (rank - 1 - i) % world)]
            case "reduce_scatter", "ring":
                compute = chunk(rank - 1 - i, sub)
                sends = [Send(compute, (rank + 1) % world, rank)]
                expects = [Expect(chunk(rank - 2 - i, sub), (rank - 1) % world, (rank - 1) % world)]
            case _:
                raise ValueError(f"there is no {kind} schedule for {op}")
        steps.append(Step(compute, () if last else tuple(sends), () if last else tuple(expects)))
    return Schedule(op, kind, world, rank, subchunks, _cut(rows, subchunks), tuple(steps))


def all_gather(
    rows_per_rank: Sequence[int],
    rank: int,
    *,
    kind: Kind = "direct",
    subchunks: int = 1,
    in_turn: bool = False,
) -> Schedule:
    """Schedule of all-gather followed by a product: the own chunk is computed first.

    ``rows_per_rank[c]`` is the number of rows that rank c holds; zero is allowed. Rows are those of the
    gathered tensor's leading dimension. ``in_turn`` takes one sub-chunk of each peer, then the next of each,
    for transports that send to all at once (direct only). Raises ValueError if ``rank``, ``kind`` or
    ``subchunks`` is out of range. Source: arXiv 2604.24013, algorithm 1 (ring); the direct order is its pull
    form.
    """
    return _build("all_gather", kind, tuple(rows_per_rank), rank, subchunks, in_turn)


def reduce_scatter(
    rows_per_rank: Sequence[int],
    rank: int,
    *,
    kind: Kind = "direct",
    subchunks: int = 1,
    in_turn: bool = False,
) -> Schedule:
    """Schedule of a product followed by reduce-scatter: the own chunk is computed last.

    ``rows_per_rank[c]`` is the number of rows that rank c keeps; zero is allowed. In the direct kind
    every partial travels once, to its owner, and the owner adds them in any order it likes; in the ring
    kind the running sum travels, so additions follow the ring: chunk c is summed in rank order
    c+1, c+2, ..., c. ``in_turn`` as above. Raises ValueError if ``rank``, ``kind`` or ``subchunks`` is out of
    range. Source: arXiv 2604.24013, algorithm 2 (ring).
    """
    return _build("reduce_scatter", kind, tuple(rows_per_rank), rank, subchunks, in_turn)


def all_to_all(
    rows_per_rank: Sequence[int], rank: int, *, kind: Kind = "direct", subchunks: int = 1
) -> Schedule:
    """Schedule of a product followed by all-to-all: the block that stays here is computed last.

    ``rows_per_rank[c]`` is the number of rows in the block for rank c, the same on every rank; zero is
    allowed. Raises ValueError if ``rank`` or ``subchunks`` is out of range, and for ``kind="ring"``,
    which would carry every block through its neighbours. Source: arXiv 2604.24013, algorithm 5.
    """
    return _build("all_to_all", kind, tuple(rows_per_rank), rank, subchunks)
