"""Save, find and load checkpoints so that a kill at any moment leaves one that loads."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor

from flashtrain.checkpoint.blocks import Block, block_of, entry_of
from flashtrain.checkpoint.directory import CheckpointDirectory
from flashtrain.checkpoint.files import explain, user_errors
from flashtrain.checkpoint.integrity import check_files, check_hashes, sync_and_hash
from flashtrain.checkpoint.manifest import (
    MANIFEST,
    SET_NAME,
    FileEntry,
    Manifest,
    TensorEntry,
    check_json,
    parse_manifest,
    read_manifest,
)
from flashtrain.checkpoint.ranks import Ranks
from flashtrain.checkpoint.sharded import read_set, write_set
from flashtrain.errors import UserError

TensorSets = Mapping[str, Mapping[str, Tensor]]
Entries = dict[str, dict[str, TensorEntry]]
Blocks = dict[str, dict[str, Block]]


@dataclass(frozen=True)
class Prepared:
    """A checkpoint before it is written: what ``CheckpointStore.save`` was given, checked on all ranks.

    ``entries`` describes the tensors of all ranks, ``blocks`` is this rank's part of them.
    """

    step: int
    meta: dict[str, Any]
    rank_metas: list[Any]
    entries: Entries
    blocks: Blocks

    def copied(self) -> "Prepared":
        """The same with blocks of its own in host memory, so that training may go on with the tensors."""

        def copy(block: Block) -> Block:
            return replace(block, local=block.local.to("cpu", copy=True))

        blocks = {name: {n: copy(b) for n, b in named.items()} for name, named in self.blocks.items()}
        # Plain values too: a caller may go on filling the lists and dicts that it gave.
        return replace(self, meta=json.loads(json.dumps(self.meta)), blocks=blocks)


class CheckpointStore:
    """The checkpoints of one run. The directory must be on a file system that all ranks share.

    ``save``, ``latest`` and ``load`` are collective over ``group`` (None: the default group) when
    torch.distributed is initialised, and raise alike on all ranks; ``read_manifest`` is not collective.

    ``tensors`` maps a set name ("model", "optimizer") to tensors by name. A plain tensor counts as the
    same on every rank; a DTensor is saved by its blocks. Ranks may hold different names, as pipeline
    stages do. Each set becomes a sub-directory of safetensors files.

    Trap: two runs must not save into one directory at the same time, since each cleans up what it takes
    for leftovers of a killed save.
    """

    def __init__(self, directory: Path, keep: int = 2, group: dist.ProcessGroup | None = None) -> None:
        if keep < 1:
            raise UserError(f"keep must be at least 1, not {keep}: the last good checkpoint is never deleted")
        self.directory, self.group = Path(directory).absolute(), group
        self._directory = CheckpointDirectory(self.directory, keep)

    def save(self, step: int, tensors: TensorSets, meta: dict[str, Any], rank_meta: Any = None) -> Path:
        """Write a checkpoint, point ``latest`` to it, remove those beyond ``keep``; return its path.

        ``meta`` is JSON and counts from rank 0; ``rank_meta`` is JSON, one value per rank. Raises
        UserError on all ranks if the disk is full or not writable, or if something given cannot be
        stored; earlier checkpoints and the pointer are then as they were.
        """
        return self.write(self.prepare(step, tensors, meta, rank_meta))

    def prepare(
        self, step: int, tensors: TensorSets, meta: dict[str, Any], rank_meta: Any = None
    ) -> "Prepared":
        """Check what ``save`` is given, without a copy and without touching the disk. Collective."""
        ranks = Ranks(self.group)

        def check() -> Any:
            if not isinstance(step, int) or step < 0:
                raise UserError(f"step must be a whole number of at least 0, not {step!r}")
            if not isinstance(meta, dict):
                raise UserError(f"meta must be a dict, not a {type(meta).__name__}")
            check_json(meta, "meta")
            check_json(rank_meta, "rank_meta")
            return rank_meta

        rank_metas = ranks.every(check)
        return Prepared(step, meta, rank_metas, *_describe(ranks, tensors))

    def write(self, prepared: "Prepared") -> Path:
        """Write what ``prepare`` has returned; the rest of ``save``. Collective, and may run in a thread."""
        ranks = Ranks(self.group)
        step, entries = prepared.step, prepared.entries
        what = f"cannot save step {step} in {self.directory} (earlier checkpoints are unchanged)"

        def begin() -> str:
            with user_errors(what):
                return str(self._directory.begin(step, entries))

        try:
            temporary = Path(ranks.first(begin))
            ranks.every(lambda: self._check_shared(ranks, temporary))
            for name in entries:
                write_set(ranks, temporary / name, prepared.blocks[name], entries[name], what)

            def sync_and_hash_own() -> dict[str, Any]:
                # DCP names files after the rank that wrote them; its own are in this host's page cache.
                own = temporary.glob(f"*/shard-{ranks.rank + 1:05d}-*.safetensors")
                with user_errors(what):
                    hashed = sync_and_hash(
                        temporary, sorted(file.relative_to(temporary).as_posix() for file in own)
                    )
                return {name: asdict(entry) for name, entry in hashed.items()}

            parts = ranks.every(sync_and_hash_own)
            files = {name: FileEntry(**entry) for part in parts for name, entry in part.items()}

            def publish() -> str:
                manifest = Manifest(
                    step=step,
                    serial=0,
                    meta=prepared.meta,
                    rank_meta=prepared.rank_metas,
                    tensors=entries,
                    files=files,
                )
                check_files(temporary, manifest, entries)
                with user_errors(what):
                    return str(self._directory.publish(temporary, manifest))

            return Path(ranks.first(publish))
        except BaseException:
            if ranks.rank == 0:
                self._directory.clean()
            raise

    def latest(self) -> Path | None:
        """The checkpoint that ``latest`` points to, or None if nothing was saved yet.

        If the pointer is missing or names something incomplete, the complete checkpoint that was saved
        last is taken, and a log line says so. Raises UserError if there is a pointer but no complete
        checkpoint. Hashes are not checked here; ``load`` does that.
        """
        ranks = Ranks(self.group)

        def find() -> str | None:
            found = self._directory.latest()
            return None if found is None else str(found)

        path = ranks.first(find)
        return None if path is None else Path(path)

    def read_manifest(self, path: Path) -> Manifest:
        """The manifest of the checkpoint ``path``; UserError if missing or not valid. Not collective."""
        return read_manifest(Path(path))

    def load(self, path: Path, tensors: TensorSets) -> Manifest:
        """Fill ``tensors`` in place from the checkpoint ``path``; return its manifest.

        The mesh may differ from the one that saved. The sets given must hold exactly the checkpoint's
        tensors of those sets; sets that are not given are not read. Every file of the sets is hashed
        before the first tensor changes. Raises UserError on all ranks if a file is missing or damaged,
        if the manifest is not valid, or if the checkpoint is of another model.
        """
        ranks = Ranks(self.group)
        path = Path(path).absolute()
        manifest = parse_manifest(path / MANIFEST, ranks.first(lambda: read_manifest(path).to_text()))
        entries, blocks = _describe(ranks, tensors)
        _check_same_model(path, manifest, entries)

        def verify() -> None:
            files = sorted(name for name in manifest.files if name.partition("/")[0] in entries)
            try:
                check_files(path, manifest, entries)
                check_hashes(path, manifest, files[ranks.rank :: ranks.world])
            except UserError as error:
                raise UserError(f"{error}; {self._remedy(path)}") from error

        ranks.every(verify)
        for name in entries:
            read_set(ranks, path / name, blocks[name], entries[name], f"cannot read checkpoint {path}")
        return manifest

    def _check_shared(self, ranks: Ranks, temporary: Path) -> None:
        if not temporary.is_dir():
            raise UserError(
                f"rank {ranks.rank} does not see {temporary}, which rank 0 has created: "
                "choose a checkpoint directory on a file system that all ranks share"
            )

    def _remedy(self, path: Path) -> str:
        try:
            other = CheckpointDirectory(path.parent, keep=1).newest(but=path)
        except OSError as error:
            return f"resume from another checkpoint (cannot look for one: {explain(error)})"
        if other is None:
            return f"delete {path} and start anew: no other checkpoint there is complete"
        return f"delete {path} or resume from {other}"


def _describe(ranks: Ranks, tensors: TensorSets) -> tuple[Entries, Blocks]:
    """Shapes and dtypes of the tensors of all ranks, in the lowest rank's order, and this rank's blocks.

    Raises UserError on all ranks if a tensor cannot be stored or two ranks disagree about it.
    """
    mine: Entries = {}
    blocks: Blocks = {}

    def describe() -> str:
        for set_name, named in tensors.items():
            if SET_NAME.fullmatch(set_name) is None:
                raise UserError(f"{set_name!r} is no name for a set of tensors: use letters, digits, - and _")
            mine[set_name], blocks[set_name] = {}, {}
            for name, tensor in named.items():
                where = f"{set_name}/{name}"
                if name == "__metadata__":
                    raise UserError(f"{where}: safetensors reserves this name, choose another one")
                mine[set_name][name] = entry_of(where, tensor)
                block = block_of(where, tensor)
                if block is not None:
                    blocks[set_name][name] = block
        return hashlib.sha256(repr(mine).encode()).hexdigest()

    # Thousands of names from thousands of ranks travel only where ranks hold different ones.
    if len(set(ranks.every(describe))) == 1:
        return mine, blocks
    merged: Entries = {}
    plain = {name: {n: asdict(entry) for n, entry in named.items()} for name, named in mine.items()}
    for rank, theirs in enumerate(ranks.every(lambda: plain)):
        for set_name, named in theirs.items():
            known = merged.setdefault(set_name, {})
            for name, fields in named.items():
                entry = TensorEntry(tuple(fields["shape"]), fields["dtype"])
                if known.setdefault(name, entry) != entry:
                    both = f"{_show(known[name])} on one rank and {_show(entry)} on rank {rank}"
                    raise UserError(
                        f"{set_name}/{name} is {both}: make it a DTensor or name it differently on each rank"
                    )
    return merged, {set_name: blocks.get(set_name, {}) for set_name in merged}


def _show(entry: TensorEntry) -> str:
    return f"{entry.dtype} {list(entry.shape)}"


def _check_same_model(path: Path, manifest: Manifest, entries: Entries) -> None:
    """Raise UserError that names the first tensor in which the checkpoint and ``entries`` differ."""
    remedy = "give the settings of the model that was saved, or choose another folder"
    for set_name, wanted in entries.items():
        if set_name not in manifest.tensors:
            held = ", ".join(manifest.tensors)
            raise UserError(
                f"checkpoint {path} has no set {set_name!r}, it holds {held}; ask for one of these"
            )
        stored = manifest.tensors[set_name]
        for name in [*stored, *(name for name in wanted if name not in stored)]:
            where = f"checkpoint {path} is of another model: {set_name}/{name}"
            if name not in wanted:
                raise UserError(f"{where} is {_show(stored[name])} there and does not exist here; {remedy}")
            if name not in stored:
                raise UserError(f"{where} does not exist there and is {_show(wanted[name])} here; {remedy}")
            if stored[name] != wanted[name]:
                raise UserError(
                    f"{where} is {_show(stored[name])} there and {_show(wanted[name])} here; {remedy}"
                )
