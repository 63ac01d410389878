"""The manifest of a checkpoint: what it holds, and the hash of every file.

The file ``manifest.json`` is one JSON object:

    format    "flashtrain checkpoint"
    version   1
    step      optimizer steps done
    serial    position in the order of saving; of two checkpoints the one saved later has the higher one
    meta      what the caller gave, the same for all ranks
    rank_meta one value per rank that saved, in rank order
    tensors   {set: {tensor name: {"shape": [...], "dtype": "float32"}}}
    files     {"model/shard-....safetensors": {"sha256": "...", "bytes": 123}}
    checksum  sha256 of the object without this field, keys sorted, no white space

Numbers that are not finite are written as Python's json does (NaN, Infinity) and come back as they were.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from flashtrain.checkpoint.files import explain, is_plain_file
from flashtrain.errors import UserError

MANIFEST = "manifest.json"
FORMAT = "flashtrain checkpoint"
VERSION = 1
SET_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_-]*")
_FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*\.safetensors")
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class TensorEntry:
    """Shape of the whole tensor, and its dtype without ``torch.``."""

    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class FileEntry:
    """Hash and size of one file."""

    sha256: str
    bytes: int


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """The content of ``manifest.json``; the fields are explained at the top of this module."""

    step: int
    serial: int
    meta: dict[str, Any]
    rank_meta: list[Any]
    tensors: dict[str, dict[str, TensorEntry]]
    files: dict[str, FileEntry]
    version: int = VERSION

    def to_text(self) -> str:
        """The manifest as the text of its file."""
        body = {"format": FORMAT, **asdict(self)}
        return json.dumps({**body, "checksum": _checksum(body)}, indent=1) + "\n"


def read_manifest(path: Path) -> Manifest:
    """Read and check the manifest of the checkpoint directory ``path``.

    Raises UserError if it is missing, is not valid JSON, has fields that this version does not know or
    lacks some, names a file outside the checkpoint, or does not match its own checksum.
    """
    file = path / MANIFEST
    if not path.is_dir():
        raise UserError(f"there is no checkpoint {path}: give the path of an existing checkpoint directory")
    if not is_plain_file(path.resolve() / MANIFEST):
        raise UserError(
            f"{path} is not a complete checkpoint: it has no file {MANIFEST}; resume from another one"
        )
    try:
        text = file.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot read {file}: {explain(error)}") from error
    except ValueError as error:
        raise _invalid(file, f"it is not JSON ({error})") from error
    return parse_manifest(file, text)


def parse_manifest(file: Path, text: str) -> Manifest:
    """The manifest that ``text`` holds; ``file`` is for messages. Raises UserError as ``read_manifest``."""
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _invalid(file, f"it is not JSON ({error})") from error
    return _parse(file, content)


def check_json(value: Any, where: str) -> None:
    """Raise UserError that names the first part of ``value`` that JSON cannot hold; tuples become lists."""
    match value:
        case None | bool() | int() | float() | str():
            return
        case list() | tuple():
            for index, item in enumerate(value):
                check_json(item, f"{where}[{index}]")
        case dict():
            for key, item in value.items():
                if not isinstance(key, str):
                    raise UserError(f"{where} has the key {key!r}, which JSON cannot hold: make it a string")
                check_json(item, f"{where}.{key}")
        case _:
            kind = type(value).__name__
            raise UserError(
                f"{where} is a {kind}, which JSON cannot hold: give numbers, strings, lists, dicts"
            )


def _checksum(body: Mapping[str, Any]) -> str:
    text = json.dumps(body, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def _invalid(file: Path, reason: str) -> UserError:
    return UserError(
        f"{file} is not a valid manifest: {reason}; delete {file.parent} or resume from another one"
    )


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _parse(file: Path, content: Any) -> Manifest:
    def demand(holds: bool, reason: str) -> None:
        if not holds:
            raise _invalid(file, reason)

    def fields(value: Any, expected: set[str], where: str) -> dict[str, Any]:
        demand(isinstance(value, dict), f"{where} is not an object")
        demand(set(value) >= expected, f"{where} lacks {', '.join(sorted(expected - set(value)))}")
        demand(
            set(value) <= expected,
            f"{where} has the unknown field {min(set(value) - expected, default='')!r}",
        )
        return value

    demand(isinstance(content, dict), "it is not an object")
    demand(content.get("format") == FORMAT, f"its format is {content.get('format')!r}, not {FORMAT!r}")
    demand(content.get("version") == VERSION, f"its version is {content.get('version')!r}, not {VERSION}")
    names = {"format", "version", "step", "serial", "meta", "rank_meta", "tensors", "files", "checksum"}
    body = dict(fields(content, names, "it"))
    checksum = body.pop("checksum")
    demand(checksum == _checksum(body), "it does not match its own checksum")
    demand(_is_count(body["step"]) and _is_count(body["serial"]), "step and serial must be whole numbers")
    demand(isinstance(body["meta"], dict), "meta is not an object")
    demand(isinstance(body["rank_meta"], list), "rank_meta is not a list")
    demand(isinstance(body["tensors"], dict), "tensors is not an object")
    demand(isinstance(body["files"], dict), "files is not an object")

    tensors: dict[str, dict[str, TensorEntry]] = {}
    for set_name, entries in body["tensors"].items():
        demand(SET_NAME.fullmatch(set_name) is not None, f"{set_name!r} is no name for a set of tensors")
        demand(isinstance(entries, dict), f"tensors.{set_name} is not an object")
        tensors[set_name] = {}
        for name, entry in entries.items():
            fields(entry, {"shape", "dtype"}, f"{set_name}/{name}")
            sizes = entry["shape"]
            demand(
                isinstance(sizes, list) and all(map(_is_count, sizes)),
                f"{set_name}/{name} has shape {sizes!r}",
            )
            demand(isinstance(entry["dtype"], str), f"{set_name}/{name} has dtype {entry['dtype']!r}")
            tensors[set_name][name] = TensorEntry(tuple(sizes), entry["dtype"])

    files: dict[str, FileEntry] = {}
    for name, entry in body["files"].items():
        set_name, _, base = name.partition("/")
        inside = set_name in tensors and _FILE_NAME.fullmatch(base) is not None
        demand(
            inside, f"it names the file {name!r}, which is not <set>/<name>.safetensors inside the checkpoint"
        )
        fields(entry, {"sha256", "bytes"}, name)
        hashed = isinstance(entry["sha256"], str) and _SHA256.fullmatch(entry["sha256"]) is not None
        demand(hashed and _is_count(entry["bytes"]), f"the hash or size of {name} is malformed")
        files[name] = FileEntry(entry["sha256"], entry["bytes"])

    return Manifest(
        step=body["step"],
        serial=body["serial"],
        meta=body["meta"],
        rank_meta=body["rank_meta"],
        tensors=tensors,
        files=files,
    )
