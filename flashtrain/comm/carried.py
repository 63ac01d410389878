"""Carriers of a fused product, where copy engines do not push: their kernel, and what a chunk is to them."""

from typing import TYPE_CHECKING

import torch

from flashtrain.comm.schedule import Schedule
from flashtrain.comm.transport.landing import Landing
from flashtrain.kernels.overlapped_matmul.carry import UNIT_BYTES, Cargo, Carrier

if TYPE_CHECKING:
    from flashtrain.comm.transport.nvlink import NvlinkTransport

# Of carriers that gather: one stores while the other waits until what it stored has arrived.
_GATHERING_TEAMS = 2


def gathered(plan: Schedule, row_bytes: int, ranges: list[tuple[int, int]]) -> list[Cargo]:
    """Each own chunk for all peers, one range of columns ``[begin, end)`` after the other."""
    found, pitch = [], row_bytes // UNIT_BYTES
    columns = ranges[-1][1] // pitch  # of a unit
    for sub, chunk in enumerate(plan.own):
        _, offset, rows = plan.chunks[chunk]
        for part, (begin, end) in enumerate(ranges):
            first, width = begin // columns, (end - begin) // columns
            start, column = (offset - plan.own_rows.start) * pitch + first, sub * len(ranges) + part
            found.append(Cargo(start, rows, width, pitch, offset * pitch + first, column, 0, 0))
    return found


def scattered(plan: Schedule, row_bytes: int) -> list[Cargo]:
    """Each partial for its owner, once the product has signalled it by the number of its step."""
    found, width, where = [], row_bytes // UNIT_BYTES, Landing(plan)
    for number, step in enumerate(plan.steps):
        owner, offset, rows = plan.chunks[step.compute]
        if owner != plan.rank:
            landing = where.span(owner, step.compute, plan.rank).start
            column = step.compute % plan.subchunks
            found.append(Cargo(offset * width, rows, width, width, landing * width, column, owner, number))
    return found


class Carriers:
    """``blocks`` that carry ``cargos`` of address number ``source``, of ``given`` that a product is given.

    ``call`` is what C++ launches; it reads the cargos, so keep this as long as that.
    """

    def __init__(
        self,
        mover: "NvlinkTransport",
        plan: Schedule,
        cargos: list[Cargo],
        blocks: int,
        source: int,
        given: int,
        device: torch.device,
    ) -> None:
        # Partials go to one peer each, those for different peers side by side.
        teams = _GATHERING_TEAMS if plan.gathers else plan.world - 1
        self._carrier = carrier = Carrier(
            cargos, blocks, every=plan.gathers, teams=teams, rank=plan.rank, world=plan.world, device=device
        )
        place, counters = carrier.names.index, mover.counters(device)[mover.core.flag_columns :]
        self.call = mover.core.KernelCall(
            launch=carrier.launch,
            blocks=blocks,
            values=carrier.template(counters=counters.data_ptr(), stop=mover.stop_word),
            places=[[place("source")] if number == source else [] for number in range(given)],
            epoch=[place("epoch")],
            directory=[place("directory")],
            signals=[place("ready")],
        )
