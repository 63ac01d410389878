"""``flashtrain data``, and training and sampling with what it made."""

import json
import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from flashtrain.launch.main import main
from tests.data.sets import make_tokenizer, texts, write_jsonl
from tests.train.runs import TINY, environment, flashtrain, metrics
from tests.train.test_resume import _wait_for_step


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sets ``a`` and ``b``, made by the command, and their tokenizer."""
    folder = tmp_path_factory.mktemp("data")
    make_tokenizer(folder)
    for name, first in (("a", 0), ("b", 500)):
        source = write_jsonl(folder / f"{name}.jsonl", texts(500, first=first))
        words = ["--tokenizer", str(folder / "tokenizer"), "--out", str(folder / name), "--workers", "1"]
        assert main(["data", "prepare", str(source), *words]) == 0
    return folder


def train_words(out: Path, *sets: Path, **settings: object) -> list[str]:
    """The words of a tiny run on prepared sets; dots in names of ``settings`` are two underscores."""
    merged = {
        **TINY,
        "data.sets": ",".join(map(str, sets)),
        "model.vocabulary": 400,
        **{key.replace("__", "."): value for key, value in settings.items()},
    }
    options = [word for key, value in merged.items() for word in (f"--{key}", str(value))]
    return ["train", "demo", "--out", str(out), "--data.class", "PreparedData.Config", *options]


def error_line(words: list[str], capfd: pytest.CaptureFixture[str]) -> str:
    """The one line that a command says when it is refused."""
    capfd.readouterr()
    assert main(words) == 2
    error = capfd.readouterr().err.strip()
    assert len(error.splitlines()) == 1, error
    return error


def test_a_tokenizer_and_a_set_from_the_command_line(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    source = write_jsonl(tmp_path / "x.jsonl", ["", *texts(100)])
    with source.open("a") as stream:
        stream.write("{bad\n")
    tokenizer = ["data", "tokenizer", str(source), "--vocab-size", "300", "--out", str(tmp_path / "tok")]
    assert main([*tokenizer, "--damaged", "skip"]) == 0
    out, err = capfd.readouterr()
    assert f"{tmp_path / 'tok' / 'tokenizer.json'}: 300 tokens" in out
    assert f"left out {source}:102: not valid JSON" in err
    prepare = [
        "data",
        "prepare",
        str(source),
        "--tokenizer",
        str(tmp_path / "tok"),
        "--out",
        str(tmp_path / "set"),
    ]
    assert f"{source}:102: not valid JSON" in error_line(prepare, capfd)
    assert main([*prepare, "--damaged", "skip", "--workers", "1"]) == 0
    out, _ = capfd.readouterr()
    assert "in 100 documents" in out
    assert "left out 1 empty documents" in out
    assert f"left out 1 damaged records, named in {tmp_path / 'set' / 'damaged.log'}" in out


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["prepare", "no.txt", "--tokenizer", "bytes", "--out", "x"], "input no.txt does not exist"),
        (["prepare", "a.jsonl", "--tokenizer", "no.json", "--out", "x"], "tokenizer no.json cannot be read"),
        (["prepare", "a.jsonl", "--tokenizer", "bytes"], "--out"),
        (["prepare", "a.jsonl", "--tokenizr", "x", "--out", "x"], "--tokenizer"),
        (
            ["prepare", "a.jsonl", "--tokenizer", "bytes", "--out", "x", "--worker", "3"],
            "nearest is --workers",
        ),
        (
            ["prepare", "a.jsonl", "--tokenizer", "bytes", "--out", "a.jsonl"],
            "cannot write a.jsonl: File exists",
        ),
        (["tokenizer", "a.jsonl", "--vocab-size", "3", "--out", "x"], "vocab-size is 3"),
        (["tokenizer", "a.jsonl", "--vocab-size", "9" * 12, "--out", "x"], "vocab-size is 9"),
        (["prepair"], "prepair"),
        ([], "ACTION"),
    ],
)
def test_bad_requests_are_one_line(
    words: list[str],
    line: str,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(folder)
    assert line in error_line(["data", *words], capfd)
    assert not (folder / "x").exists()


@pytest.mark.parametrize(("culprit", "said"), [("in/a", "in/a: Permission"), ("x/b", "cannot write x: Perm")])
def test_what_cannot_be_read_is_not_said_to_be_unwritable(
    culprit: str, said: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied", culprit)

    monkeypatch.setattr("flashtrain.data.prepare.prepare", refuse)
    assert said in error_line(["data", "prepare", "in", "--tokenizer", "bytes", "--out", "x"], capfd)


def test_a_full_disk_is_one_line_and_what_was_done_is_kept(
    folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["data", "prepare", str(folder / "a.jsonl"), "--tokenizer", "bytes", "--out", str(tmp_path / "x")]

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device", str(tmp_path / "x"))

    with monkeypatch.context() as patch:
        patch.setattr("flashtrain.data.prepare.write_index", full)
        line = error_line([*words, "--workers", "1"], capfd)
    assert f"cannot write {tmp_path / 'x'}: No space left on device" in line
    assert "free space" in line
    assert list((tmp_path / "x" / "parts").glob("*.json"))
    assert main([*words, "--workers", "1"]) == 0


def test_preparing_takes_no_torch(folder: Path, tmp_path: Path) -> None:
    words = (
        f"import sys; from flashtrain.launch.main import main\n"
        f"assert main(['data', 'prepare', {str(folder / 'a.jsonl')!r}, '--tokenizer', 'bytes', "
        f"'--out', {str(tmp_path / 'x')!r}, '--workers', '1']) == 0\nassert 'torch' not in sys.modules\n"
    )
    script = tmp_path / "script.py"
    script.write_text("if __name__ == '__main__':\n    " + words.replace("\n", "\n    "))
    done = subprocess.run(
        [sys.executable, str(script)],
        env=environment() | {"PYTHONPATH": os.getcwd()},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


def test_an_interrupt_ends_the_workers_and_keeps_the_parts(folder: Path, tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "x.jsonl", texts(200_000))
    words = ["data", "prepare", str(source), "--tokenizer", str(folder / "tokenizer")]
    command = [
        sys.executable,
        "-m",
        "flashtrain.launch.main",
        *words,
        "--out",
        str(tmp_path / "x"),
        "--workers",
        "2",
    ]
    with subprocess.Popen(command, env=environment(), stderr=subprocess.PIPE, text=True) as run:
        while not list((tmp_path / "x").glob("parts/*.bin")):
            assert run.poll() is None
            psutil.wait_procs([], timeout=0.01)
        workers = psutil.Process(run.pid).children(recursive=True)
        for process in (*workers, psutil.Process(run.pid)):  # as a terminal does
            process.send_signal(2)
        _, err = run.communicate(timeout=30)
    assert run.returncode == 130, err
    assert "Traceback" not in err
    _, alive = psutil.wait_procs(workers, timeout=10)
    assert not alive


def test_a_run_on_a_blend_samples_with_its_tokenizer(
    folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    words = train_words(
        tmp_path / "run", folder / "a", folder / "b", data__weights="3,1", train__steps=4,
        parallel__tensor=1, parallel__data=2,
    )  # fmt: skip
    done = flashtrain(words, world=2)
    assert done.returncode == 0, done.stderr
    assert "75.0% of the samples" in done.stdout
    assert [line["step"] for line in metrics(tmp_path / "run")] == [1, 2, 3, 4]
    one = flashtrain([*words[:3], str(tmp_path / "one"), *words[4:], "--parallel.data", "1"])
    assert one.returncode == 0, one.stderr
    for two, alone in zip(metrics(tmp_path / "run"), metrics(tmp_path / "one"), strict=True):
        assert two["loss"] == pytest.approx(alone["loss"], abs=1e-4)  # the same samples on any ranks
    held = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert held["held_out_loss"] == pytest.approx(5.99, abs=0.3)  # near ln(400) after so few steps
    assert (tmp_path / "run" / "tokenizer.json").read_bytes() == (
        folder / "a" / "tokenizer.json"
    ).read_bytes()
    sampled = flashtrain(["sample", str(tmp_path / "run"), "--prompt", "line é", "--tokens", "5"])
    assert sampled.returncode == 0, sampled.stderr
    assert sampled.stdout.startswith("line é")
    (tmp_path / "run" / "tokenizer.json").unlink()
    line = error_line(["sample", str(tmp_path / "run"), "--prompt", "line"], capfd)
    assert "tokenizer.json is missing: copy it from" in line


def test_settings_that_do_not_fit_the_sets_are_one_line(
    folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    words = train_words(tmp_path / "run", folder / "a", model__vocabulary=256)
    assert "model.vocabulary is 256; it must be at least the tokenizer's 400" in error_line(words, capfd)
    (tmp_path / "broken").mkdir()
    for name in ("tokens.bin", "tokens.idx", "prepared.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "broken" / name).write_bytes((folder / "a" / name).read_bytes())
    os.truncate(tmp_path / "broken" / "tokens.bin", 100)
    words = train_words(tmp_path / "run", tmp_path / "broken")
    assert "tokens.bin has 100 bytes, but its index says" in error_line(words, capfd)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("how", ["vanished", "truncated"])
def test_a_set_that_breaks_in_mid_run_ends_it_with_one_line(folder: Path, tmp_path: Path, how: str) -> None:
    source, tokenizer = str(folder / "a.jsonl"), str(folder / "tokenizer")
    where = ["--tokenizer", tokenizer, "--out", str(tmp_path / "set"), "--workers", "1"]
    assert main(["data", "prepare", source, *where]) == 0
    broken, whole = tmp_path / "set" / "tokens.bin", (tmp_path / "set" / "tokens.bin").read_bytes()
    settings = {"train__steps": 100_000, "checkpoint__every": 2, "parallel__tensor": 1}
    words = train_words(tmp_path / "run", tmp_path / "set", **settings)
    command = [sys.executable, "-m", "flashtrain.launch.main", *words]
    with subprocess.Popen(
        command, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    ) as run:
        _wait_for_step(tmp_path / "run", 4)
        if how == "vanished":
            broken.unlink()
        else:
            os.truncate(broken, 1000)
        _, err = run.communicate(timeout=60)
    assert run.returncode == 2, err
    (line,) = [line for line in err.splitlines() if line.startswith("flashtrain: error: ")]
    assert str(broken) in line
    assert how == "truncated" or "vanished while it was read" in line
    if how == "vanished":
        return
    broken.write_bytes(whole)
    last = metrics(tmp_path / "run")[-1]["step"]
    settings["train__steps"] = last + 2
    again = flashtrain(train_words(tmp_path / "run", tmp_path / "set", **settings))
    assert again.returncode == 0, again.stderr
    assert "resuming after step" in again.stderr
