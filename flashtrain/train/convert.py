"""A model from Hugging Face to a checkpoint that runs start from, and from a checkpoint back.

One process, on the CPU, one file at a time: memory stays near ``file_bytes``, whatever the model's size.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flashtrain import config as configs
from flashtrain.checkpoint import CheckpointStore, Manifest, TensorEntry, whole
from flashtrain.checkpoint.blocks import Block
from flashtrain.checkpoint.files import is_plain_file, new_directory, write_new
from flashtrain.checkpoint.integrity import check_files, check_hashes, sync_and_hash
from flashtrain.checkpoint.manifest import MANIFEST
from flashtrain.checkpoint.ranks import Ranks
from flashtrain.checkpoint.sharded import read_set
from flashtrain.errors import UserError
from flashtrain.models import hf
from flashtrain.models.decoder import Decoder
from flashtrain.train import carried, snapshot

FILE_BYTES = 2 << 30
DTYPES = ("float32", "bfloat16", "float16")
_SET = "model"


@dataclass(frozen=True)
class Converted:
    """What was written: parameters in all, their dtype, and the small files that were carried along."""

    parameters: int
    dtype: str
    files: int
    carried: list[str]


def from_hf(
    source: Path,
    out: Path,
    dtype: str | None = None,
    file_bytes: int = FILE_BYTES,
    on_file: Callable[[str], None] = lambda name: None,
) -> Converted:
    """Make ``out`` a checkpoint without optimizer state from the Hugging Face folder ``source``.

    ``dtype`` (default: the stored one) is that of all weights; ``on_file`` is told each file written.
    ``out`` appears when it is whole. Raises UserError if ``source`` is damaged or of a model that the
    decoder cannot express, or if ``out`` exists or cannot be written.
    """
    if not source.is_dir():
        raise UserError(f"there is no folder {source}: give one that holds config.json and safetensors")
    content = whole.read_json(source / carried.CONFIG)
    config = hf.config_from_hf(content, str(source / carried.CONFIG))
    context = hf.context_from_hf(content, str(source / carried.CONFIG))
    stored = whole.read_folder(source)
    weights = hf.weights(config)
    _check_tensors(source, stored, weights, config)
    parts = [part for weight in weights for part in weight.parts]
    kept = dtype or _one_dtype(source, {stored[part].entry.dtype: part for part in parts})
    entries = {weight.name: TensorEntry(weight.shape, kept) for weight in weights}
    groups = whole.split((whole.bytes_of(entry) for entry in entries.values()), file_bytes)
    names = [f"{_SET}/{name}" for name in whole.file_names(len(groups))]
    with new_directory(out) as temporary:
        (temporary / _SET).mkdir()
        for name, group in zip(names, groups, strict=True):
            tensors = {}
            for weight in (weights[position] for position in group):
                parameter = torch.empty(weight.shape, dtype=getattr(torch, kept))
                for part, place in weight.views(parameter):
                    stored[part].copy_to(place)
                tensors[weight.name] = parameter
            whole.write_file(temporary / name, tensors)
            on_file(name)
        along = carried.copy(source, temporary / carried.FOLDER, carried.ALL, links=True)
        manifest = Manifest(
            step=0,
            serial=1,
            meta={"config": _settings(config, kept, context)},
            rank_meta=[],
            tensors={_SET: entries},
            files=sync_and_hash(temporary, names),
        )
        write_new(temporary / MANIFEST, manifest.to_text())
    return Converted(_count(entries), kept, len(names), along)


def to_hf(
    run: Path,
    out: Path,
    dtype: str | None = None,
    file_bytes: int = FILE_BYTES,
    tokenizer: Path | None = None,
    on_file: Callable[[str], None] = lambda name: None,
) -> Converted:
    """Make ``out`` a folder for transformers from a checkpoint, or from the last one of the run ``run``.

    ``tokenizer`` is a tokenizer.json, or a folder, to take the tokenizer's files from instead of those
    that came with the weights. For the rest see ``from_hf``.
    """
    checkpoint = snapshot.find(run)
    manifest = CheckpointStore(checkpoint.parent).read_manifest(checkpoint)
    config = snapshot.model_config(checkpoint)
    weights = hf.weights(config)
    entries = manifest.tensors.get(_SET, {})
    if {name: entry.shape for name, entry in entries.items()} != {w.name: w.shape for w in weights}:
        raise UserError(f"checkpoint {checkpoint} does not hold the tensors of the model in its own config")
    kept = dtype or _one_dtype(checkpoint, {entry.dtype: name for name, entry in entries.items()})
    text = _config_text(carried.find(checkpoint), config, kept, manifest.meta["config"]["train"]["sequence"])
    check_files(checkpoint, manifest, [_SET])
    check_hashes(checkpoint, manifest, [name for name in manifest.files if name.startswith(f"{_SET}/")])
    sizes = [whole.bytes_of(TensorEntry(weight.shape, kept)) for weight in weights]
    groups = whole.split(sizes, file_bytes)
    content: dict[str, list[str]] = {}
    with new_directory(out) as temporary:
        along = _carry(checkpoint, tokenizer, temporary)
        for name, group in zip(whole.file_names(len(groups)), groups, strict=True):
            chosen = {weights[position].name: weights[position] for position in group}
            packed = _read(checkpoint, {name: entries[name] for name in chosen})
            tensors = {}
            for parameter_name, weight in chosen.items():
                # Taken out, so that only one parameter is held twice while its parts are cut out of it.
                parameter = packed.pop(parameter_name).to(getattr(torch, kept))
                shapes = weight.shapes()
                for part, place in weight.views(parameter):
                    tensors[part] = place.reshape(shapes[part]).contiguous()
            whole.write_file(temporary / name, tensors)
            content[name] = list(tensors)
            on_file(name)
        if len(groups) > 1:
            whole.write_index(temporary, content, sum(sizes))
        write_new(temporary / carried.CONFIG, text)
    return Converted(_count(entries), kept, len(groups), along)


def _check_tensors(
    source: Path, stored: dict[str, whole.WholeTensor], weights: list[hf.Weight], config: Decoder.Config
) -> None:
    """Raise UserError that names the first tensor that is missing, of another shape, or not the model's."""
    wanted = {name: shape for weight in weights for name, shape in weight.shapes().items()}
    for name, shape in wanted.items():
        if name not in stored:
            raise UserError(f"{source} lacks {name}, which its config.json asks for")
        if stored[name].entry.shape != shape:
            raise UserError(
                f"{stored[name].file}: {name} has shape {list(stored[name].entry.shape)}; "
                f"config.json asks for {list(shape)}"
            )
    for name in stored.keys() - wanted.keys():
        if hf.is_recomputed(name):
            continue
        if config.tied_embeddings and name == hf.HEAD:
            _check_tied(stored[hf.TABLE], stored[hf.HEAD])
            continue
        raise UserError(
            f"{stored[name].file}: {name} is not a tensor of the model that config.json describes"
        )


def _check_tied(table: whole.WholeTensor, head: whole.WholeTensor) -> None:
    """Raise UserError if an output projection, stored although it is tied, is not the embedding's table."""
    if table.entry == head.entry:
        both = [torch.empty(t.entry.shape, dtype=getattr(torch, t.entry.dtype)) for t in (table, head)]
        table.copy_to(both[0])
        head.copy_to(both[1])
        if torch.equal(*both):
            return
    raise UserError(
        f"{head.file}: {head.name} is not {table.name}, though tie_word_embeddings is true: "
        "set it to false in config.json, or remove the tensor"
    )


def _one_dtype(where: Path, found: Mapping[str, str]) -> str:
    """The dtype of all tensors; ``found`` has the name of one of each dtype."""
    if len(found) > 1:
        mixed = ", ".join(f"{name} is {dtype}" for dtype, name in found.items())
        raise UserError(f"{where} has weights of several dtypes ({mixed}): choose one with --dtype")
    dtype = next(iter(found))
    if dtype not in DTYPES:
        raise UserError(f"{where} has weights of dtype {dtype}; what can be converted is {', '.join(DTYPES)}")
    return dtype


def _settings(config: Decoder.Config, dtype: str, context: int) -> dict[str, Any]:
    """What a checkpoint of a run says of its run, as far as it goes for weights that no run has trained."""
    return {"model": configs.to_dict(config), "data": {}, "train": {"dtype": dtype, "sequence": context}}


def _read(checkpoint: Path, entries: dict[str, TensorEntry]) -> dict[str, Tensor]:
    """Some of the checkpoint's tensors, whole, from whatever blocks hold them."""
    tensors = {n: torch.empty(e.shape, dtype=getattr(torch, e.dtype)) for n, e in entries.items()}
    blocks = {n: Block(tuple(t.shape), (0,) * t.dim(), t) for n, t in tensors.items()}
    read_set(Ranks(None), checkpoint / _SET, blocks, entries, f"cannot read checkpoint {checkpoint}")
    return tensors


def _config_text(came: Path | None, config: Decoder.Config, dtype: str, context: int) -> str:
    """The text of config.json; the one that came along as it is, if it says the same of the model."""
    content: dict[str, Any] = {}
    if came is not None and (file := came / carried.CONFIG).is_file():
        content = whole.read_json(file)
        same = hf.config_from_hf(content, str(file)) == config
        if same and content.get("dtype", content.get("torch_dtype")) == dtype:
            return file.read_text(encoding="utf-8")
    return json.dumps(hf.config_to_hf(config, dtype, context, content), indent=2) + "\n"


def _carry(checkpoint: Path, given: Path | None, target: Path) -> list[str]:
    """Copy the generation config and a tokenizer: the given one, else the run's own, else what came along."""
    came, run = carried.find(checkpoint), carried.run_of(checkpoint)
    along = [] if came is None else carried.copy(came, target, [carried.GENERATION])
    if given is not None:
        return along + carried.copy_tokenizer(given, target)
    for place in (run, came):
        if place is not None and is_plain_file(place / carried.TOKENIZER[0]):
            return along + carried.copy(place, target, carried.TOKENIZER)
    return along if came is None else along + carried.copy(came, target, carried.TOKENIZER)


def _count(entries: Mapping[str, TensorEntry]) -> int:
    return sum(torch.Size(entry.shape).numel() for entry in entries.values())
