"""``flashtrain train``: settings, the choice of ranks, and how a run with several ranks ends."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

import flashtrain
from flashtrain.launch import main, ranks
from flashtrain.recipes import RECIPES

STUB = Path(__file__).parent / "stub"
ROOT = Path(__file__).parents[2]


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch) -> None:
    """The stand-in recipes and trainer, in this process."""
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    spec = spec_from_file_location("stub_trainer", STUB / "sitecustomize.py")
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "stub_trainer", module)
    spec.loader.exec_module(module)
    modules = module.install()
    for name, one in modules.items():
        monkeypatch.setitem(sys.modules, name, one)
    monkeypatch.setattr(flashtrain, "recipes", modules["flashtrain.recipes"], raising=False)


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["oen"], "unknown recipe oen; the nearest is one"),
        (["--act.rank", "3", "one"], "unknown recipe 3; the nearest is one (a recipe comes before settings)"),
        (["one", "--act.hwo", "kill"], "unknown key --act.hwo; the nearest is --act.how"),
        (["one", "--act.rank", "x"], "--act.rank x: expected int"),
        (["one", "--act.rank"], "--act.rank needs a value: int"),
        (["one", "x"], "unexpected argument x"),
        (["one", "--config", "/no/such.toml"], "/no/such.toml: cannot be read: No such file or directory"),
        (["two", "--invalid", "true"], "invalid is true; leave it false"),
    ],
)
@pytest.mark.usefixtures("stub")
def test_wrong_settings_are_one_line_before_any_rank_starts(
    words: list[str], line: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ranks, "launch", lambda *_: pytest.fail("ranks were started"))
    assert main.main(["train", *words]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert line in err


def test_help_names_every_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main.main(["train", "--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert f"where settings start: {' or '.join(RECIPES)}" in shown


@pytest.mark.usefixtures("stub")
def test_one_rank_runs_here(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main.main(["train", "one"]) == 0
    assert (tmp_path / "runs/one/rank0").read_text().startswith(f"{os.getpid()} None ")
    assert main.main(["train", "one", "--act.how=user_error"]) == 2
    assert capsys.readouterr().err == "flashtrain: error: there is no corpus\n"
    assert main.main(["train", "one", "--act.how", "transport_error"]) == 1
    assert capsys.readouterr().err == "flashtrain: error: rank 0: peer died\n"


@pytest.mark.usefixtures("stub")
def test_several_ranks_get_the_same_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started = []
    monkeypatch.setattr(ranks, "launch", lambda world, words: started.append((world, words)) or 0)
    file = tmp_path / "a b.toml"
    file.write_text("[parallel]\ndata = 3\n")
    assert main.main(["train", "two", "--config", str(file), "--act.rank", "-1", "--invalid=false"]) == 0
    ((world, words),) = started
    assert world == 6
    assert words == [
        "train", "two", f"--config={file}", "--out=runs/two", "--act.rank", "-1", "--invalid=false"
    ]  # fmt: skip
    assert main.main(words) == 0
    assert started[1] == started[0]


@pytest.mark.usefixtures("stub")
def test_ranks_of_torchrun_are_used_if_they_fit(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ranks, "launch", lambda *_: pytest.fail("ranks were started"))
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert main.main(["train", "two"]) == 2
    expected = "parallel.tensor 2 x parallel.data 1 asks for 2 ranks, but torchrun started 3"
    assert capsys.readouterr().err == f"flashtrain: error: {expected}\n"
    monkeypatch.setenv("WORLD_SIZE", "2")
    (tmp_path / "rank1").touch()
    assert main.main(["train", "two", "--out", str(tmp_path)]) == 0
    assert (tmp_path / "rank0").exists()


def failure(code: int, message: str | None = None, timestamp: int = 0) -> SimpleNamespace:
    data = {"message": {"message": message} if message else "<NONE>"}
    name = signal.Signals(-code).name if code < 0 else ""
    return SimpleNamespace(exitcode=code, error_file_data=data, timestamp=timestamp, signal_name=lambda: name)


@pytest.mark.parametrize(
    ("failures", "code", "line"),
    [
        ({0: failure(1, "TransportError: lost rank 1"), 1: failure(-9, timestamp=5)}, 1,
         "rank 1 was killed by SIGKILL; the other ranks were stopped"),
        ({0: failure(1, "TransportError: lost rank 1"), 1: failure(2, "UserError: no corpus: x", 5)}, 2,
         "no corpus: x"),
        ({0: failure(1, "TransportError: lost rank 1"), 1: failure(3, timestamp=5)}, 1,
         "rank 1 ended with exit code 3; the other ranks were stopped"),
        ({0: failure(-15), 1: failure(1, "TransportError: rank 1: nothing from rank 0", 5)}, 1,
         "rank 1: nothing from rank 0"),
        ({1: failure(-15), 0: failure(-15)}, 1, "rank 1 was killed by SIGTERM; the other ranks were stopped"),
        ({0: failure(2)}, 1, "rank 0 ended with exit code 2; the other ranks were stopped"),
    ],
)  # fmt: skip
def test_the_cause_is_named_and_not_its_consequence(
    failures: dict, code: int, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ranks._explain(failures) == code
    assert capsys.readouterr().err == f"flashtrain: error: {line}\n"


def test_ranks_that_were_asked_to_stop_are_no_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert ranks._explain({0: failure(-15), 1: failure(143, timestamp=5)}) == 143  # type: ignore[arg-type]
    assert capsys.readouterr().err == ""


def test_threads_that_the_user_chose_are_kept_and_said(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    with caplog.at_level("INFO", "flashtrain"):
        ranks._share_cores(2)
    assert os.environ["OMP_NUM_THREADS"] == "7"
    assert "2 ranks, OMP_NUM_THREADS=7 as the environment has it" in caplog.text


@pytest.mark.parametrize("hung_up", [False, True])
def test_nohup_is_heeded_and_a_save_gets_time(monkeypatch: pytest.MonkeyPatch, hung_up: bool) -> None:
    from torch.distributed.launcher import api

    found = []
    monkeypatch.setattr(api, "elastic_launch", lambda config, _: lambda *_: found.append(config))
    monkeypatch.delenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN if hung_up else signal.SIG_DFL)
    try:
        assert ranks.launch(2, ["train", "demo"]) == 0
    finally:
        signal.signal(signal.SIGHUP, before)
    (config,) = found
    assert ("SIGHUP" in config.signals_to_handle.split(",")) != hung_up
    assert {"SIGTERM", "SIGINT"} <= set(config.signals_to_handle.split(","))
    assert config.shutdown_timeout > 300


class Launched:
    """A run of real processes: ``flashtrain train two`` with the stand-in trainer."""

    def __init__(self, folder: Path, *words: str) -> None:
        self.folder, self.out = folder, folder / "out"
        environment = {
            k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "OMP_NUM_THREADS")
        }
        environment["PYTHONPATH"] = f"{STUB}{os.pathsep}{ROOT}"
        environment["TMPDIR"] = str(folder)
        with open(folder / "stdout", "w") as stdout, open(folder / "stderr", "w") as stderr:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "flashtrain.launch.main", "train", "two", f"--out={self.out}", *words],
                env=environment,
                cwd=folder,
                stdout=stdout,
                stderr=stderr,
            )

    def ranks(self) -> list[psutil.Process]:
        """The processes of all ranks, once they are there."""
        deadline = time.monotonic() + 60
        while not (self.out / "rank0").exists() or not (self.out / "rank1").exists():
            assert time.monotonic() < deadline, (self.folder / "stderr").read_text()
            assert self.process.poll() is None, (self.folder / "stderr").read_text()
            time.sleep(0.05)
        return [psutil.Process(int((self.out / f"rank{rank}").read_text().split()[0])) for rank in (0, 1)]

    def end(self) -> tuple[int, list[str]]:
        """Exit code and the lines of stderr without those of the log."""
        code = self.process.wait(timeout=60)
        lines = (self.folder / "stderr").read_text().splitlines()
        return code, [line for line in lines if not line.startswith("[flashtrain.")]


def gone(processes: list[psutil.Process]) -> bool:
    """Whether the processes end within seconds. One that nobody has collected yet has ended as well."""
    _, alive = psutil.wait_procs(processes, timeout=10)
    return all(process.status() == psutil.STATUS_ZOMBIE for process in alive if process.is_running())


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path
    for file in tmp_path.glob("out/rank?"):
        pid = int(file.read_text().split()[0])
        if psutil.pid_exists(pid) and "flashtrain.launch.ranks" in psutil.Process(pid).cmdline():
            psutil.Process(pid).kill()


def test_ranks_share_the_cores_and_finish(folder: Path) -> None:
    run = Launched(folder)
    assert run.end() == (0, [])
    threads = max(1, len(os.sched_getaffinity(0)) // 2)
    for rank in (0, 1):
        assert (run.out / f"rank{rank}").read_text().split()[1:] == ["2", str(threads)]
    assert f"OMP_NUM_THREADS={threads} for each" in (folder / "stderr").read_text()
    assert sorted(path.name for path in folder.iterdir()) == ["out", "stderr", "stdout"]


@pytest.mark.parametrize(
    ("words", "code", "line"),
    [
        (["--act.how=kill", "--act.rank=1"], 1, "rank 1 was killed by SIGKILL; the other ranks were stopped"),
        (["--act.how=user_error"], 2, "there is no corpus"),
    ],
)
def test_a_rank_that_fails_ends_the_run_with_one_line(
    folder: Path, words: list[str], code: int, line: str
) -> None:
    run = Launched(folder, *words)
    assert run.end() == (code, [f"flashtrain: error: {line}"])
    pids = [int(file.read_text().split()[0]) for file in run.out.glob("rank?")]
    assert len(pids) == 2
    assert not any(psutil.pid_exists(pid) for pid in pids)


@pytest.mark.parametrize(
    ("asked", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGKILL, -9)]
)
def test_ranks_end_with_their_launcher(folder: Path, asked: signal.Signals, code: int) -> None:
    run = Launched(folder, "--act.rank=9")
    processes = run.ranks()
    run.process.send_signal(asked)
    assert run.end() == (code, [])
    assert gone(processes)
