"""Folders of whole tensors in safetensors, as Hugging Face keeps a model: one file, or several and an index.

Reading looks at headers first and then at one tensor after the other; writing takes one file at a time. So
memory stays near the size of a file, whatever the model's.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from flashtrain.checkpoint.files import explain, sync_file, user_errors, write_new
from flashtrain.checkpoint.manifest import TensorEntry
from flashtrain.errors import UserError

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}


@dataclass(frozen=True)
class WholeTensor:
    """A tensor of such a folder: its entry, and the file that holds it."""

    name: str
    file: Path
    entry: TensorEntry

    def copy_to(self, target: Tensor) -> None:
        """Fill ``target``, of as many elements in any shape ``[...]``; a narrower dtype rounds.

        Raises UserError if the file cannot be read.
        """
        try:
            with safe_open(self.file, framework="pt") as opened:
                target.copy_(opened.get_tensor(self.name).view(target.shape))
        except (OSError, SafetensorError) as error:
            raise _damaged(self.file, error) from error


def read_folder(folder: Path) -> dict[str, WholeTensor]:
    """All tensors of ``folder`` by name; reads the index and the headers alone.

    Raises UserError if a file is missing or damaged, if the index names one outside of the folder or does
    not agree with the files, or if a tensor has a dtype that is none of weights.
    """
    place = _index(folder)
    if place is None and not (folder / SINGLE).is_file():
        pickled = next((f.name for f in sorted(folder.glob("*.bin"))), None)
        hint = f"; {pickled} is a pickle, which is not read: save the model as safetensors" if pickled else ""
        raise UserError(f"{folder} holds neither {SINGLE} nor {INDEX}{hint}")
    found: dict[str, WholeTensor] = {}
    for name in sorted(set(place.values())) if place is not None else [SINGLE]:
        if not (folder / name).is_file():
            raise UserError(f"{folder / name} is missing, though {INDEX} names it: download it again")
        for tensor in _header(folder / name):
            if tensor.name in found:
                raise UserError(f"{tensor.name} is both in {found[tensor.name].file} and in {tensor.file}")
            if place is not None and place.get(tensor.name) != name:
                raise UserError(f"{tensor.file} holds {tensor.name}, but {folder / INDEX} does not say so")
            found[tensor.name] = tensor
    for name in place or ():
        if name not in found:
            raise UserError(f"{folder / place[name]} lacks {name}, which {INDEX} says it holds")  # type: ignore[index]
    return found


def read_json(file: Path) -> dict[str, Any]:
    """The object that ``file`` holds; UserError if it is missing, not readable, or none."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read {file}: {explain(error)}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{file} is not a JSON object")
    return content


def split(sizes: Iterable[int], limit: int) -> list[list[int]]:
    """Positions in ``sizes``, in order, in groups of at most ``limit`` together, or one that is larger."""
    groups: list[list[int]] = []
    filled = 0
    for position, size in enumerate(sizes):
        if not groups or filled + size > limit:
            groups.append([])
            filled = 0
        groups[-1].append(position)
        filled += size
    return groups


def file_names(count: int) -> list[str]:
    """What the files of a model are called if it has ``count`` of them."""
    return [SINGLE] if count == 1 else [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]


def write_file(file: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write contiguous ``tensors [...]`` as one durable file. Raises UserError if it cannot be written."""
    with user_errors(f"cannot write {file}"):
        try:
            save_file(dict(tensors), file, metadata={"format": "pt"})
        except SafetensorError as error:
            raise UserError(f"cannot write {file}: {error}") from error
        # safetensors lets only the owner read what it writes; the folder shows what the umask lets others.
        file.chmod(file.parent.stat().st_mode & 0o666)
        sync_file(file)


def write_index(folder: Path, files: Mapping[str, Sequence[str]], total_bytes: int) -> None:
    """Write the index of a model in several files: ``files`` maps each to the names of its tensors."""
    place = {tensor: file for file, tensors in files.items() for tensor in tensors}
    content = {"metadata": {"total_size": total_bytes}, "weight_map": dict(sorted(place.items()))}
    write_new(folder / INDEX, json.dumps(content, indent=2) + "\n")


def bytes_of(entry: TensorEntry) -> int:
    """Size of a tensor's elements."""
    return torch.Size(entry.shape).numel() * getattr(torch, entry.dtype).itemsize


def _index(folder: Path) -> dict[str, str] | None:
    """File name by tensor name, or None where there is no index. Links in the folder itself are followed:
    the cache of huggingface_hub consists of them."""
    if not (folder / INDEX).exists():
        return None
    place = read_json(folder / INDEX).get("weight_map")
    if not isinstance(place, dict) or not place:
        raise UserError(f"{folder / INDEX} has no weight_map that names files")
    for tensor, name in place.items():
        if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
            raise UserError(
                f"{folder / INDEX} places {tensor} in {name!r}, which is no safetensors file of this folder"
            )
    return place


def _header(file: Path) -> list[WholeTensor]:
    tensors = []
    try:
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118
                part = opened.get_slice(name)
                kind = part.get_dtype()
                if kind not in _DTYPES:
                    raise UserError(
                        f"{file}: {name} has dtype {kind}; what can be converted is {', '.join(_DTYPES)}"
                    )
                entry = TensorEntry(tuple(part.get_shape()), _DTYPES[kind])
                tensors.append(WholeTensor(name, file, entry))
    except (OSError, SafetensorError) as error:
        raise _damaged(file, error) from error
    return tensors


def _damaged(file: Path, error: Exception) -> UserError:
    return UserError(f"{file} is damaged or cannot be read ({error}): download it again")
