"""Runs that are struck by their fault plan: they end in the bits of the run that was not."""

import json
import signal
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from flashtrain import config as configs
from flashtrain.checkpoint import CheckpointStore
from flashtrain.errors import UserError
from flashtrain.recipes import demo
from flashtrain.train import faults, snapshot
from flashtrain.train.faults import Fault
from tests.train.runs import command, environment, metrics, train, trajectory, write_text
from tests.train.test_resume import _ranks, _wait_for_step

STEPS = 16
SETTINGS: dict[str, Any] = {"train__steps": STEPS, "checkpoint__every": 4, "skip__window": 4}
# These change what is computed, so they are in the unbroken run too.
SPOILING = [Fault(kind="inf", step=6, rank=1), Fault(kind="flip", step=11, rank=0)]


def plan(path: Path, *planned: Fault) -> Path:
    """A TOML file with a fault plan."""
    tables = [f"[[faults]]\n{_lines(asdict(fault))}" for fault in planned]
    path.write_text("\n".join(tables))
    return path


def _lines(table: dict[str, Any]) -> str:
    return "".join(f"{key} = {json.dumps(value)}\n" for key, value in table.items())


def events(out: Path, kind: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (out / "events.jsonl").read_text().splitlines()]
    return [line for line in lines if line["event"] == kind]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text") / "text.txt")


@pytest.fixture(scope="module")
def unbroken(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with spoiled gradients, in which rank 1 is slow from step 3 to step 6."""
    out = tmp_path_factory.mktemp("unbroken")
    slow = [Fault(kind="delay", step=step, rank=1, seconds=0.3) for step in range(3, 7)]
    config = plan(out / "plan.toml", *SPOILING, *slow)
    done = train(out, text, **SETTINGS, config=config, stragglers__window=4)
    assert done.returncode == 0, done.stderr
    return out


def saved(out: Path) -> dict[str, Tensor]:
    """All tensors of a run's latest checkpoint."""
    store, path = CheckpointStore(out), snapshot.find(out)
    sets = {
        name: {n: torch.empty(entry.shape, dtype=getattr(torch, entry.dtype)) for n, entry in named.items()}
        for name, named in store.read_manifest(path).tensors.items()
    }
    store.load(path, sets)
    return {f"{name}/{n}": tensor for name, named in sets.items() for n, tensor in named.items()}


def assert_same_end(one: Path, other: Path) -> None:
    """Two runs have the same losses and norms at every step, and end in the same tensors, all to the bit."""
    assert trajectory(one) == trajectory(other)
    mine, theirs = saved(one), saved(other)
    assert mine.keys() == theirs.keys()
    assert [name for name, tensor in mine.items() if not torch.equal(tensor, theirs[name])] == []


def test_skipped_steps_are_counted_logged_and_told(unbroken: Path) -> None:
    skipped = events(unbroken, "skipped_step")
    assert [(event["step"], event["total"]) for event in skipped] == [(6, 1), (11, 2)]
    assert skipped[0]["reason"] == "gradient norm is inf"
    assert [m["step"] for m in metrics(unbroken)] == list(range(1, STEPS + 1))
    struck = [(event["step"], event["rank"], event["reason"]) for event in events(unbroken, "fault")]
    assert (6, 1, "fault plan: inf") in struck
    assert (11, 0, "fault plan: flip") in struck


def test_a_slow_rank_is_named_with_how_often_and_by_how_much(unbroken: Path) -> None:
    late = [event for event in events(unbroken, "straggler") if event["rank"] == 1]
    assert [event["step"] for event in late][:2] == [4, 8]
    for event in late[:2]:
        assert event["late"] >= 2
        assert event["steps"] == 4
        # Two of the four were delayed by 0.3 s; on a busy machine the other two may count as late by little.
        assert 0.1 < event["seconds"] < 3


def test_a_killed_rank_under_torchrun_goes_on_from_the_latest_checkpoint(
    unbroken: Path, text: Path, tmp_path: Path
) -> None:
    """The kill comes right after a save was begun in the background, and before a skip is done again."""
    config = plan(tmp_path / "plan.toml", *SPOILING, Fault(kind="kill", step=9, rank=1))
    words = command(tmp_path, text, **SETTINGS, config=config, checkpoint__background=True)[1:]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    done = subprocess.run(
        [*torchrun, "--nproc-per-node", "2", "--max-restarts", "1", *words],
        env=environment(), capture_output=True, text=True, timeout=180,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "resuming after step" in done.stderr
    assert [event["step"] for event in events(tmp_path, "fault") if "kill" in event["reason"]] == [9]
    assert_same_end(tmp_path, unbroken)
    assert [event["step"] for event in events(tmp_path, "checkpoint")][-1] == STEPS


def test_sigterm_saves_and_ends_and_the_run_goes_on(unbroken: Path, text: Path, tmp_path: Path) -> None:
    """The signal reaches one rank alone, as when one host is taken away; and later the launcher."""
    words = command(tmp_path, text, **SETTINGS, config=plan(tmp_path / "plan.toml", *SPOILING))
    for enough, victim in ((2, "rank"), (7, "launcher")):
        with subprocess.Popen(
            words, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        ) as run:
            _wait_for_step(tmp_path, enough)
            if victim == "rank":
                ranks = _ranks(run.pid)
                next(p for p in ranks if p.environ()["RANK"] == "1").send_signal(signal.SIGTERM)
            else:
                run.send_signal(signal.SIGTERM)
            _, errors = run.communicate(timeout=60)
        assert run.returncode == 143, errors
        assert "the same command goes on from there" in errors
        assert "error" not in errors
        stopped = events(tmp_path, "preempted")[-1]
        assert stopped["step"] == len(metrics(tmp_path)) < STEPS
        latest = CheckpointStore(tmp_path / "checkpoints").latest()
        assert latest is not None
        assert latest.name.startswith(f"step-{stopped['step']:08d}")
    again = train(tmp_path, text, **SETTINGS, config=tmp_path / "plan.toml")
    assert again.returncode == 0, again.stderr
    assert_same_end(tmp_path, unbroken)


@pytest.mark.parametrize("background", [False, True])
def test_a_full_disk_is_one_line_and_the_last_checkpoint_stays(
    text: Path, tmp_path: Path, background: bool
) -> None:
    planned = [Fault(kind="full", step=6)]
    if background:  # a pause lets the save of step 3 come to its end
        planned.append(Fault(kind="delay", step=5, seconds=2))
    config = plan(tmp_path / "plan.toml", *planned)
    settings = SETTINGS | {"train__steps": 8, "checkpoint__every": 3, "checkpoint__background": background}
    settings["parallel__tensor"] = 1
    struck = train(tmp_path, text, **settings, config=config)
    assert struck.returncode == 2, struck.stderr
    (line,) = [line for line in struck.stderr.splitlines() if line.startswith("flashtrain: error:")]
    for part in ("cannot save step 6", "earlier checkpoints are unchanged", "No space left", "free space"):
        assert part in line
    store = CheckpointStore(tmp_path / "checkpoints")
    latest = store.latest()
    assert latest is not None
    assert latest.name == "step-00000003"
    snapshot.load_model(latest)
    if background:
        return
    again = train(tmp_path, text, **settings, config=config)
    assert again.returncode == 0, again.stderr
    assert [m["step"] for m in metrics(tmp_path)] == list(range(1, 9))


def test_a_plan_is_settings_and_survives_the_way_to_a_file(tmp_path: Path) -> None:
    config = configs.resolve(demo(), plan(tmp_path / "plan.toml", *SPOILING))
    assert config.faults == tuple(SPOILING)
    configs.save(config, tmp_path / "run.toml")
    assert configs.resolve(demo(), tmp_path / "run.toml") == config


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (Fault(kind="kill", step=0), "faults: step 0 of kill; steps are counted from 1"),
        (Fault(kind="inf", step=1, rank=2), "faults: inf on rank 2 at step 1; the run has ranks 0 to 1"),
        (Fault(kind="delay", step=1, seconds=0), "faults: delay on rank 0 at step 1 has seconds 0"),
    ],
)
def test_a_fault_that_cannot_strike_is_refused(fault: Fault, message: str) -> None:
    with pytest.raises(UserError, match=f"^{message}"):
        faults.validate([fault], world=2)
