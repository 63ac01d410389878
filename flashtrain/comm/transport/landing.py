"""Where the chunks of a schedule land at their receiver; known to both ends, so a sender can write there."""

from dataclasses import dataclass

from flashtrain.comm.schedule import Schedule


@dataclass(frozen=True)
class Landing:
    """Rows of the buffer in which a rank takes in the chunks of ``schedule``.

    A direct scatter brings one version of the own rows from every rank: ``[world, own rows]``, slot after
    slot. Everything else brings every chunk at most once: ``[M]``, each chunk at its rows of the gathered
    tensor.
    """

    schedule: Schedule

    @property
    def slotted(self) -> bool:
        """Whether there is one slot a rank."""
        return not self.schedule.gathers and self.schedule.kind == "direct"

    def rows(self, rank: int) -> int:
        """Rows of the buffer of ``rank``."""
        if not self.slotted:
            return self.schedule.rows
        own = self.schedule.rows_of(rank)
        return self.schedule.world * (own.stop - own.start)

    def most_rows(self) -> int:
        """Rows of the largest buffer of any rank: what ranks with equal buffers must have."""
        return max(self.rows(rank) for rank in range(self.schedule.world))

    def span(self, rank: int, chunk: int, slot: int) -> slice:
        """Rows of the buffer of ``rank`` in which ``chunk`` of slot ``slot`` lands."""
        _, offset, rows = self.schedule.chunks[chunk]
        if self.slotted:
            own = self.schedule.rows_of(rank)
            offset += slot * (own.stop - own.start) - own.start
        return slice(offset, offset + rows)
