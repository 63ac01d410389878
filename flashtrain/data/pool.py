"""Worker processes that make the parts of a set. They end with the process that started them."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import connection
from pathlib import Path
from typing import Any

from flashtrain.data import parts
from flashtrain.data.inputs import Shard
from flashtrain.data.parts import Damaged
from flashtrain.data.tokenizer import Tokenizer, load_tokenizer
from flashtrain.errors import UserError

_REFRESH = 0.2  # seconds between two reports of progress


@dataclass(frozen=True)
class Work:
    """What every worker does to its shards."""

    folder: Path
    tokenizer: str
    boundary: str | None
    field: str
    damaged: Damaged


def each(work: Work, shards: Mapping[str, Shard], workers: int, advance: Callable[[int, int], None]) -> None:
    """Make the part of every shard that has none yet; ``shards`` by their keys.

    Where there are fewer shards than ``workers``, a worker tokenizes on several threads instead. Raises
    what the first worker to fail raised, and UserError if one was killed; parts made so far stay.
    """
    total = sum(shard.size for shard in shards.values())
    missing = {key: shard for key, shard in shards.items() if parts.load(work.folder, key) is None}
    before = total - sum(shard.size for shard in missing.values())
    advance(before, total)
    if not missing:
        return
    processes = min(workers, len(missing))
    context = multiprocessing.get_context("spawn")  # threads of the tokenizer do not survive a fork
    consumed, stop = context.Value("q", 0), context.Event()
    with ProcessPoolExecutor(
        processes, context, _start, (work, max(1, workers // processes), consumed, stop)
    ) as executor:
        futures = {executor.submit(_make, key, shard) for key, shard in missing.items()}
        try:
            while futures:
                finished, futures = wait(futures, _REFRESH, FIRST_COMPLETED)
                for future in finished:
                    _result(future)
                advance(before + consumed.value, total)
        finally:
            stop.set()  # after a failure or an interrupt; otherwise nobody is left to see it
            executor.shutdown(wait=False, cancel_futures=True)


def _result(future: Future) -> None:
    try:
        future.result()
    except BrokenProcessPool:
        raise UserError(
            "a worker process was killed, perhaps for want of memory: run the same command again to go on "
            "where it stopped, with fewer --workers"
        ) from None


class _Stopped(Exception):
    """Another worker failed, or the user interrupted."""


_work: Work
_tokenizer: Tokenizer
_consumed: Any
_stop: Any


def _start(work: Work, threads: int, consumed: Any, stop: Any) -> None:
    global _work, _tokenizer, _consumed, _stop
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent hears it too, and tells
    threading.Thread(target=_die_with_parent, daemon=True).start()
    # Read by the tokenizers library when it first encodes a batch.
    os.environ["TOKENIZERS_PARALLELISM"] = "true" if threads > 1 else "false"
    os.environ["RAYON_NUM_THREADS"] = str(threads)
    _work, _consumed, _stop = work, consumed, stop
    _tokenizer = load_tokenizer(work.tokenizer, work.boundary)


def _die_with_parent() -> None:
    """A worker waits for work on a pipe whose other end it holds too, so a killed parent would leave it."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    connection.wait([parent.sentinel])
    os._exit(1)


def _make(key: str, shard: Shard) -> None:
    parts.make(shard, key, _work.folder, _tokenizer, _work.field, _work.damaged, _advance)


def _advance(size: int) -> None:
    if _stop.is_set():
        raise _Stopped
    with _consumed.get_lock():
        _consumed.value += size
