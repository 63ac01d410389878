"""Landing buffers that are read after their operation has ended, as tensors that are lent.

With B buffers in turn, peers may write into the buffer of operation k once this rank has opened operation
k + B - 1 (``csrc/copy_engine.hpp``). So a loan must be over by then: its tensor gone, and what read it before
whatever the stream of that opening is given next. A tensor that somebody still holds moves to memory of its
own instead, which is slow, but right.
"""

import logging
import weakref
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

log = logging.getLogger("flashtrain.comm")


@dataclass(eq=False, frozen=True, kw_only=True)
class _Loan:
    tensor: "weakref.ref[Tensor]"
    site: str
    overdue: Callable[[], None]


class Loans:
    """What is lent of the landing buffers of one transport, which tells of each operation that it opens.

    ``quiesce`` waits until this rank's device is idle.
    """

    def __init__(self, quiesce: Callable[[], None]) -> None:
        self._quiesce = quiesce
        self._asked: _Loan | None = None  # for the next operation
        self._taken = False  # by that
        self._lent: list[_Loan | None] = []  # by the place of their buffer
        self._settled: list[bool] = []  # by place: who read it last was lent it, or nobody ever read it

    def reset(self, buffers: int) -> None:
        """There are new buffers. What is lent of the old ones stays where it is: nobody writes there."""
        self._asked, self._lent, self._settled = None, [None] * buffers, [True] * buffers

    def lend(self, view: Tensor, site: str, overdue: Callable[[], None]) -> Tensor | None:
        """``view [...]`` for the next operation, as a tensor of its own; None if it is lent for that already.

        ``overdue`` is called if it must move. Whoever drops the tensor has seen to it that what reads it
        comes before all that is given later to the streams of this transport's operations.
        """
        if self._waiting():
            return None
        with torch.inference_mode(False):
            # Not a view: views of that would keep what it is a view of alive, and not it.
            lent = view.new_empty(0).set_(
                view.untyped_storage(), view.storage_offset(), view.shape, view.stride()
            )
        self._asked, self._taken = _Loan(tensor=weakref.ref(lent), site=site, overdue=overdue), False
        return lent

    def settled(self, place: int) -> bool:
        """Whether whatever read buffer ``place`` comes before what a borrower does with it next."""
        return self._settled[place]

    def take(self, out: Tensor) -> bool:
        """Whether ``out [...]`` was lent for the next operation, which is about to be opened."""
        self._taken = self._asked is not None and self._asked.tensor() is out
        return self._taken

    def opening(self, place: int) -> None:
        """The next operation, which lands in buffer ``place``, is about to be opened.

        Raises ValueError if that was lent for another.
        """
        asked = self._asked
        if asked is not None and not self._taken and asked.tensor() is not None:
            raise ValueError(f"an output was allocated for {asked.site}, but another operation begins")
        self._lent[place], self._settled[place] = (asked, True) if self._taken else (None, False)
        self._asked, self._taken = None, False
        after = (place + 1) % len(self._lent)
        self._recall(after)

    def _waiting(self) -> bool:
        return self._asked is not None and self._asked.tensor() is not None

    def _recall(self, place: int) -> None:
        """Peers are about to be allowed to write into buffer ``place``."""
        loan, self._lent[place] = self._lent[place], None
        held = None if loan is None else loan.tensor()
        if loan is None or held is None:
            return
        log.warning(
            "what was gathered for %s is held while many others are: it moves, and is copied from now on",
            loan.site,
        )
        # Its readers wait for the operation, not for what follows, so the copy is complete before they begin.
        self._quiesce()
        with torch.inference_mode(False), torch.no_grad():
            held.set_(held.clone())  # type: ignore[call-overload]
        self._quiesce()
        loan.overdue()
