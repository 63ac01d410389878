"""One run at a time in a folder."""

import errno
import fcntl
import os
import threading
from pathlib import Path

import pytest

from flashtrain.errors import UserError
from flashtrain.train import claim
from flashtrain.train.claim import claimed


def test_a_second_run_is_refused_and_told_of_the_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(claim, "PATIENCE", 0.0)
    with claimed(tmp_path / "new/run"):
        with (
            pytest.raises(
                UserError, match=rf"^another run goes on in .*/new/run \(process {os.getpid()} on "
            ),
            claimed(tmp_path / "new/run"),
        ):
            pytest.fail("it was let in")
        with claimed(tmp_path / "other"):
            pass
    with claimed(tmp_path / "new/run"):
        (tmp_path / "new/run/record").touch()
    assert [path.name for path in tmp_path.rglob("*")] == ["new", "run", "record"]


def test_a_run_that_is_just_ending_is_waited_for(tmp_path: Path) -> None:
    inside, go = threading.Event(), threading.Event()

    def first() -> None:
        with claimed(tmp_path / "run"):
            inside.set()
            go.wait(5)

    thread = threading.Thread(target=first)
    thread.start()
    inside.wait(5)
    threading.Timer(0.2, go.set).start()
    with claimed(tmp_path / "run"):
        assert go.is_set()
        with (tmp_path / "run" / claim.LOCK).open() as file, pytest.raises(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    thread.join()


def test_where_nothing_can_be_locked_it_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(file: object, how: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with claimed(tmp_path):
        assert "cannot lock" in caplog.text
        assert str(tmp_path) in caplog.text


def test_a_folder_that_is_a_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "run").touch()
    with (
        pytest.raises(UserError, match=r"cannot write the records of the run in .*/run .*File exists"),
        claimed(tmp_path / "run"),
    ):
        pytest.fail("it was let in")
