"""The directory of a run's checkpoints, as the one process sees it that changes it (rank 0).

    latest                      name of the checkpoint to resume from
    step-00001000/              a complete checkpoint; step-00001000-2 if that step was saved again
    .tmp-{save,delete,latest}-* a save or deletion under way, or one that was killed

A checkpoint appears in one rename when all of it is on the disk, and disappears in one rename before its
files are removed, so whatever has a final name is whole. The pointer moves in one rename after that.
"""

import logging
import os
import re
import secrets
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from flashtrain.checkpoint.files import (
    explain,
    make_directory,
    remove,
    sync_directory,
    user_errors,
    write_new,
)
from flashtrain.checkpoint.integrity import check_files
from flashtrain.checkpoint.manifest import MANIFEST, Manifest, read_manifest
from flashtrain.errors import UserError

logger = logging.getLogger(__name__)

POINTER = "latest"
_CHECKPOINT = re.compile(r"step-\d{8,}(-\d+)?")
_TEMPORARY = re.compile(r"\.tmp-(save|delete|latest)-.*")


class CheckpointDirectory:
    """Publishes, finds and removes checkpoints under ``path``, an absolute path that need not exist yet."""

    def __init__(self, path: Path, keep: int) -> None:
        self.path, self.keep = path, keep

    def begin(self, step: int, sets: Iterable[str]) -> Path:
        """Remove what killed saves have left; create and return the temporary directory of a new save."""
        make_directory(self.path)
        self.clean()
        temporary = self._temporary("save", f"step-{step:08d}")
        temporary.mkdir()
        for name in sets:
            (temporary / name).mkdir()
        return temporary

    def publish(self, temporary: Path, manifest: Manifest) -> Path:
        """Give the finished save its name, point to it, remove what is beyond ``keep``; return its path.

        The content of the files must be on the disk. The manifest's serial number is given here.
        """
        manifest = replace(manifest, serial=1 + max((serial for serial, _ in self._complete()), default=0))
        write_new(temporary / MANIFEST, manifest.to_text())
        for name in manifest.tensors:
            sync_directory(temporary / name)
        sync_directory(temporary)
        final = self._free_name(manifest.step)
        # The pointer's content is written before the checkpoint appears: a full disk then publishes nothing.
        pointer = self._temporary("latest", final.name)
        write_new(pointer, final.name + "\n")
        os.rename(temporary, final)
        sync_directory(self.path)
        os.rename(pointer, self.path / POINTER)
        sync_directory(self.path)
        self._prune(final)
        return final

    def clean(self) -> None:
        """Remove temporary files and directories; what cannot be removed is logged and left."""
        try:
            leftovers = [entry for entry in self.path.iterdir() if _TEMPORARY.fullmatch(entry.name)]
        except FileNotFoundError:
            return
        except OSError as error:
            logger.warning("cannot look for leftovers in %s: %s", self.path, explain(error))
            return
        for leftover in leftovers:
            try:
                remove(leftover)
            except OSError as error:
                logger.warning("cannot remove the leftover %s: %s", leftover, explain(error))

    def latest(self) -> Path | None:
        """The checkpoint that the pointer names, else the newest complete one, else None.

        Taking another one than the pointer names is logged. Raises UserError if the pointer names a
        checkpoint but none is complete: starting anew would then be a surprise.
        """
        with user_errors(f"cannot read the checkpoints in {self.path}"):
            if not self.path.exists():
                return None
            pointer = self.path / POINTER
            try:
                named = pointer.read_text(encoding="utf-8", errors="replace").removesuffix("\n")
            except FileNotFoundError:
                named = None
            if named is None:
                reason = "is missing"
            elif not _CHECKPOINT.fullmatch(named):
                reason = f"holds {named[:80]!r}, which is no name of a checkpoint"
            else:
                try:
                    _check_complete(self.path / named)
                    return self.path / named
                except UserError as error:
                    reason = f"names {named}, which is not complete ({error})"
            newest = self.newest()
            if newest is not None:
                logger.warning("%s %s; taking the newest complete checkpoint %s", pointer, reason, newest)
            elif named is not None:
                raise UserError(
                    f"{pointer} {reason}, and no other checkpoint there is complete: "
                    f"restore one, or delete {pointer} to start anew"
                )
            return newest

    def newest(self, but: Path | None = None) -> Path | None:
        """The complete checkpoint that was saved last, leaving out ``but``; None if there is none."""
        return max(((serial, path) for serial, path in self._complete() if path != but), default=(0, None))[1]

    def _complete(self) -> list[tuple[int, Path]]:
        """Serial number and path of the complete checkpoints, in the order in which they were saved."""
        found = []
        for entry in self.path.iterdir() if self.path.is_dir() else ():
            if not _CHECKPOINT.fullmatch(entry.name) or entry.is_symlink():
                continue
            try:
                found.append((_check_complete(entry).serial, entry))
            except UserError as error:
                logger.warning("%s is not counted as a checkpoint, and left alone: %s", entry, error)
        return sorted(found)

    def _prune(self, current: Path) -> None:
        """Remove all but the ``keep`` checkpoints saved last. A failure is logged: the save has succeeded."""
        for _, path in self._complete()[: -self.keep]:
            if path == current:
                continue
            try:
                doomed = self._temporary("delete", path.name)
                os.rename(path, doomed)
                sync_directory(self.path)
                remove(doomed)
            except OSError as error:
                logger.warning("cannot remove the old checkpoint %s: %s", path, explain(error))

    def _temporary(self, purpose: str, name: str) -> Path:
        return self.path / f".tmp-{purpose}-{name}-{secrets.token_hex(4)}"

    def _free_name(self, step: int) -> Path:
        base = f"step-{step:08d}"
        path, attempt = self.path / base, 1
        while os.path.lexists(path):
            attempt += 1
            path = self.path / f"{base}-{attempt}"
        return path


def _check_complete(path: Path) -> Manifest:
    if path.is_symlink():
        raise UserError(f"{path} is a symbolic link, which is refused: it may lead out of this directory")
    manifest = read_manifest(path)
    check_files(path, manifest, manifest.tensors)
    return manifest
