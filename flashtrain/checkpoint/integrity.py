"""Whether the files of a checkpoint are those that its manifest lists: cheaply by size, fully by hash."""

from collections.abc import Iterable
from pathlib import Path

from flashtrain.checkpoint.files import is_plain_file, sha256_of, sync_file, user_errors
from flashtrain.checkpoint.manifest import FileEntry, Manifest
from flashtrain.errors import UserError


def check_files(path: Path, manifest: Manifest, sets: Iterable[str]) -> None:
    """Check that the files of ``sets`` are there, with the sizes of the manifest, and no others.

    Raises UserError that names the first file that is missing, is a link or stands behind one, has
    another size, or is not listed (the reader would take it for a part of the checkpoint).
    """
    with user_errors(f"cannot read checkpoint {path}"):
        for set_name in sets:
            listed = {
                name: entry for name, entry in manifest.files.items() if name.startswith(f"{set_name}/")
            }
            for name, entry in listed.items():
                file = path / name
                if file.is_symlink() or file.parent.is_symlink():
                    raise UserError(f"checkpoint {file} is reached through a symbolic link, which is refused")
                if not is_plain_file(file):
                    raise UserError(f"checkpoint {file} is missing")
                size = file.stat().st_size
                if size != entry.bytes:
                    raise UserError(
                        f"checkpoint {file} is damaged: it has {size} bytes, the manifest says {entry.bytes}"
                    )
            for file in sorted((path / set_name).glob("*.safetensors")):
                if f"{set_name}/{file.name}" not in listed:
                    raise UserError(f"checkpoint {path} is damaged: {file} is not in its manifest")


def check_hashes(path: Path, manifest: Manifest, names: Iterable[str]) -> None:
    """Check the sha256 of the named files. Raises UserError with both hashes at the first that differs."""
    with user_errors(f"cannot read checkpoint {path}"):
        for name in names:
            file, expected = path / name, manifest.files[name].sha256
            found = sha256_of(file)
            if found != expected:
                raise UserError(
                    f"checkpoint {file} is damaged: its sha256 is {found}, the manifest says {expected}"
                )


def sync_and_hash(path: Path, names: Iterable[str]) -> dict[str, FileEntry]:
    """Make the named files under ``path`` durable; return their hashes and sizes."""
    entries = {}
    for name in names:
        # DCP's own fsync comes before its last buffer is flushed, so up to 8 KiB may not be on the disk.
        sync_file(path / name)
        entries[name] = FileEntry(sha256_of(path / name), (path / name).stat().st_size)
    return entries
