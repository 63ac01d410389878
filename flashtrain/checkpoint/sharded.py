"""One set of tensors to and from a directory of safetensors, through torch.distributed.checkpoint (DCP).

DCP plans who writes and who reads what, over the default or the given process group; its messages
between ranks are the only serialised Python objects: the files are safetensors alone, without DCP's
pickled ``.metadata``.
"""

import math
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.api import CheckpointException
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
    writer = HuggingFaceStorageWriter(
        str(directory), fqn_to_index_mapping=_file_of_each(entries, ranks.world), save_distributed=True
    )
    with _one_error_for_all(what):
        dcp.save(
            {name: block.local for name, block in filled.items()},
            storage_writer=writer,
            planner=_SaveBlocks(filled),
            process_group=ranks.group,
            no_dist=not ranks.distributed,
        )


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
    with _one_error_for_all(what):
        dcp.load(
            {name: block.local for name, block in filled.items()},
            storage_reader=HuggingFaceStorageReader(str(directory)),
            planner=_LoadBlocks(filled),
            process_group=ranks.group,
            no_dist=not ranks.distributed,
        )


def _file_of_each(entries: Mapping[str, TensorEntry], world: int) -> dict[str, int]:
    """The file, counted from 1, that each tensor goes to, so that a rank's file stays near FILE_BYTES."""
    file, filled, place = 1, 0, {}
    for name, entry in entries.items():
        size = math.prod(entry.shape) * getattr(torch, entry.dtype).itemsize
        if filled and filled + size > FILE_BYTES * world:
            file, filled = file + 1, 0
        place[name], filled = file, filled + size
    return place


def _chunk(block: Block) -> ChunkStorageMetadata:
    return ChunkStorageMetadata(offsets=torch.Size(block.offset), sizes=torch.Size(block.local.shape))


class _SaveBlocks(DefaultSavePlanner):
    """Plans one write per block; the default then drops what several ranks hold and checks the cover."""

    def __init__(self, blocks: Mapping[str, Block]) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._blocks = blocks
        self._handed_out: set[int] = set()

    def create_local_plan(self) -> SavePlan:
        self.plan = SavePlan(
            [
                WriteItem(
                    index=MetadataIndex(name, torch.Size(block.offset)),
                    type=WriteItemType.SHARD,
                    tensor_data=TensorWriteData(
                        chunk=_chunk(block),
                        properties=TensorProperties(dtype=block.local.dtype),
                        size=torch.Size(block.shape),
                    ),
                )
                for name, block in self._blocks.items()
            ]
        )
        return self.plan

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
            reads = create_read_items_for_chunk_list(name, found, [_chunk(block)])
            if sum(math.prod(read.lengths) for read in reads) != block.local.numel():
                raise UserError(f"its files hold only parts of {name}, or some parts twice")
            items += reads
        return LoadPlan(items)

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        return self._blocks[index.fqn].local


@contextmanager
def _one_error_for_all(what: str) -> Iterator[None]:
    """Turn DCP's report of the ranks that failed, which every rank gets, into the error of the lowest."""
    try:
        with warnings.catch_warnings():
            # Said on purpose by no_dist; DCP warns of it each time.
            warnings.filterwarnings("ignore", message="torch.distributed is disabled", category=UserWarning)
            yield
    except CheckpointException as report:
        rank = min(report.failures)
        cause = report.failures[rank][0]
        match cause:
            case UserError():
                raise UserError(f"{what}: {cause}") from cause
            case OSError():
                raise UserError(f"{what}: {explain(cause)}") from cause
            case _:
                raise RuntimeError(f"{what}: rank {rank}: {type(cause).__name__}: {cause}") from cause
