"""Preparation: the same bytes with any workers and after a kill, in small memory; damage by choice."""

import json
import os
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path

import numpy as np
import psutil
import pytest

from flashtrain.data import ByteTokenizer, JsonTokenizer, TokenFile, inputs, parts
from flashtrain.data.prepare import DAMAGED, SUMMARY, prepare
from flashtrain.errors import UserError
from tests.data.sets import make_tokenizer, texts, write_jsonl
from tests.train.runs import environment

FILES = ("tokens.bin", "tokens.idx", SUMMARY, "tokenizer.json", "tokenizer_config.json")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three inputs, a tokenizer, and the set ``whole`` that one worker made of them in one piece each."""
    folder = tmp_path_factory.mktemp("prepare")
    make_tokenizer(folder)
    write_jsonl(folder / "a.jsonl", texts(400))
    (folder / "b.txt").write_text("".join(texts(50, first=400)))
    write_jsonl(folder / "c.jsonl", ["", *texts(60, first=450)])
    prepare(sources(folder), folder / "whole", str(folder / "tokenizer"), workers=1)
    return folder


def sources(folder: Path) -> list[str]:
    return [str(folder / name) for name in ("a.jsonl", "b.txt", "c.jsonl")]


def contents(out: Path) -> dict[str, bytes]:
    """The set's files; its summary without the digest of the plan, which holds the size of a shard."""
    found = {name: (out / name).read_bytes() for name in FILES}
    summary = json.loads(found[SUMMARY])
    del summary["plan"]
    return found | {SUMMARY: json.dumps(summary).encode()}


def test_a_set_holds_every_document_in_order(folder: Path) -> None:
    tokenizer = JsonTokenizer(folder / "tokenizer")
    documents = [*texts(400), "".join(texts(50, first=400)), *texts(60, first=450)]
    expected = [[*tokenizer.encode(document), tokenizer.boundary] for document in documents]
    file = TokenFile(folder / "whole" / "tokens")
    assert file.dtype == np.uint16
    assert file.read(0, len(file)).tolist() == [token for document in expected for token in document]
    assert file.document_starts(0, len(file)).tolist() == np.cumsum([0, *map(len, expected[:-1])]).tolist()
    summary = json.loads((folder / "whole" / SUMMARY).read_text())
    assert (summary["documents"], summary["tokens"], summary["empty"]) == (461, len(file), 1)
    assert sorted(path.name for path in (folder / "whole").iterdir()) == sorted([*FILES, ".lock"])


def test_any_number_of_workers_and_shards_gives_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    for workers, shard_bytes in ((3, 4000), (4, 1 << 20)):  # many shards; more workers than shards
        out = tmp_path / str(workers)
        progress: list[tuple[int, int]] = []
        prepare(
            sources(folder), out, str(folder / "tokenizer"), workers=workers, shard_bytes=shard_bytes,
            advance=lambda *p, to=progress: to.append(p),
        )  # fmt: skip
        assert contents(out) == contents(folder / "whole")
        total = sum(Path(name).stat().st_size for name in sources(folder))
        assert progress[0] == (0, total)
        assert progress[-1] == (total, total)
        assert progress == sorted(progress)


def test_a_killed_preparation_goes_on_and_gives_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    words = (
        "import sys, time\nfrom pathlib import Path\nfrom flashtrain.data import parts, prepare\n"
        "if __name__ == '__main__':\n"
        "    prepare.prepare(sys.argv[3:], Path(sys.argv[1]), sys.argv[2], workers=2, shard_bytes=500)\n"
    )
    script = tmp_path / "run.py"
    script.write_text(words)
    out = tmp_path / "out"
    command = [sys.executable, str(script), str(out), str(folder / "tokenizer"), *sources(folder)]
    with subprocess.Popen(command, env=environment() | {"PYTHONPATH": os.getcwd()}) as run:
        deadline = time.monotonic() + 60
        while len(list(out.glob("parts/*.json"))) < 5:
            assert time.monotonic() < deadline
            assert run.poll() is None
            time.sleep(0.005)
        workers = psutil.Process(run.pid).children(recursive=True)
        run.kill()
    _, alive = psutil.wait_procs(workers, timeout=10)
    assert not alive, "workers outlived the process that started them"
    done = {path.name for path in out.glob("parts/*.json")}
    assert not (out / SUMMARY).exists(), "the kill came too late"
    key = sorted(done)[0].removesuffix(".json")
    (out / "parts" / f"{key}.bin").write_bytes(b"")  # a part that lost its tokens is made again
    made: list[tuple[int, int]] = []
    prepare(
        sources(folder), out, str(folder / "tokenizer"), workers=1, shard_bytes=500,
        advance=lambda *p: made.append(p),
    )  # fmt: skip
    assert made[0][0] > 0, "finished parts were made again"
    assert contents(out) == contents(folder / "whole")
    assert not (out / "parts").exists()


def test_a_kill_while_parts_are_joined_loses_nothing(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def arguments(out: Path) -> tuple:
        return sources(folder), out, str(folder / "tokenizer")

    calls = ("write_index", "durable.write", "durable.move", "shutil.rmtree")
    for call in calls:
        out = tmp_path / call

        class Killed(BaseException):
            pass

        def killed(*_: object, kind: type[BaseException] = Killed, **__: object) -> None:
            raise kind

        with monkeypatch.context() as patch:
            patch.setattr(f"flashtrain.data.prepare.{call}", killed)
            if call == "durable.move":  # in the worker process it is whole; here the first file is in place
                patch.setattr("flashtrain.data.durable.write", killed)
            with pytest.raises(Killed):
                prepare(*arguments(out), workers=1)
        prepare(*arguments(out), workers=1)
        assert contents(out) == contents(folder / "whole")


def test_a_complete_set_is_left_alone_and_never_overwritten(folder: Path, tmp_path: Path) -> None:
    out, tokenizer = tmp_path / "out", str(folder / "tokenizer")
    first = prepare(sources(folder)[:1], out, tokenizer, workers=1)
    before = (out / "tokens.bin").stat().st_mtime_ns
    assert prepare(sources(folder)[:1], out, tokenizer, workers=1) == first
    assert (out / "tokens.bin").stat().st_mtime_ns == before
    for changed in (
        (sources(folder), tokenizer, "text"),
        (sources(folder)[:1], "bytes", "text"),
        (sources(folder)[:1], tokenizer, "id"),
    ):
        with pytest.raises(UserError, match="holds a set of other inputs or settings"):
            prepare(changed[0], out, changed[1], field=changed[2], workers=1)
    (out / SUMMARY).write_text("{")
    with pytest.raises(UserError, match=r"prepared\.json is damaged"):
        prepare(sources(folder)[:1], out, tokenizer, workers=1)


def test_only_one_process_fills_a_folder(folder: Path, tmp_path: Path) -> None:
    import fcntl

    (tmp_path / "out").mkdir()
    with (tmp_path / "out" / ".lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="another process is preparing"):
            prepare(sources(folder), tmp_path / "out", "bytes", workers=1)


def test_damage_is_refused_or_skipped_and_named(folder: Path, tmp_path: Path) -> None:
    source = tmp_path / "x.jsonl"
    lines = write_jsonl(source, texts(90)).read_text().splitlines(keepends=True)
    lines[20], lines[70], lines[75] = "{bad\n", '{"words": 1}\n', '{"text": "a\\u0000b"}\n'
    source.write_text("".join(lines))
    bad_text = tmp_path / "y.txt"
    bad_text.write_bytes(b"one\n\xff")
    out = tmp_path / "out"
    with pytest.raises(UserError, match=r"x\.jsonl:(21|71|76): .*--damaged skip") as caught:
        prepare([str(source)], out, "bytes", workers=2, shard_bytes=2000)
    assert "\n" not in str(caught.value)
    assert not (out / SUMMARY).exists()
    made = prepare([str(source), str(bad_text)], out, "bytes", workers=2, damaged="skip", shard_bytes=2000)
    assert (made.documents, made.damaged) == (87, 4)
    named = (out / DAMAGED).read_text().splitlines()
    assert [line.split(": ")[0] for line in named] == [
        f"{source}:21", f"{source}:71", f"{source}:76", f"{bad_text}:2"
    ]  # fmt: skip
    assert [line.split(": ", 1)[1][:20] for line in named[1:]] == [
        "no field 'text'", "the text holds the t", "invalid UTF-8"
    ]  # fmt: skip
    file = TokenFile(out / "tokens")
    healthy = [text for n, text in enumerate(texts(90)) if n not in (20, 70, 75)]
    assert bytes(file.read(0, len(file)).astype(np.uint8)) == b"".join(t.encode() + b"\0" for t in healthy)
    with pytest.raises(UserError, match=r"x\.jsonl:21: not valid JSON"):
        prepare([str(source), str(bad_text)], out, "bytes", workers=1, shard_bytes=2000)


def test_half_a_document_is_taken_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flashtrain.data.records._BLOCK", 50)
    monkeypatch.setattr("flashtrain.data.parts._BATCH_TEXTS", 1)
    names = []
    for name, data in (
        ("a", b"whole\n"),
        ("b", b"word\n" * 90 + b"\xff"),
        ("c", b"x\n" * 90 + b"\0\n" + b"y\n" * 90),
    ):
        (tmp_path / f"{name}.txt").write_bytes(data)
        names.append(tmp_path / f"{name}.txt")
    (tmp_path / "d.txt").write_bytes(b"end")
    (shard,) = inputs.shards([*names, tmp_path / "d.txt"])
    part = parts.make(shard, "key", tmp_path, ByteTokenizer(), "text", "skip", lambda size: None)
    tokens = np.fromfile(tmp_path / "key.bin", dtype="<u2")
    assert bytes(tokens.astype(np.uint8)) == b"whole\n\0end\0"
    assert (part.documents, part.tokens) == (2, 11)
    assert [len(stretch.damaged) for stretch in part.stretches] == [0, 1, 1, 0]


def test_parts_with_damage_are_not_taken_where_damage_is_refused(tmp_path: Path) -> None:
    source = tmp_path / "x.jsonl"
    source.write_text('{"text": "a"}\n{bad\n')
    out = tmp_path / "out"
    shard = inputs.shards(inputs.find([str(source)]))[0]
    (out / "parts").mkdir(parents=True)
    key = shard.key(json.dumps([1, "bytes", "text"]))
    parts.make(shard, key, out / "parts", ByteTokenizer(), "text", "skip", lambda size: None)
    with pytest.raises(UserError, match=r"x\.jsonl:2: not valid JSON"):
        prepare([str(source)], out, "bytes", workers=1)
    assert prepare([str(source)], out, "bytes", workers=1, damaged="skip").documents == 1


def test_nothing_left_is_an_error(tmp_path: Path) -> None:
    source = tmp_path / "x.jsonl"
    source.write_text('{"words": "a"}\n' * 3 + '{"text": ""}\n')
    with pytest.raises(
        UserError, match=r"1 are empty and 3 damaged, the first: .*x\.jsonl:1: no field 'text'"
    ):
        prepare([str(source)], tmp_path / "out", "bytes", workers=1, damaged="skip")
    source.write_text("")
    with pytest.raises(UserError, match="all files are empty"):
        prepare([str(source)], tmp_path / "out", "bytes", workers=1)
    with pytest.raises(UserError, match="workers is 0"):
        prepare([str(source)], tmp_path / "out", "bytes", workers=0)


def test_a_worker_that_is_killed_is_an_error_in_one_line(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Bomb:
        """Kills the worker that receives it."""

        def __reduce__(self) -> tuple:
            return os._exit, (9,)

    monkeypatch.setattr("flashtrain.data.inputs.shards", lambda *_: [shard])
    shard = inputs.Shard((inputs.Piece("x", "text", 0, 1, 1, (0, 0)),))
    object.__setattr__(shard, "bomb", Bomb())
    monkeypatch.setattr(inputs.Shard, "key", lambda *_: "key")
    with pytest.raises(UserError, match=r"a worker process was killed.*fewer --workers"):
        prepare(sources(folder), tmp_path / "out", "bytes", workers=1)


def peak(shard: inputs.Shard, out: Path) -> int:
    """Bytes of Python and NumPy memory that making a part takes at the most."""
    tracemalloc.start()
    try:
        parts.make(shard, "key", out, ByteTokenizer(), "text", "refuse", lambda size: None)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("kind", ["jsonl", "txt"])
def test_memory_does_not_grow_with_the_input(tmp_path: Path, kind: str) -> None:
    peaks = []
    for size in (1, 4):
        path = tmp_path / f"{size}.{kind}"
        line = "word " * 400 + "\n"
        if kind == "jsonl":
            line = json.dumps({"text": line}) + "\n"
        path.write_text(line * (size * 5000))
        (shard,) = inputs.shards([path], 1 << 30)
        peaks.append(peak(shard, tmp_path))
    assert peaks[0] < 30e6
    assert peaks[1] < 1.2 * peaks[0]
