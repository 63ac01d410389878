"""One set of tensors to and from a directory of safetensors, through torch.distributed.checkpoint (DCP).

DCP plans who writes and who reads what; the files are safetensors alone, without DCP's pickled
``.metadata``. Its own messages between ranks are pickled too, so it runs without them: each rank tells the
others as JSON which blocks it holds, and then plans for all of them alike.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from flashtrain.checkpoint.blocks import Block
from flashtrain.checkpoint.files import explain
from flashtrain.checkpoint.manifest import TensorEntry
from flashtrain.checkpoint.ranks import Ranks
from flashtrain.errors import UserError

# The writer holds a file's content in host memory before it writes it, so this bounds that memory.
FILE_BYTES = 1 << 30


def write_set(
    ranks: Ranks, directory: Path, blocks: Mapping[str, Block], entries: Mapping[str, TensorEntry], what: str
) -> None:
    """Write the blocks of all ranks into ``directory``; a block that several ranks hold is written once.

    ``entries`` describes the tensors of all ranks. Making the files durable is left to the caller.
    Raises UserError that starts with ``what`` on all ranks if a file cannot be written.
    """
    filled = {name: block for name, block in blocks.items() if not block.is_empty}
    if not any(math.prod(entry.shape) for entry in entries.values()):
        return
    held = ranks.every(lambda: [[n, list(b.offset), list(b.local.shape)] for n, b in filled.items()])

    def write() -> None:
        planner = _SaveBlocks(filled)
        plans, _ = planner.create_global_plan([_save_plan(theirs, entries) for theirs in held])
        writer = HuggingFaceStorageWriter(
            str(directory), fqn_to_index_mapping=_file_of_each(entries, ranks.world), save_distributed=True
        )
        mine = writer.prepare_global_plan(plans)[ranks.rank]
        with _worded(what):
            writer.write_data(mine, planner).wait()

    ranks.every(write)


def read_set(
    ranks: Ranks, directory: Path, blocks: Mapping[str, Block], entries: Mapping[str, TensorEntry], what: str
) -> None:
    """Fill the blocks of all ranks in place from ``directory``, whichever ranks and blocks wrote it.

    ``entries`` describes the tensors of all ranks. Raises UserError that starts with ``what`` on all ranks
    if a file cannot be read or the files do not hold what ``entries`` says.
    """
    filled = {name: block for name, block in blocks.items() if not block.is_empty}
    if not any(math.prod(entry.shape) for entry in entries.values()):
        return

    def read() -> None:
        with _worded(what):
            reader = HuggingFaceStorageReader(str(directory))
            planner = _LoadBlocks(filled)
            metadata = reader.read_metadata()
            reader.set_up_storage_reader(metadata, is_coordinator=True)
            planner.set_up_planner({name: block.local for name, block in filled.items()}, metadata)
            reader.read_data(planner.create_local_plan(), planner).wait()

    ranks.every(read)


def _file_of_each(entries: Mapping[str, TensorEntry], world: int) -> dict[str, int]:
    """The file, counted from 1, that each tensor goes to, so that a rank's file stays near FILE_BYTES."""
    file, filled, place = 1, 0, {}
    for name, entry in entries.items():
        size = math.prod(entry.shape) * getattr(torch, entry.dtype).itemsize
        if filled and filled + size > FILE_BYTES * world:
            file, filled = file + 1, 0
        place[name], filled = file, filled + size
    return place


def _chunk(offset: Sequence[int], sizes: Sequence[int]) -> ChunkStorageMetadata:
    return ChunkStorageMetadata(offsets=torch.Size(offset), sizes=torch.Size(sizes))


def _save_plan(held: list[list[Any]], entries: Mapping[str, TensorEntry]) -> SavePlan:
    """What a rank that holds the blocks (name, offset, sizes) would write if it were alone."""
    return SavePlan(
        [
            WriteItem(
                index=MetadataIndex(name, torch.Size(offset)),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(
                    chunk=_chunk(offset, sizes),
                    properties=TensorProperties(dtype=getattr(torch, entries[name].dtype)),
                    size=torch.Size(entries[name].shape),
                ),
            )
            for name, offset, sizes in held
        ]
    )


class _SaveBlocks(DefaultSavePlanner):
    """Hands out this rank's blocks. The default drops what several ranks hold and checks the cover."""

    def __init__(self, blocks: Mapping[str, Block]) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._blocks = blocks
        self._handed_out: set[int] = set()

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        return self._blocks[index.fqn].local

    def transform_object(self, write_item: WriteItem, object: Tensor) -> Tensor:
        # safetensors refuses strided memory, and memory that two names of one file share (tied weights).
        tensor = object.contiguous()
        storage = tensor.untyped_storage().data_ptr()
        if tensor.device.type == "cpu" and storage in self._handed_out:
            return tensor.clone()
        self._handed_out.add(storage)
        return tensor


class _LoadBlocks(DefaultLoadPlanner):
    """Plans the reads that fill each block."""

    def __init__(self, blocks: Mapping[str, Block]) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._blocks = blocks

    def create_local_plan(self) -> LoadPlan:
        stored = self.metadata.state_dict_metadata if self.metadata is not None else {}
        items = []
        for name, block in self._blocks.items():
            found = stored.get(name)
            if not isinstance(found, TensorStorageMetadata):
                raise UserError(f"its files do not hold {name}")
            if tuple(found.size) != block.shape or found.properties.dtype != block.local.dtype:
                raise UserError(
                    f"its files hold {name} with shape {list(found.size)} and dtype {found.properties.dtype} "
                    f"instead of {list(block.shape)} and {block.local.dtype}"
                )
            reads = create_read_items_for_chunk_list(name, found, [_chunk(block.offset, block.local.shape)])
            if sum(math.prod(read.lengths) for read in reads) != block.local.numel():
                raise UserError(f"its files hold only parts of {name}, or some parts twice")
            items += reads
        return LoadPlan(items)

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        return self._blocks[index.fqn].local


@contextmanager
def _worded(what: str) -> Iterator[None]:
    """Start the message of whatever can go wrong with files by ``what``."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{what}: {error}") from error
    except OSError as error:
        raise UserError(f"{what}: {explain(error)}") from error
    except Exception as error:
        raise RuntimeError(f"{what}: {type(error).__name__}: {error}") from error
