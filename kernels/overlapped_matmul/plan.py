"""The order of tiles as the kernels read it: chunks in schedule order, cut into row tiles."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from flashtrain.errors import UserError


class Part(NamedTuple):
    """One chunk: its number (the index of its flag), its rows ``[offset, offset + rows)``, whether it is own.

    A sequence of parts is a schedule: own chunks first in a gather, last in a scatter. Own chunks must be
    contiguous rows; a chunk may be empty.
    """

    chunk: int
    offset: int
    rows: int
    own: bool


@dataclass(frozen=True)
class TilePlan:
    """Records of all row tiles, then of the empty chunks of others, as int32 on the device."""

    records: Tensor
    row_tiles: int
    own_row_tiles: int
    empties: int
    masked: bool  # some chunk is shorter than a tile
    total_rows: int
    own_rows: int
    own_offset: int
    first_own: int  # lowest number of an own chunk
    own_chunks: int
    chunks: int  # flags that the chunks need


def own_block(parts: Sequence[Part]) -> tuple[int, int]:
    """``(offset, rows)`` of the own chunks together."""
    own = sorted((part.offset, part.rows) for part in parts if part.own)
    offset = own[0][0] if own else 0
    end = offset
    for start, rows in own:
        if rows and start != end:
            raise UserError(f"own chunks must be contiguous rows, but rows {end} to {start} belong to others")
        end += rows
    return offset, end - offset


@lru_cache(maxsize=1024)
def tile_plan(parts: tuple[Part, ...], tile_rows: int, *, gathers: bool, device: torch.device) -> TilePlan:
    """Cut ``parts`` into row tiles of ``tile_rows`` rows.

    Operand rows count from the own block for own chunks of a gather, which are read in place, output rows
    for own chunks of a scatter, which are kept. Raises UserError if two parts share a number or rows, or if
    a scatter does not end with the own chunks.
    """
    numbers = [part.chunk for part in parts]
    if len(set(numbers)) != len(numbers) or min(numbers, default=0) < 0:
        raise UserError(f"chunk numbers must be distinct and not negative, not {numbers}")
    end = 0
    for part in sorted(parts, key=lambda part: (part.offset, part.rows)):
        if part.rows < 0 or part.offset < end:
            raise UserError(f"chunk {part.chunk} starts at row {part.offset}, inside the chunk before it")
        end = part.offset + part.rows
    owned = [part.own for part in parts]
    if not gathers and owned != sorted(owned):
        raise UserError("in a scatter the own chunks come last; order the chunks by the schedule")
    offset, own_rows = own_block(parts)
    records: list[int] = []
    row_tiles = 0
    for part in parts:
        count = -(-part.rows // tile_rows)
        local = part.offset - offset
        source = local if part.own and gathers else part.offset
        target = local if part.own and not gathers else part.offset
        records += [row_tiles, count, source, target, part.rows, part.chunk, int(part.own)] * count
        row_tiles += count
    empties = [part for part in parts if not part.rows and not part.own]
    for part in empties:
        records += [0, 0, 0, 0, 0, part.chunk, 0]
    own = [part.chunk for part in parts if part.own]
    return TilePlan(
        records=torch.tensor([*records, 0], dtype=torch.int32).to(device),
        row_tiles=row_tiles,
        own_row_tiles=sum(-(-part.rows // tile_rows) for part in parts if part.own),
        empties=len(empties),
        masked=any(0 < part.rows < tile_rows for part in parts),
        total_rows=end,
        own_rows=own_rows,
        own_offset=offset,
        first_own=min(own, default=0),
        own_chunks=len(own),
        chunks=max(numbers, default=-1) + 1,
    )
