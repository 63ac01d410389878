"""Bad input, and ranks that stop: one clear line, the right exit code, nothing left behind."""

import os
import signal
import subprocess
from pathlib import Path

import psutil
import pytest

from tests.train.runs import TINY, command, environment, metrics, train, write_text
from tests.train.test_resume import _ranks, _wait_for_step


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text") / "text.txt")


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"train__stepz": 3}, ["train.stepz", "train.steps"]),
        (
            {"model__kv_heads": 4, "model__heads": 8, "parallel__tensor": 8},
            ["model.kv_heads", "parallel.tensor"],
        ),
        ({"data__source": "/nowhere/at/all"}, ["/nowhere/at/all"]),
        ({"train__dtype": "float8"}, ["train.dtype", "float8"]),
        ({"parallel__data": 3}, ["train.batch", "parallel.data"]),
        ({"train__sequence": 10**9}, ["1000000000"]),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    text: Path,
    tmp_path: Path,
    settings: dict[str, object],
    named: list[str],
    capfd: pytest.CaptureFixture[str],
) -> None:
    from flashtrain.launch.main import main

    words = command(tmp_path / "out", settings.pop("data__source", text), **settings)[3:]  # type: ignore[arg-type]
    assert main(words) == 2
    error = capfd.readouterr().err
    assert len(error.strip().splitlines()) == 1, error
    for name in named:
        assert name in error
    assert not (tmp_path / "out").exists()


def test_an_empty_corpus_is_refused(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    from flashtrain.launch.main import main

    (tmp_path / "empty.txt").write_text("")
    assert main(command(tmp_path / "out", tmp_path / "empty.txt")[3:]) == 2
    error = capfd.readouterr().err
    assert "empty" in error
    assert len(error.strip().splitlines()) == 1


def test_a_world_size_that_the_degrees_do_not_multiply_to(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    from flashtrain.launch.main import main

    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert main(command(tmp_path / "out", text)[3:]) == 2
    assert "torchrun started 3" in capfd.readouterr().err


def test_a_rank_that_stops_is_named_by_the_others(text: Path, tmp_path: Path) -> None:
    shared_before = set(os.listdir("/dev/shm"))
    settings = {"train__steps": 100_000, "comm__timeout": 4, "checkpoint__every": 0}
    with subprocess.Popen(
        command(tmp_path, text, **settings),
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as run:
        _wait_for_step(tmp_path, 3)
        ranks = _ranks(run.pid)
        sleeper = next(p for p in ranks if p.environ()["RANK"] == "1")
        sleeper.send_signal(signal.SIGSTOP)
        psutil.wait_procs([p for p in ranks if p != sleeper], timeout=4 + 10)
        # A stopped process answers no SIGTERM; the launcher would kill it after a grace of 30 s.
        sleeper.send_signal(signal.SIGCONT)
        _, gone_late = psutil.wait_procs(ranks, timeout=10)
        _, errors = run.communicate(timeout=30)
    assert not gone_late, "the ranks outlived the time-out by far"
    assert run.returncode not in (0, 2)
    message = next(line for line in errors.splitlines() if "peer rank 1" in line)
    for part in ("training step", "rank 0", "step", "chunk", "4.0 s"):
        assert part in message, message
    assert any(op in message for op in ("all_gather", "reduce_scatter"))
    made = set(os.listdir("/dev/shm")) - shared_before
    assert not [name for name in made if not name.startswith("sem.mp-")], "these are other programs'"
    assert len(metrics(tmp_path)) >= 3


def test_a_terminated_run_leaves_no_process_behind(text: Path, tmp_path: Path) -> None:
    with subprocess.Popen(
        command(tmp_path, text, train__steps=100_000),
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as run:
        _wait_for_step(tmp_path, 2)
        everyone = psutil.Process(run.pid).children(recursive=True)
        run.send_signal(signal.SIGTERM)
        run.communicate(timeout=60)
    assert run.returncode != 0
    _, alive = psutil.wait_procs(everyone, timeout=15)
    assert not alive


def test_data_that_has_vanished_is_named_and_the_checkpoint_stays(
    text: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    from flashtrain.launch.main import main

    source, out = tmp_path / "gone.txt", tmp_path / "out"
    source.write_bytes(text.read_bytes())
    assert train(out, source, train__steps=2, parallel__tensor=1).returncode == 0
    kept = {file: file.read_bytes() for file in (out / "checkpoints").rglob("*") if file.is_file()}
    source.unlink()
    capfd.readouterr()
    assert main(command(out, source, train__steps=4, parallel__tensor=1)[3:]) == 2
    (line,) = capfd.readouterr().err.strip().splitlines()
    assert str(source) in line
    assert kept == {file: file.read_bytes() for file in (out / "checkpoints").rglob("*") if file.is_file()}


def test_a_folder_that_cannot_be_written_is_one_line(text: Path) -> None:
    # Nobody may create files there, not even root.
    done = train(Path("/sys/flashtrain"), text, train__steps=2, parallel__tensor=1)
    assert done.returncode == 2, done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("flashtrain: error:")]
    assert "cannot write the records of the run in /sys/flashtrain" in line
    assert "choose another directory" in line or "choose a directory" in line


def test_a_second_run_in_a_folder_is_refused_and_leaves_the_first_alone(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    from flashtrain.launch.main import main
    from flashtrain.train import claim

    monkeypatch.setattr(claim, "PATIENCE", 0.0)
    with claim.claimed(tmp_path):
        (tmp_path / "metrics.jsonl").write_text("of the first\n")
        assert main(command(tmp_path, text, train__steps=2, parallel__tensor=1)[3:]) == 2
        assert "another run goes on" in capfd.readouterr().err.splitlines()[-1]
        assert sorted(file.name for file in tmp_path.iterdir()) == [claim.LOCK, "metrics.jsonl"]
        assert (tmp_path / "metrics.jsonl").read_text() == "of the first\n"


def test_the_tiny_settings_are_known() -> None:
    from flashtrain.config import keys
    from flashtrain.recipes import demo

    assert set(TINY) <= set(keys(demo()))


def test_a_run_writes_what_it_promises(text: Path, tmp_path: Path) -> None:
    done = train(tmp_path, text, train__steps=6, checkpoint__every=2)
    assert done.returncode == 0, done.stderr
    for name in ("loss.png", "metrics.jsonl", "config.toml", "checkpoints/latest"):
        assert (tmp_path / name).is_file(), name
    assert list((tmp_path / "tensorboard").glob("events*"))
    assert len(list((tmp_path / "checkpoints").glob("step-*"))) == 2
    for line in metrics(tmp_path):
        assert {"step", "loss", "grad_norm", "tokens_per_s", "overlap"} <= set(line)
        assert line["mfu"] is None
        assert 0 <= line["overlap"] <= 1
    for words in (
        "unigram entropy",
        "held-out loss",
        "a sample",
        "communication hidden",
        "flashtrain sample",
    ):
        assert words in done.stdout
    assert "by host" in done.stdout, "the first line says which transport moves the bytes"
    sample = subprocess.run(
        [*command(tmp_path, text)[:3], "sample", str(tmp_path), "--prompt", "line 1", "--tokens", "20"],
        env=environment(), capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert sample.returncode == 0, sample.stderr
    assert sample.stdout.startswith("line 1")
    nothing = subprocess.run(
        [*command(tmp_path, text)[:3], "sample", str(tmp_path / "loss.png"), "--prompt", "x"],
        env=environment(), capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert nothing.returncode == 2
    assert "no checkpoint" in nothing.stderr
