"""The command line: subcommands, one-line errors, exit codes."""

import contextlib
import errno
import gc
import os
import subprocess
import sys
import types
from collections.abc import Callable

import pytest

import flashtrain
from flashtrain.errors import TransportError, UserError
from flashtrain.launch import garbage, main


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable], None]:
    """Puts a function in the place of what ``flashtrain doctor`` runs."""

    def replace(run: Callable) -> None:
        module = types.ModuleType("flashtrain.launch.doctor")
        module.add_parser = lambda subparsers: subparsers.add_parser("doctor").set_defaults(run=run)  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, module.__name__, module)

    return replace


def raising(error: BaseException) -> Callable:
    def run(args: object) -> int:
        raise error

    return run


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (UserError("no such\nthing"), 2, "flashtrain: error: no such thing\n"),
        (TransportError("rank 1: peer died"), 1, "flashtrain: error: rank 1: peer died\n"),
        (KeyboardInterrupt(), 130, ""),
        (
            PermissionError(errno.EACCES, "Permission denied", "/a/b"),
            2,
            "flashtrain: error: /a/b: Permission denied: choose another path, or mend this one\n",
        ),
        (
            OSError(errno.ENOSPC, "No space left on device"),
            2,
            "flashtrain: error: No space left on device; free space on this file system or choose another "
            "directory\n",
        ),
    ],
)
def test_errors_become_a_line_and_a_code(
    command: Callable, capsys: pytest.CaptureFixture[str], error: BaseException, code: int, line: str
) -> None:
    command(raising(error))
    assert main.main(["doctor"]) == code
    assert capsys.readouterr() == ("", line)


def test_closed_streams_swallow_what_is_said() -> None:
    words = f"{sys.executable} -c 'import sys; from flashtrain.launch import main; main.main = "
    words += "lambda: print(1) or print(2, file=sys.stderr) or sys.stdout.isatty(); sys.exit(main.program())'"
    assert subprocess.run(["sh", "-c", f"exec {words} >&- 2>&-"]).returncode == 0


def test_a_terminal_without_arrows_is_no_traceback() -> None:
    words = [sys.executable, "-m", "flashtrain.launch.main", "schedule", "--op", "all_gather"]
    done = subprocess.run(
        words, env=os.environ | {"PYTHONIOENCODING": "ascii"}, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "computed chunk (* own), sends (\\u2192 rank)" in done.stdout


def test_the_code_of_a_command_is_passed_on(command: Callable) -> None:
    command(lambda args: 7)
    assert main.main(["doctor"]) == 7


@pytest.mark.parametrize("error", [ZeroDivisionError(), OSError(errno.EBADF, "Bad file descriptor")])
def test_other_errors_keep_their_traceback(command: Callable, error: Exception) -> None:
    command(raising(error))
    with pytest.raises(type(error)):
        main.main(["doctor"])


@pytest.mark.parametrize("words", [["--help"], ["schedule", "--op", "all_gather", "--rows", "4"]])
def test_a_reader_that_has_gone_is_no_traceback(words: list[str]) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        [sys.executable, "-m", "flashtrain.launch.main", *words],
        stdout=writing,
        stderr=subprocess.PIPE,
        text=True,
        env={key: value for key, value in os.environ.items() if key != "PYTHONUNBUFFERED"},
    )
    os.close(writing)
    assert (done.returncode, done.stderr) == (1, "")


def test_one_rank_of_torchrun_speaks(
    command: Callable,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: object,
) -> None:
    command(raising(UserError("no corpus")))
    monkeypatch.setenv("RANK", "0")
    assert main.main(["doctor"]) == 2
    assert capsys.readouterr().err == "flashtrain: error: no corpus\n"
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", f"{tmp_path}/error.json")
    assert main.main(["doctor"]) == 2
    assert capsys.readouterr().err == ""
    with open(f"{tmp_path}/error.json") as file:
        assert "no corpus" in file.read()


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        (["trian"], "unknown command trian; the nearest is train"),
        (["--verison"], "unknown option --verison; the nearest is --version"),
        (["schedule", "--op", "all_gather", "--wrld=3"], "unknown option --wrld=3; the nearest is --world"),
        (["schedule", "--op", "all_gather", "--wor", "3"], "unknown option --wor; the nearest is --world"),
        (["schedule", "--op", "all_gather", "x"], "flashtrain schedule: unexpected argument x"),
        (["schedule", "--op", "allgather"], "argument --op: invalid choice: 'allgather' (choose from"),
        (["schedule", "--op", "all_gather", "--world", "x"], "argument --world: invalid int value: 'x'"),
        (["schedule"], "the following arguments are required: --op (see flashtrain schedule --help)"),
        (["train"], "the following arguments are required: RECIPE (see flashtrain train --help)"),
    ],
)
def test_wrong_words_are_one_line(argv: list[str], line: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(argv) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("flashtrain: error: ")
    assert line in err
    assert err.count("\n") == 1


@pytest.mark.parametrize("argv", [[], ["--help"], ["-h"]])
def test_help_lists_the_commands(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as leaving:
        main.main(argv)
    assert leaving.value.code == 0
    shown = capsys.readouterr().out
    assert all(f"    {name} " in shown for name in main.COMMANDS)


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as leaving:
        main.main(["--version"])
    assert leaving.value.code == 0
    assert capsys.readouterr().out == f"flashtrain {flashtrain.__version__}\n"


@pytest.mark.parametrize("name", main.COMMANDS)
def test_every_command_explains_itself(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as leaving:
        main.main([name, "--help"])
    assert leaving.value.code == 0
    assert f"usage: flashtrain {name}" in capsys.readouterr().out


def test_help_imports_nothing_heavy() -> None:
    words = "import sys; from flashtrain.launch import main; main.parse(['schedule', '--op', 'all_gather']); "
    words += "main.parse(['train', 'demo', '--train.steps', '3']); main.parse(['doctor']); "
    words += (
        "print([name for name in ('torch', 'numpy', 'rich', 'matplotlib', 'tyro') if name in sys.modules])"
    )
    shown = subprocess.run([sys.executable, "-c", words], capture_output=True, text=True, check=True)
    assert shown.stdout == "[]\n"


def test_garbage_is_collected_again_behind_imports_but_not_looked_for_in_them() -> None:
    for switch in (gc.disable, gc.enable):
        switch()
        before, frozen = gc.isenabled(), gc.get_freeze_count()
        with contextlib.suppress(ImportError), garbage.none_in_imports():
            assert not gc.isenabled()
            imported = [object() for _ in range(2)], []
            raise ImportError
        assert gc.isenabled() == before
        assert gc.get_freeze_count() > frozen
        assert not any(one is imported for one in gc.get_objects())
        gc.unfreeze()
