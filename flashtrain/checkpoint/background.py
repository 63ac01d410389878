"""Checkpoints that are written while training goes on: a copy in host memory, and a thread that saves it."""

import logging
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flashtrain.checkpoint.store import CheckpointStore, Prepared, TensorSets

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Saved:
    """A checkpoint that is complete: its step and path, and the seconds that its writing took."""

    step: int
    path: Path
    seconds: float


class BackgroundSaver:
    """Saves to ``store`` from a thread, one checkpoint at a time.

    A checkpoint is written and published by the same steps as by ``CheckpointStore.save``: ``latest``
    moves when all of it is on the disk, and until then names the one before. Each rank holds one copy of
    its blocks in host memory while a save is under way.

    Trap: the store needs a process group of its own that moves CPU tensors, because its messages between
    ranks run beside those of training. Call ``close`` before that group is destroyed.
    """

    def __init__(self, store: CheckpointStore) -> None:
        self.store = store
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._under_way: Future[Saved] | None = None

    def save(self, step: int, tensors: TensorSets, meta: dict[str, Any], rank_meta: Any = None) -> None:
        """Copy what ``CheckpointStore.save`` takes and return while a thread writes it. Collective.

        Raises UserError on all ranks if something given cannot be stored; RuntimeError if the save before
        this one was not taken by ``finish``.
        """
        if self._under_way is not None:
            raise RuntimeError("a save is under way: finish() it first")
        prepared = self.store.prepare(step, tensors, meta, rank_meta).copied()
        self._under_way = self._thread.submit(self._write, prepared)

    def _write(self, prepared: Prepared) -> Saved:
        started = time.monotonic()
        path = self.store.write(prepared)
        return Saved(prepared.step, path, time.monotonic() - started)

    @property
    def done(self) -> bool:
        """Whether a save has ended well on this rank, for ``finish`` to say so without waiting."""
        return self._ended and not self.failed

    @property
    def failed(self) -> bool:
        """Whether a save has ended with an error on this rank, for ``finish`` to raise it."""
        return self._ended and self._under_way is not None and self._under_way.exception() is not None

    @property
    def _ended(self) -> bool:
        return self._under_way is not None and self._under_way.done()

    def finish(self) -> Saved | None:
        """Wait for the save under way, None if there is none. Raises its error, alike on all ranks."""
        if self._under_way is None:
            return None
        under_way, self._under_way = self._under_way, None
        return under_way.result()

    def close(self) -> None:
        """Wait for the save under way and end the thread. An error is logged: another is on its way."""
        try:
            self.finish()
        except Exception as error:
            logger.error("the checkpoint under way is lost: %s", error)
        self._thread.shutdown()
