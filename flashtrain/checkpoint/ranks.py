"""Steps that all ranks take together: either all go on or all raise the same error."""

from collections.abc import Callable
from typing import NamedTuple, TypeVar

import torch.distributed as dist

from flashtrain.errors import UserError

T = TypeVar("T")


class _Failure(NamedTuple):
    by_user: bool
    message: str


class Ranks:
    """The ranks of a process group, or this process alone when torch.distributed is not initialised.

    An action that raises does so before its results are exchanged, so no rank is left waiting. A
    UserError is raised with its message on every rank; any other exception is raised as it is on its own
    rank and as a RuntimeError that quotes it on the others. If several ranks fail, the lowest one counts.
    """

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        self.group = group
        self.distributed = dist.is_available() and dist.is_initialized()
        self.rank = dist.get_rank(group) if self.distributed else 0
        self.world = dist.get_world_size(group) if self.distributed else 1

    def every(self, action: Callable[[], T]) -> list[T]:
        """Run ``action`` on every rank; return what each returned, in rank order, on every rank."""
        value, failure, error = _attempt(action)
        outcomes: list[tuple[T | None, _Failure | None]] = [(value, failure)]
        if self.distributed:
            outcomes *= self.world
            dist.all_gather_object(outcomes, (value, failure), group=self.group)
        for rank, (_, failed) in enumerate(outcomes):
            self._raise(rank, failed, error)
        return [value for value, _ in outcomes]  # type: ignore[misc]

    def first(self, action: Callable[[], T]) -> T:
        """Run ``action`` on rank 0 alone; return its result on every rank."""
        outcome: list[tuple[T | None, _Failure | None]] = [(None, None)]
        error = None
        if self.rank == 0:
            value, failure, error = _attempt(action)
            outcome = [(value, failure)]
        if self.distributed:
            dist.broadcast_object_list(outcome, group=self.group, group_src=0)
        self._raise(0, outcome[0][1], error)
        return outcome[0][0]  # type: ignore[return-value]

    def _raise(self, rank: int, failure: _Failure | None, error: Exception | None) -> None:
        if failure is None:
            return
        if rank == self.rank and error is not None:
            raise error
        if failure.by_user:
            raise UserError(failure.message)
        raise RuntimeError(f"rank {rank}: {failure.message}")


def _attempt(action: Callable[[], T]) -> tuple[T | None, _Failure | None, Exception | None]:
    try:
        return action(), None, None
    except UserError as error:
        return None, _Failure(True, str(error)), error
    except Exception as error:
        return None, _Failure(False, f"{type(error).__name__}: {error}"), error
