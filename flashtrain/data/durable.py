"""Files that are whole and on the disk, name included, or not there at all."""

import os
from pathlib import Path
from typing import IO


def sync(stream: IO) -> None:
    """Make what was written to an open file durable; its name is not yet."""
    stream.flush()
    os.fsync(stream.fileno())


def move(fresh: Path, path: Path) -> None:
    """Rename a durable file, and make the new name durable too."""
    os.replace(fresh, path)
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def write(path: Path, text: str) -> None:
    """Write a file in one move. Names of files that are no UTF-8 survive in it."""
    fresh = path.with_name(f"{path.name}.fresh")
    with fresh.open("w", encoding="utf-8", errors="surrogateescape") as stream:
        stream.write(text)
        sync(stream)
    move(fresh, path)
