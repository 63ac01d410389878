"""The landing buffers of one group: some of equal size on every rank, which operations use in turn."""

import logging
from collections.abc import Callable

import torch
from torch import Tensor

from flashtrain.comm.transport.symmetric import ALIGNMENT, SymmetricBuffer
from flashtrain.errors import TransportError, UserError

log = logging.getLogger("flashtrain.comm")


class Arena:
    """Memory in which peers put chunks, of at most ``budget`` bytes a rank.

    It grows when an operation needs more than it has, which all ranks see at the same operation because they
    compute the need of the largest rank: ``quiesce`` (collective) waits until nothing moves on any rank,
    ``exchange`` compares the new sizes, then the old memory is freed and ``allocate`` (collective) makes the
    new. Otherwise nothing is allocated or freed. ``moved`` learns the new addresses, the distance in bytes
    between two buffers, and how many there are: ``most``, or two where the budget allows no more. After
    ``pin`` the memory in use is never freed but by ``free``.
    """

    def __init__(
        self,
        allocate: Callable[[int], SymmetricBuffer],
        exchange: Callable[[str], list[str]],
        quiesce: Callable[[], None],
        moved: Callable[[tuple[int, ...], int, int], None],
        budget: int,
        most: int = 2,
    ) -> None:
        self._allocate, self._exchange, self._quiesce, self._moved = allocate, exchange, quiesce, moved
        self.budget, self._most = budget, most
        self._buffer: SymmetricBuffer | None = None
        self._each = 0
        self.buffers = most
        self._pinned = False
        self._kept: list[SymmetricBuffer] = []
        self._views: dict[tuple[int, torch.dtype, tuple[int, ...]], Tensor] = {}

    @property
    def nbytes(self) -> int:
        """Device memory that this rank holds."""
        return self.buffers * self._each + sum(buffer.memory.nbytes for buffer in self._kept)

    @property
    def room(self) -> int:
        """Bytes of each buffer."""
        return self._each

    def pin(self) -> None:
        """CUDA graphs hold the addresses of the memory that is in use now."""
        self._pinned = True

    def reserve(self, nbytes: int, site: str) -> None:
        """Make room for ``nbytes`` in each buffer; ``site`` is for messages.

        Raises UserError if that exceeds the budget, TransportError if ranks differ in what they need.
        """
        if nbytes <= self._each and self._buffer is not None:
            return
        each = max(1, -(-nbytes // ALIGNMENT)) * ALIGNMENT
        kept = self.nbytes if self._pinned else self.nbytes - self.buffers * self._each
        buffers = self._most if self._most * each + kept <= self.budget else 2
        if buffers * each + kept > self.budget:
            raise UserError(
                f"{site or 'an operation'} needs landing buffers of 2 x {_mib(each)}"
                f"{f' beside {_mib(kept)} that CUDA graphs use' if kept else ''}, but comm.arena_bytes "
                f"allows {_mib(self.budget)}; raise it, or use more ranks or fewer tokens"
            )
        failure, mine = None, str(each)
        try:
            self._quiesce()
        except RuntimeError as error:
            failure, mine = error, "none, after an error"
        sizes = self._exchange(mine)  # a rank that failed says so: the others would wait for it
        if failure is not None:
            raise failure
        if len(set(sizes)) > 1:
            raise TransportError(
                f"{site or 'unnamed site'}: ranks need landing buffers of different sizes (bytes: "
                f"{', '.join(sizes)}); one has failed, or they run different operations"
            )
        # Nobody writes into the old memory any more, and its views are the last that refer to it.
        self._views.clear()
        if self._pinned and self._buffer is not None:
            self._kept.append(self._buffer)
        self._buffer, self._pinned = None, False
        with torch.inference_mode(False):
            self._buffer = self._allocate(buffers * each)
        self.buffers, self._each = buffers, each
        self._moved(self._buffer.addresses, each, buffers)
        log.info(
            "landing buffers of %d ranks: %d x %s a rank, of at most %s in all (for %s)%s",
            len(self._buffer.addresses), buffers, _mib(each), _mib(self.budget), site or "an unnamed site",
            "" if buffers == self._most else f"; with {self._most} of them less would be copied",
        )  # fmt: skip

    def view(self, place: int, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
        """Buffer ``place`` as a contiguous tensor ``[*shape]``; views are made once and kept."""
        key = (place, dtype, shape)
        view = self._views.get(key)
        if view is None:
            assert self._buffer is not None
            nbytes = torch.Size(shape).numel() * dtype.itemsize
            start = place * self._each
            # A view made in inference mode could not be written outside it.
            with torch.inference_mode(False):
                view = self._buffer.memory[start : start + nbytes].view(dtype).view(shape)
            if len(self._views) >= 4096:
                self._views.clear()
            self._views[key] = view
        return view

    def free(self) -> None:
        """Give the memory back; nothing may move on any rank."""
        self._views.clear()
        self._kept.clear()
        self._buffer, self._each = None, 0


def _mib(nbytes: int) -> str:
    return f"{nbytes / 2**20:.0f} MiB"
