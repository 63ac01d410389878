"""Reading of text, JSON lines and Parquet, whole and damaged; cuts that lose and double nothing."""

import gzip
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from flashtrain.data import inputs, records
from flashtrain.data.records import Damage, Reader, Text, line_before
from flashtrain.errors import UserError
from tests.data.sets import texts, write_jsonl

COMPRESS = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.ZstdCompressor().compress}


def read(*files: Path, shard_bytes: int = 1 << 20) -> list[Text | Damage]:
    """All items, with lines counted in their files; texts of a document that came in several joined."""
    items: list[Text | Damage] = []
    for shard in inputs.shards(inputs.find([str(file) for file in files]), shard_bytes):
        for piece in shard.pieces:
            before, begun = line_before(piece), ""
            for item in Reader(piece, "text"):
                if isinstance(item, Damage):
                    items.append(Damage(before + item.line, item.reason))
                    begun = ""
                elif not item.ends:
                    begun += item.text
                else:
                    items.append(Text(before + item.line, begun + item.text))
                    begun = ""
    return items


@pytest.mark.parametrize("ending", COMPRESS)
def test_every_line_is_read_once_whatever_the_cuts(tmp_path: Path, ending: str) -> None:
    documents = texts(40)
    lines = write_jsonl(tmp_path / "x.jsonl", documents).read_bytes()
    path = tmp_path / f"y.jsonl{ending}"
    path.write_bytes(COMPRESS[ending](lines))
    expected = [Text(line, text) for line, text in enumerate(documents, start=1)]
    longest = max(map(len, lines.splitlines()))
    for size in (1, 2, longest, longest + 1, 1000, 1 << 20):
        assert read(path, shard_bytes=size) == expected
    without_end = tmp_path / f"z.jsonl{ending}"
    without_end.write_bytes(COMPRESS[ending](lines.rstrip(b"\n")))
    assert read(without_end, shard_bytes=100) == expected


@pytest.mark.parametrize("ending", COMPRESS)
def test_text_is_one_document_whatever_its_length(
    tmp_path: Path, ending: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "é wide\n\n  line\r\nnext\n" * 500
    path = tmp_path / f"x.txt{ending}"
    path.write_bytes(COMPRESS[ending](text.encode()))
    assert read(path) == [Text(1, text)]
    monkeypatch.setattr(records, "_BLOCK", 61)  # cuts within characters and between any two of them
    assert read(path) == [Text(1, text)]
    piece = inputs.shards([path])[0].pieces[0]
    parts = [item.text for item in Reader(piece, "text") if isinstance(item, Text)]
    assert len(parts) > 10
    # Cut only where words are split anyway: after a line end that stands alone, before a character.
    assert all(part.endswith("\n") and not part[-2].isspace() for part in parts[:-1] if part)


def test_compressed_members_follow_each_other(tmp_path: Path) -> None:
    lines = [b'{"text": "one"}\n{"te', b'xt": "two"}\n', b'{"text": "three"}\n']
    for ending in (".gz", ".zst"):
        path = tmp_path / f"x.jsonl{ending}"
        path.write_bytes(b"".join(map(COMPRESS[ending], lines)) + (b"\0" * 9 if ending == ".gz" else b""))
        assert [item.text for item in read(path) if isinstance(item, Text)] == ["one", "two", "three"]
        path.rename(tmp_path / "blob")
        path.symlink_to(tmp_path / "blob")  # as a cache of downloads has it
        assert len(read(path)) == 3
        (tmp_path / "blob").unlink()
        path.unlink()


BAD_LINES = {
    b'{"text": "no end': "not valid JSON",
    b'{"text": "\xff"}': "invalid UTF-8",
    b'{"words": "x"}': "no field 'text'",
    b'["text"]': "no JSON object",
    b'{"text": 7}': "field 'text' is no text but int",
    b'{"text": null}': "field 'text' is no text but NoneType",
    b'{"text": "\\ud800"}': "half of a surrogate pair",
    b"[" * 3000: "not valid JSON",
}


@pytest.mark.parametrize("bad", BAD_LINES)
@pytest.mark.parametrize("shard_bytes", [19, 1 << 20])
def test_a_damaged_line_is_named_and_the_others_are_read(
    tmp_path: Path, bad: bytes, shard_bytes: int
) -> None:
    if len(bad) > 1000 and shard_bytes == 7:
        pytest.skip("the same again, in many pieces")
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'{"text": "a"}\n\n' + bad + b'\n{"text": "b"}\n')
    first, damage, last = read(path, shard_bytes=shard_bytes)
    assert (first, last) == (Text(1, "a"), Text(4, "b"))
    assert isinstance(damage, Damage)
    assert damage.line == 3
    assert damage.reason.startswith(BAD_LINES[bad]) or BAD_LINES[bad] in damage.reason


def test_a_line_too_long_for_memory_is_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "MAX_LINE", 1000)
    path = tmp_path / "x.jsonl"
    path.write_text('{"text": "a"}\n{"text": "' + "x" * 5000 + '"}\n{"text": "b"}\n')
    assert [(type(item), item.line) for item in read(path)] == [(Text, 1), (Damage, 2), (Text, 3)]


@pytest.mark.parametrize("ending", [".gz", ".zst"])
@pytest.mark.parametrize("kind", ["jsonl", "txt"])
@pytest.mark.parametrize("how", ["truncated", "damaged"])
def test_a_broken_compressed_file_gives_what_came_before(
    tmp_path: Path, ending: str, kind: str, how: str
) -> None:
    documents = texts(3000)
    lines = write_jsonl(tmp_path / "x.jsonl", documents).read_bytes()
    whole = bytearray(COMPRESS[ending](lines))
    if how == "truncated":
        del whole[len(whole) * 2 // 3 :]
    else:
        whole[len(whole) // 2 : len(whole) // 2 + 64] = b"\xaa" * 64
    path = tmp_path / f"y.{kind}{ending}"
    path.write_bytes(whole)
    *before, last = read(path)
    assert isinstance(last, Damage)
    assert "the compressed file is" in last.reason or how == "damaged"
    if kind == "txt":
        assert before == []  # half a document is none
    elif how == "truncated":
        assert last.reason == "the compressed file is truncated"
        assert before == [Text(line, text) for line, text in enumerate(documents[: len(before)], start=1)]
        assert last.line == len(before) + 1 > 100


def test_invalid_utf8_in_a_text_names_its_line(tmp_path: Path) -> None:
    path = tmp_path / "x.txt"
    path.write_bytes(b"one\ntwo\nth\xe9ree\n")
    assert read(path) == [Damage(3, "invalid UTF-8")]
    path.write_bytes(b"one\ntwo \xc3")
    assert read(path) == [Damage(2, "invalid UTF-8")]


def write_parquet(path: Path, column: object, **settings: object) -> Path:
    pq.write_table(pa.table({"id": list(range(len(column))), "text": column}), path, **settings)  # type: ignore[arg-type]
    return path


@pytest.mark.parametrize(
    "kind", [pa.string(), pa.large_string(), pa.binary(), pa.dictionary(pa.int32(), pa.string())]
)
def test_parquet_rows_of_any_text_type(tmp_path: Path, kind: pa.DataType) -> None:
    documents = texts(30)
    path = write_parquet(tmp_path / "x.parquet", pa.array(documents).cast(kind), row_group_size=7)
    expected = [Text(row, text) for row, text in enumerate(documents, start=1)]
    for size in (1, 500, 1 << 20):
        assert read(path, shard_bytes=size) == expected


def test_parquet_values_that_are_no_text(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "x.parquet", pa.array([b"a", None, b"\xff", b"b"]), row_group_size=2)
    items = read(path, shard_bytes=1)
    assert [(type(item), item.line) for item in items] == [(Text, 1), (Damage, 2), (Damage, 3), (Text, 4)]
    numbers = write_parquet(tmp_path / "y.parquet", pa.array([1]))
    assert read(numbers) == [Damage(1, "field 'text' is no text but int")]
    pq.write_table(pa.table({"words": ["a"]}), tmp_path / "z.parquet")
    assert read(tmp_path / "z.parquet") == [Damage(1, "no column 'text'; it has words")]


def test_a_damaged_row_group_is_named_and_the_others_are_read(tmp_path: Path) -> None:
    documents = texts(30)
    path = write_parquet(
        tmp_path / "x.parquet",
        documents,
        row_group_size=10,
        write_page_checksum=True,
        use_dictionary=False,
        compression="none",
    )
    column = pq.read_metadata(path).row_group(1).column(1)
    data = bytearray(path.read_bytes())
    data[column.data_page_offset + column.total_compressed_size - 20] ^= 1  # a letter of the last text
    path.write_bytes(data)
    for size in (1, 1 << 20):
        items = read(path, shard_bytes=size)
        expected = [Text(row, text) for row, text in enumerate(documents, start=1) if not 11 <= row <= 20]
        assert [item for item in items if isinstance(item, Text)] == expected
        (damage,) = (item for item in items if isinstance(item, Damage))
        assert damage.line == 11
        assert damage.reason.startswith("row group 1 is damaged, 10 rows lost")
    path.write_bytes(data[:-20])
    (damage,) = read(path)
    assert damage.line == 1
    assert isinstance(damage, Damage)
    assert damage.reason.startswith("no readable Parquet file")


def test_a_folder_gives_what_is_known_in_order(tmp_path: Path) -> None:
    unwanted = (".hidden.txt", "e.png", ".git/f.txt", "tokenizer.json")
    for name in ("b.txt", "a.jsonl", "c/d.parquet", "g.md.gz", "h.json.gz", *unwanted):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    names = [file.relative_to(tmp_path).as_posix() for file in inputs.find([str(tmp_path)])]
    assert names == ["a.jsonl", "b.txt", "c/d.parquet", "g.md.gz", "h.json.gz"]
    assert inputs.find([str(tmp_path / "tokenizer.json")]) == [tmp_path / "tokenizer.json"]


def test_bad_inputs_are_named(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "x.png").touch()
    for name, message in (("no", "does not exist"), ("empty", "holds no file"), ("x.png", "no known kind")):
        with pytest.raises(UserError, match=message):
            inputs.find([str(tmp_path / name)])
    piece = inputs.shards([write_jsonl(tmp_path / "x.jsonl", ["a"])])[0].pieces[0]
    (tmp_path / "x.jsonl").unlink()
    with pytest.raises(UserError, match=r"x\.jsonl cannot be read: No such file"):
        list(Reader(piece, "text"))


def test_json_of_the_same_text_gives_the_same_text(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text(json.dumps({"text": "é"}) + "\r\n" + json.dumps({"text": "é"}, ensure_ascii=False))
    assert read(path) == [Text(1, "é"), Text(2, "é")]
