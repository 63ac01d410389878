"""Durable file operations: what is reported as written is on the disk, name included."""

import errno
import hashlib
import os
import secrets
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from flashtrain.errors import UserError

NO_ROOM = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
_REMEDIES = {
    errno.ENOSPC: "free space on this file system or choose another directory",
    errno.EDQUOT: "free some of your quota or choose another directory",
    errno.EFBIG: "raise the file size limit (ulimit -f) or choose another directory",
    errno.EROFS: "choose a directory on a writable file system",
    errno.EACCES: "make it writable for this user or choose another directory",
    errno.EPERM: "make it writable for this user or choose another directory",
}


def explain(error: OSError) -> str:
    """The reason of an OSError on one line, with what to do where that is known."""
    where = f" ({error.filename})" if error.filename is not None else ""
    remedy = _REMEDIES.get(error.errno or 0)
    return f"{error.strerror or error}{where}" + (f"; {remedy}" if remedy else "")


@contextmanager
def user_errors(what: str) -> Iterator[None]:
    """Turn an OSError inside into a UserError that starts with ``what``."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{what}: {explain(error)}") from error


def sync_directory(path: Path) -> None:
    """Make the names in a directory durable; a file's own fsync does not cover its name."""
    _sync(path, os.O_RDONLY | os.O_DIRECTORY)


def sync_file(path: Path) -> None:
    """Make the content of a file durable, whoever wrote it."""
    _sync(path, os.O_RDONLY)


def _sync(path: Path, flags: int) -> None:
    descriptor = os.open(path, flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_directory(path: Path) -> None:
    """Create a directory and its missing parents, each name durable."""
    missing = [place for place in (path, *path.parents) if not place.is_dir()]
    if missing:
        path.mkdir(parents=True, exist_ok=True)
    for place in reversed(missing):
        sync_directory(place.parent)


def write_new(path: Path, text: str) -> None:
    """Write a file that must not exist yet; its content is durable, its name is not."""
    with open(path, "x", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())


def remove(path: Path) -> None:
    """Remove a file, a link (not what it points to) or a directory with all that is in it."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def is_plain_file(path: Path) -> bool:
    """Whether ``path`` is a regular file in a real directory; a link in either place is not."""
    try:
        return stat.S_ISREG(path.lstat().st_mode) and stat.S_ISDIR(path.parent.lstat().st_mode)
    except (FileNotFoundError, NotADirectoryError):
        return False


def sha256_of(path: Path) -> str:
    """The sha256 of a file's content, in hexadecimal."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


@contextmanager
def new_directory(path: Path) -> Iterator[Path]:
    """A temporary sibling to fill, which gets the name ``path`` when the block ends, and not before.

    The files in it must be durable by then; names are made so here. After an exception nothing is left; a
    killed process leaves the sibling, ``.tmp-NAME-*``. Raises UserError if ``path`` exists and is not an
    empty directory, or if it cannot be made.
    """
    what = f"cannot write {path}"
    path = path.absolute()
    with user_errors(what):
        if os.path.lexists(path) and (path.is_symlink() or not path.is_dir() or any(path.iterdir())):
            raise UserError(f"{path} exists already: choose another name, or remove it first")
        make_directory(path.parent)
        temporary = path.parent / f".tmp-{path.name}-{secrets.token_hex(4)}"
        temporary.mkdir()
        try:
            yield temporary
            for folder, _, _ in os.walk(temporary):
                sync_directory(Path(folder))
            os.rename(temporary, path)
            sync_directory(path.parent)
        finally:
            if temporary.exists():
                remove(temporary)
