"""The folder of a run belongs to one run at a time."""

import fcntl
import logging
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

from flashtrain.checkpoint.files import explain, user_errors
from flashtrain.checkpoint.ranks import Ranks
from flashtrain.errors import UserError

log = logging.getLogger("flashtrain.train")

LOCK = ".lock"
PATIENCE, _POLL = 5.0, 0.05  # seconds


def unwritable(out: Path) -> str:
    """How a message begins if what a run writes down of itself finds no room in ``out``."""
    return f"cannot write the records of the run in {out} (checkpoints are unchanged)"


@contextmanager
def claimed(out: Path) -> Iterator[None]:
    """Have the folder ``out``, made if missing, for this run alone. Collective over the default group.

    Rank 0 locks a file, which the system undoes when that process ends, however it does; it is gone after the
    run, and so is a folder to which that run added nothing. Waits ``PATIENCE`` for a run that has been killed
    and is still ending. Raises UserError on all ranks if another run goes on in ``out``, or nothing can be
    written there.
    """
    held: list[TextIO] = []
    there = out.exists()

    def claim() -> None:
        with user_errors(unwritable(out)):
            held.append(_locked(out, time.monotonic() + PATIENCE))

    try:
        Ranks(None).first(claim)
        yield
    finally:
        for file in held:
            with file, suppress(OSError):
                (out / LOCK).unlink()
                if not there:
                    out.rmdir()


def _locked(out: Path, deadline: float) -> TextIO:
    while True:
        out.mkdir(parents=True, exist_ok=True)
        file = (out / LOCK).open("a+", encoding="utf-8")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            with file:
                if time.monotonic() > deadline:
                    file.seek(0)
                    owner = file.read(200).strip() or "its process is not known"
                    raise UserError(
                        f"another run goes on in {out} ({owner}): wait for it, or choose another --out"
                    ) from None
            time.sleep(_POLL)
        except OSError as error:
            log.warning("cannot lock %s, so see to it that no other run uses it: %s", out, explain(error))
            return file
        else:
            if os.fstat(file.fileno()).st_nlink > 0:
                break
            file.close()  # the run before removed it after it was opened here
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    file.flush()
    return file
