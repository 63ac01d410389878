"""Megatron's .bin/.idx: what we write Megatron reads, what it writes we read, and damage is named."""

import shutil
import warnings
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from flashtrain.data import TokenFile
from flashtrain.data.indexed import token_type, write_index
from flashtrain.errors import UserError

DOCUMENTS = [[5, 6, 7, 0], [1, 0], [9, 9, 9, 9, 9, 0], [2, 0]]


@pytest.fixture(scope="module")
def megatron() -> ModuleType:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what it finds missing for training
        from megatron.core.datasets import indexed_dataset
    return indexed_dataset


def write_set(prefix: Path, documents: list[list[int]], dtype: type[np.number] = np.uint16) -> Path:
    data, lengths = prefix.with_suffix(".bin"), prefix.with_suffix(".lengths")
    np.concatenate([np.array(d) for d in documents]).astype(dtype).tofile(data)
    np.array([len(document) for document in documents], dtype="<i4").tofile(lengths)
    write_index(prefix.with_suffix(".idx"), dtype, [lengths])
    return prefix


def build_with_megatron(
    megatron: ModuleType, prefix: Path, documents: list[list[int]], dtype: type[np.number]
) -> None:
    builder = megatron.IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
    for document in documents:
        builder.add_document(torch.tensor(document), [len(document)])
    builder.finalize(f"{prefix}.idx")


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int32, np.int64])
def test_both_write_the_same_bytes_and_read_each_other(
    megatron: ModuleType, tmp_path: Path, dtype: type[np.number]
) -> None:
    ours, theirs = write_set(tmp_path / "ours", DOCUMENTS, dtype), tmp_path / "theirs"
    build_with_megatron(megatron, theirs, DOCUMENTS, dtype)
    for suffix in (".bin", ".idx"):
        assert ours.with_suffix(suffix).read_bytes() == theirs.with_suffix(suffix).read_bytes()
    read = megatron.IndexedDataset(str(ours))
    assert [read[i].tolist() for i in range(len(read))] == DOCUMENTS
    assert read.document_indices.tolist() == [0, 1, 2, 3, 4]
    file = TokenFile(theirs)
    assert file.read(0, len(file)).tolist() == [token for document in DOCUMENTS for token in document]
    assert [file.start(document) for document in range(5)] == [0, 4, 6, 12, 14]


def test_types_are_those_that_megatron_chooses(megatron: ModuleType) -> None:
    for size in (256, 65499, 65500, 128256):
        assert token_type(size) is megatron.DType.optimal_dtype(size)


def test_documents_of_several_sequences_and_of_none(megatron: ModuleType, tmp_path: Path) -> None:
    builder = megatron.IndexedDatasetBuilder(f"{tmp_path / 'x'}.bin", dtype=np.int32, multimodal=True)
    builder.add_document(torch.tensor([1, 2, 3]), [2, 1], [0, 1])
    builder.end_document()  # an empty one
    builder.add_document(torch.tensor([4]), [1], [0])
    builder.end_document()
    builder.finalize(f"{tmp_path / 'x'}.idx")
    file = TokenFile(tmp_path / "x")
    assert (len(file), file.documents) == (4, 4)
    assert file.document_starts(0, 4).tolist() == [0, 3]
    assert file.document_starts(1, 3).tolist() == []


def test_document_starts(tmp_path: Path) -> None:
    file = TokenFile(write_set(tmp_path / "x", DOCUMENTS))
    for first in range(15):
        for last in range(first, 15):
            expected = [start for start in (0, 4, 6, 12) if first <= start < last]
            assert file.document_starts(first, last).tolist() == expected


def test_an_index_of_many_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = write_set(tmp_path / "whole", DOCUMENTS * 5).with_suffix(".idx").read_bytes()
    monkeypatch.setattr("flashtrain.data.indexed._BLOCK", 3)
    assert write_set(tmp_path / "blocks", DOCUMENTS * 5).with_suffix(".idx").read_bytes() == whole
    assert len(TokenFile(tmp_path / "blocks")) == 70


def cut(path: Path, size: int) -> None:
    with path.open("r+b") as stream:
        stream.truncate(size)


def overwrite(path: Path, at: int, data: bytes) -> None:
    with path.open("r+b") as stream:
        stream.seek(at)
        stream.write(data)


SPOILED = {
    "no .bin": (lambda p: p.with_suffix(".bin").unlink(), r"x\.bin cannot be read: No such file"),
    "no .idx": (lambda p: p.with_suffix(".idx").unlink(), r"x\.idx cannot be read: No such file"),
    "truncated .bin": (lambda p: cut(p.with_suffix(".bin"), 27), r"x\.bin has 27 bytes, but .* says 28"),
    "truncated .idx": (lambda p: cut(p.with_suffix(".idx"), 120), r"x\.idx has 120 bytes, but .* says 122"),
    "empty .idx": (lambda p: cut(p.with_suffix(".idx"), 0), r"x\.idx is no index"),
    "half a header": (lambda p: cut(p.with_suffix(".idx"), 20), r"x\.idx is no index"),
    "another file": (lambda p: overwrite(p.with_suffix(".idx"), 0, b"PAR1"), r"x\.idx is no index"),
    "a later version": (lambda p: overwrite(p.with_suffix(".idx"), 9, b"\2"), "version 2"),
    "an unknown type": (lambda p: overwrite(p.with_suffix(".idx"), 17, b"\x63"), "type 99"),
    "tokens that are no whole numbers": (lambda p: overwrite(p.with_suffix(".idx"), 17, b"\7"), "type 7"),
    "a torn pointer": (lambda p: overwrite(p.with_suffix(".idx"), 34 + 16 + 24, b"\1"), "contradicts itself"),
    "a torn document": (lambda p: overwrite(p.with_suffix(".idx"), 114, b"\1"), "contradicts itself"),
}  # fmt: skip


@pytest.mark.parametrize("case", SPOILED)
def test_damage_is_named_before_anything_is_read(case: str, tmp_path: Path) -> None:
    spoil, message = SPOILED[case]
    prefix = write_set(tmp_path / "x", DOCUMENTS)
    spoil(prefix)
    with pytest.raises(UserError, match=message) as caught:
        TokenFile(prefix)
    assert "\n" not in str(caught.value)


CHANGED = {
    "vanished .bin": (lambda p: p.with_suffix(".bin").unlink(), r"x\.bin vanished"),
    "vanished .idx": (lambda p: p.with_suffix(".idx").unlink(), r"x\.idx vanished"),
    "truncated .bin": (lambda p: cut(p.with_suffix(".bin"), 0), r"x\.bin went from 28 to 0 bytes"),
    "truncated .idx": (lambda p: cut(p.with_suffix(".idx"), 40), r"x\.idx went from 122 to 40 bytes"),
    "replaced": (
        lambda p: shutil.copy(p.with_suffix(".bin"), p.with_suffix(".new")).replace(p.with_suffix(".bin")),
        r"x\.bin was replaced",
    ),
}


@pytest.mark.parametrize("case", CHANGED)
def test_a_change_is_named_while_it_is_read(case: str, tmp_path: Path) -> None:
    spoil, message = CHANGED[case]
    file = TokenFile(write_set(tmp_path / "x", DOCUMENTS))
    assert file.read(4, 6).tolist() == [1, 0]
    spoil(file.prefix)
    with pytest.raises(UserError, match=message):
        file.read(4, 6)
    with pytest.raises(UserError, match=message):
        file.document_starts(0, 6)
