"""Run a save in a forked child and stop it at its n-th file-system operation."""

import errno
import os
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
_CHANGES = {"os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.truncate", "os.link", "os.symlink"}


def in_child(action: Callable[[], Any]) -> int:
    """Run ``action`` in a forked child; return 0, 1 after an exception, or minus the number of a signal."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            action()
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def watch(folder: Path, on_change: Callable[[str, str], None]) -> None:
    """Call ``on_change(operation, path)`` before each change inside ``folder``. Cannot be undone.

    Paths relative to an open directory, as shutil.rmtree uses, come as they are.
    """
    busy = False

    def tell(operation: str, path: object) -> None:
        nonlocal busy
        if busy or not isinstance(path, str | os.PathLike):
            return
        place = os.fspath(path)
        if os.path.isabs(place) and Path(place) != folder and folder not in Path(place).parents:
            return
        busy = True
        try:
            on_change(operation, place)
        finally:
            busy = False

    def hook(event: str, args: tuple[Any, ...]) -> None:
        if event in _CHANGES or (event == "open" and isinstance(args[2], int) and args[2] & _WRITING):
            tell(event, args[0])

    # fsync raises no audit event.
    fsync = os.fsync

    def watched_fsync(descriptor: int) -> None:
        tell("fsync", os.readlink(f"/proc/self/fd/{descriptor}"))
        fsync(descriptor)

    os.fsync = watched_fsync
    sys.addaudithook(hook)


def kill_at(folder: Path, number: int) -> None:
    """Kill this process with SIGKILL right before its change ``number``, counted from 1."""
    count = 0

    def on_change(operation: str, path: str) -> None:
        nonlocal count
        count += 1
        if count == number:
            os.kill(os.getpid(), signal.SIGKILL)

    watch(folder, on_change)


def fail_at(folder: Path, number: int) -> list[str]:
    """Let change ``number``, counted from 1, fail as on a full disk; return the list that changes go to."""
    changes = []

    def on_change(operation: str, path: str) -> None:
        changes.append(f"{operation} {path}")
        if len(changes) == number:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)

    watch(folder, on_change)
    return changes
