"""One real run of two ranks with everything that watches, then its resume, then the page about both."""

import gzip
import json
import re
import socket
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from flashtrain.errors import TransportError, UserError
from flashtrain.metrics import history
from flashtrain.metrics.events import Event
from flashtrain.train.trainer import Trainer
from flashtrain.train.watch import Watching, build_callbacks
from tests.train.runs import TINY, command, environment, metrics, train, write_text
from tests.train.test_dashboards import scrape

STEPS = 40


@dataclass
class Watched:
    """A finished run, what it printed, and what Prometheus read while it ran."""

    out: Path
    stdout: str
    stderr: str
    scraped: list[dict[str, float]]


def watch(out: Path, text: Path, **settings: object) -> Watched:
    """Run to the end, scraping the endpoint all the while."""
    words = command(out, text, watch__prometheus_port=0, **settings)
    scraped: list[dict[str, float]] = []
    log = out.with_suffix(".log")
    with log.open("w") as stderr:
        process = subprocess.Popen(
            words,
            env=environment() | {"WANDB_MODE": "offline"},
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
        )
        deadline = time.monotonic() + 120
        while process.poll() is None:
            assert time.monotonic() < deadline
            if (port := re.search(r"http://127\.0\.0\.1:(\d+)/metrics", log.read_text())) is not None:
                try:
                    scraped.append(scrape(int(port[1])))
                except OSError:  # the run closed it between the two looks
                    break
            time.sleep(0.02)
    stdout, _ = process.communicate(timeout=120)
    assert process.returncode == 0, log.read_text()
    return Watched(out, stdout, log.read_text(), scraped)


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Watched:
    folder = tmp_path_factory.mktemp("watched")
    text = write_text(folder / "text.txt")
    return watch(
        folder / "run",
        text,
        train__steps=STEPS,
        train__evaluate_every=20,
        checkpoint__every=20,
        watch__wandb="a-project",
        watch__telemetry_every=1,
        watch__profile_steps="3,4,9",
        watch__memory_steps="2",
    )


@pytest.fixture(scope="module")
def second(first: Watched) -> Watched:
    """The same folder, for some steps more."""
    text = first.out.parent / "text.txt"
    return watch(first.out, text, train__steps=STEPS + 10, watch__wandb="a-project")


def test_prometheus_reads_the_run_while_it_goes_on(first: Watched) -> None:
    losses = {record["step"]: record["loss"] for record in metrics(first.out)}
    seen = {one["flashtrain_step"]: one for one in first.scraped if one["flashtrain_step"] > 0}
    assert len(seen) > 1
    for step, one in seen.items():
        # A scrape between two gauges mixes two steps.
        assert one["flashtrain_loss"] in (losses[int(step)], losses.get(int(step) - 1))
        assert one["flashtrain_steps"] == STEPS
        assert one['flashtrain_events_total{kind="start"}'] == 1


def test_every_rank_traces_the_chosen_steps(first: Watched) -> None:
    names = [f"{steps}.rank{rank}.json.gz" for steps in ("step-9", "steps-3-4") for rank in (0, 1)]
    assert sorted(path.name for path in (first.out / "profile").iterdir()) == names
    for name in names:
        events = json.loads(gzip.decompress((first.out / "profile" / name).read_bytes()))["traceEvents"]
        steps = 2 if "9" not in name else 1
        # Two row-parallel layers in each of two blocks; two column-parallel ones in each, and the head.
        for op, layers in (("matmul_reduce_scatter", 4), ("column_gradients", 5)):
            assert sum(event.get("name") == f"flashtrain::{op}" for event in events) == steps * layers, name


def test_what_needs_a_gpu_says_once_that_there_is_none(first: Watched) -> None:
    for line in ("no GPU telemetry: this run is on the CPU", "no memory snapshots: this run is on the CPU"):
        assert first.stderr.count(line) == 1
    assert not list(first.out.glob("telemetry*"))
    assert not (first.out / "memory").exists()


def test_the_sites_are_shown_at_the_start_and_kept(first: Watched) -> None:
    sites = json.loads((first.out / "sites.json").read_text())
    overlapped = sum(site["overlapped"] for site in sites)
    assert overlapped == 4 * TINY["model.layers"] + 1  # type: ignore[operator]
    assert f"{overlapped} of {len(sites)} sites are overlapped" in first.stdout
    assert first.stdout.index("sites are overlapped") < first.stdout.index("step 10/40")
    assert "layers.0-1.mlp.down" in first.stdout


def test_events_tell_the_story_of_all_attempts(first: Watched, second: Watched) -> None:
    run = history.read(first.out)
    assert [(event.kind, event.step) for event in run.events] == [
        ("start", 1),
        ("checkpoint", 20),
        ("checkpoint", STEPS),
        ("end", STEPS),
        ("resume", STEPS + 1),
        ("checkpoint", STEPS + 10),
        ("end", STEPS + 10),
    ]
    assert run.machine["torch"] == torch.__version__
    assert run.events[0].detail["ranks"] == 2
    assert [event.time for event in run.events] == sorted(event.time for event in run.events)
    assert f"step {STEPS + 1}: resume" in second.stdout
    assert run.damaged == {}


def test_a_resume_goes_on_in_the_same_record_of_weights_and_biases(first: Watched, second: Watched) -> None:
    runs = [path.name.rpartition("-")[2] for path in (first.out / "wandb").glob("offline-run-*")]
    assert len(runs) == 2
    assert len(set(runs)) == 1
    assert f"run {runs[0]}, offline" in second.stderr


def test_watching_changes_no_bit(first: Watched, second: Watched, tmp_path: Path) -> None:
    text = first.out.parent / "text.txt"
    plain = train(tmp_path / "plain", text, train__steps=STEPS, watch__tensorboard=False)
    assert plain.returncode == 0, plain.stderr
    assert not (tmp_path / "plain" / "tensorboard").exists()
    watched = {record["step"]: record for record in metrics(first.out)}
    for record in metrics(tmp_path / "plain"):
        assert record["loss"] == watched[record["step"]]["loss"]
        assert record["grad_norm"] == watched[record["step"]]["grad_norm"]


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"wandb": " "}, "watch.wandb is empty"),
        ({"prometheus_port": 70000}, "watch.prometheus_port is 70000; it must be 0 to 65535"),
        ({"telemetry_every": -1}, "watch.telemetry_every is -1"),
        ({"profile_steps": (3, 11)}, "watch.profile_steps names step 11; the run has steps 1 to 10"),
        ({"memory_steps": (0,)}, "watch.memory_steps names step 0"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any], line: str) -> None:
    Watching().validate(10)
    with pytest.raises(UserError, match=re.escape(line)):
        Watching(**settings).validate(10)


def test_other_ranks_have_only_what_is_for_every_rank() -> None:
    everything = Watching(
        wandb="p", prometheus_port=0, telemetry_every=1, profile_steps=(1,), memory_steps=(1,)
    )
    names = [
        [
            type(callback).__name__
            for callback in build_callbacks(settings, rank, torch.device("cpu"), [], 3.0)
        ]
        for settings in (everything, Watching())
        for rank in (0, 1)
    ]
    own = ["Profiler", "MemorySnapshot", "GpuTelemetry"]
    always = ["SiteTable", "ProgressBar", "JsonLines", "LossPlot", "TensorBoard"]
    assert names == [["Prometheus", "WeightsAndBiases", *own, *always], own, always, []]


def failing(folder: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException) -> list[Event]:
    """The events of a run of one rank, in this process, whose fourth step raises ``error``."""
    from flashtrain import config, recipes
    from flashtrain.train import ranks, step

    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(ranks, "log_to_stderr", lambda: None)
    real = step.TrainStep.begin

    def strike(self: step.TrainStep, number: int, *rest: Any) -> step.StepUnderWay:
        if number == 4:
            raise error
        return real(self, number, *rest)

    monkeypatch.setattr(step.TrainStep, "begin", strike)
    words = command(folder / "run", write_text(folder / "text.txt"), parallel__tensor=1)[7:]
    with pytest.raises(type(error)):
        Trainer(config.resolve(recipes.demo(), overrides=words), folder / "run").run()
    return history.read(folder / "run").events


def test_a_port_in_use_ends_the_command_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from flashtrain.launch.main import main
    from flashtrain.train import ranks

    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(ranks, "log_to_stderr", lambda: None)
    text = write_text(tmp_path / "text.txt")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text("kept\n")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        words = command(tmp_path / "run", text, parallel__tensor=1, watch__prometheus_port=port)
        assert main(words[3:]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert f"port {port}: Address already in use; choose another watch.prometheus_port" in error
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == "kept\n"


@pytest.mark.parametrize("error", [TransportError("lost\nrank 1"), KeyboardInterrupt()])
def test_what_ended_a_run_is_its_last_event(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    start, failure = failing(tmp_path, monkeypatch, error)
    assert (start.kind, start.step) == ("start", 1)
    assert (failure.kind, failure.step) == ("failure", 4)
    reason = failure.detail["reason"]
    assert reason.startswith(type(error).__name__)
    assert "\n" not in reason
    assert str(error).partition("\n")[0] in reason
