import builtins
import importlib.util
import json
import logging
import math
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flashtrain.errors import UserError
from flashtrain.methods.callback import Callback
from flashtrain.metrics import StepMetrics
from flashtrain.train.loss_figure import running_mean
from flashtrain.train.sinks import JsonLines, LossPlot, TensorBoard
from tests.train.records import METRICS, run_view


def play(callback: Callback, out: Path, steps: Iterable[int], loss: float = 3.25) -> None:
    """Run ``steps``, each with an evaluation, as one process would."""
    steps = list(steps)
    run = run_view(out, first_step=steps[0], steps=100)
    callback.on_start(run)
    for step in steps:
        callback.on_step(replace(METRICS, step=step, loss=loss / step))
        callback.on_evaluate(step, loss)
    callback.on_end(run)


def metrics_of(out: Path) -> list[StepMetrics]:
    return [StepMetrics.from_json(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def evaluations_of(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "evaluations.jsonl").read_text().splitlines()]


def test_one_object_a_step_in_full_precision(tmp_path: Path) -> None:
    play(JsonLines(), tmp_path / "new" / "run", range(1, 4))
    assert metrics_of(tmp_path / "new" / "run") == [
        replace(METRICS, step=step, loss=3.25 / step) for step in (1, 2, 3)
    ]
    assert evaluations_of(tmp_path / "new" / "run") == [{"step": step, "loss": 3.25} for step in (1, 2, 3)]


def test_every_line_is_on_disk_before_the_next_step(tmp_path: Path) -> None:
    sink = JsonLines()
    sink.on_start(run_view(tmp_path))
    sink.on_step(METRICS)
    sink.on_evaluate(1, math.nan)
    assert metrics_of(tmp_path) == [METRICS]
    assert evaluations_of(tmp_path) == [{"step": 1, "loss": "nan"}]
    sink.on_end(run_view(tmp_path))
    sink.on_end(run_view(tmp_path))
    with pytest.raises(RuntimeError, match="after on_end"):
        sink.on_step(METRICS)


def test_resume_drops_what_the_interrupted_run_wrote_later(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    play(JsonLines(), tmp_path, range(1, 8))
    kept = (tmp_path / "metrics.jsonl").read_bytes().splitlines()[:4]
    with caplog.at_level(logging.INFO):
        play(JsonLines(), tmp_path, range(5, 7), loss=1.0)
    assert "step 5 and later" in caplog.text
    assert (tmp_path / "metrics.jsonl").read_bytes().splitlines()[:4] == kept
    assert [(m.step, m.loss) for m in metrics_of(tmp_path)] == [
        *((step, 3.25 / step) for step in range(1, 5)),
        (5, 0.2),
        (6, 1 / 6),
    ]
    assert [(e["step"], e["loss"]) for e in evaluations_of(tmp_path)] == [
        *((step, 3.25) for step in range(1, 5)),
        (5, 1.0),
        (6, 1.0),
    ]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["evaluations.jsonl", "metrics.jsonl"]


def test_a_fresh_run_starts_anew(tmp_path: Path) -> None:
    play(JsonLines(), tmp_path, range(1, 8))
    # An evaluation before training, and damage that a resume would refuse.
    (tmp_path / "evaluations.jsonl").write_text('{"step": 0, "loss": 5.5}\n')
    (tmp_path / "metrics.jsonl").write_text("damage\ndamage\n")
    play(JsonLines(), tmp_path, range(1, 3))
    assert [m.step for m in metrics_of(tmp_path)] == [1, 2]
    assert [e["step"] for e in evaluations_of(tmp_path)] == [1, 2]


@pytest.mark.parametrize("lost", [1, 2, 40, 10_000])
def test_a_torn_last_line_is_dropped(tmp_path: Path, lost: int) -> None:
    play(JsonLines(), tmp_path, range(1, 4))
    path = tmp_path / "metrics.jsonl"
    whole = path.read_bytes()
    last = len(whole.splitlines(keepends=True)[-1])
    path.write_bytes(whole[: -min(lost, last)])
    play(JsonLines(), tmp_path, range(4, 6))
    complete = [1, 2, 3] if lost == 1 else [1, 2]  # only the line end is missing: nothing is lost
    assert [m.step for m in metrics_of(tmp_path)] == [*complete, 4, 5]


@pytest.mark.parametrize("damage", [b'{"step": 2, "lo', b"[1]", b'{"loss": 1.0}', b"\xff\xfe"])
def test_damage_before_the_last_line_is_named_and_kept(tmp_path: Path, damage: bytes) -> None:
    play(JsonLines(), tmp_path, range(1, 4))
    path = tmp_path / "metrics.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    damaged = b"".join([lines[0], damage + b"\n", lines[2]])
    path.write_bytes(damaged)
    with pytest.raises(UserError, match=r"metrics\.jsonl line 2 is not the record of a step"):
        JsonLines().on_start(run_view(tmp_path, first_step=4))
    assert path.read_bytes() == damaged


def scalars(out: Path) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(out / "tensorboard"), size_guidance={"scalars": 0, "tensors": 0})
    events.Reload()
    tags = events.Tags()
    assert "config/text_summary" in tags["tensors"]
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in tags["scalars"]}


def test_tensorboard_scalars_read_back_and_resume_purges(tmp_path: Path) -> None:
    play(TensorBoard(), tmp_path, range(1, 8))
    play(TensorBoard(), tmp_path, range(5, 7), loss=1.0)
    read = scalars(tmp_path)
    want = [*((step, 3.25 / step) for step in range(1, 5)), (5, 0.2), (6, 1 / 6)]
    assert [step for step, _ in read["loss/train"]] == [1, 2, 3, 4, 5, 6]
    np.testing.assert_allclose(
        [loss for _, loss in read["loss/train"]], [loss for _, loss in want], rtol=1e-6
    )  # fp32
    assert [loss for _, loss in read["loss/held_out"]] == [3.25] * 4 + [1.0] * 2
    assert set(read) == {*TensorBoard.TAGS.values(), "loss/held_out"} - {"speed/mfu"}


def test_tensorboard_covers_every_metric() -> None:
    assert set(TensorBoard.TAGS) | {"step"} == set(StepMetrics.__dataclass_fields__)


def pixels(path: Path) -> np.ndarray:
    from matplotlib.image import imread

    return imread(path)[..., :3]


def test_loss_plot_is_drawn_from_the_files(tmp_path: Path) -> None:
    play(JsonLines(), tmp_path, range(1, 60))
    (tmp_path / "metrics.jsonl").open("a").write('{"step": 60, "lo')
    play(LossPlot(), tmp_path, [60])
    plain = pixels(tmp_path / "loss.png")
    assert plain.shape[0] >= 600
    assert plain.shape[1] >= 1000
    assert plain.std() > 0.02  # not blank
    play(LossPlot(unigram_entropy=2.0), tmp_path, [60])
    assert not np.array_equal(plain, pixels(tmp_path / "loss.png"))
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".jsonl", ".jsonl", ".png"]


@pytest.mark.parametrize("losses", [[2.0], [2.0, math.nan, 1.0], [math.nan, math.inf]])
def test_short_and_diverged_runs_are_drawn(tmp_path: Path, losses: list[float]) -> None:
    sink = JsonLines()
    sink.on_start(run_view(tmp_path))
    for step, loss in enumerate(losses, start=1):
        sink.on_step(replace(METRICS, step=step, loss=loss))
    sink.on_evaluate(1, math.nan)
    play(LossPlot(), tmp_path, [9])
    assert pixels(tmp_path / "loss.png").std() > 0.02


def test_no_plot_without_steps(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    play(LossPlot(), tmp_path, [1])
    assert "LossPlot needs JsonLines" in caplog.text
    assert list(tmp_path.iterdir()) == []


def test_running_mean_does_not_lag() -> None:
    np.testing.assert_allclose(running_mean(np.full(500, 2.0)), 2.0)
    slope = np.arange(2000.0)
    np.testing.assert_allclose(running_mean(slope)[:-30], slope[:-30])
    step = running_mean(np.r_[np.zeros(1000), np.ones(1000)])
    assert step[969] == 0.0
    assert step[999] == pytest.approx(30 / 61)
    assert step[1030] == pytest.approx(1.0)
    with_gap = running_mean(np.array([math.nan, math.inf, 1.0, math.nan, 1.0]))
    assert math.isnan(with_gap[0])
    np.testing.assert_allclose(with_gap[1:], 1.0)


def test_missing_packages_are_named_before_the_first_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = builtins.__import__

    def without_tensorboard(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "torch.utils.tensorboard":
            raise ImportError("No module named 'tensorboard'")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_tensorboard)
    with pytest.raises(UserError, match="pip install tensorboard"):
        TensorBoard().on_start(run_view(tmp_path))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install matplotlib"):
        LossPlot().on_start(run_view(tmp_path))
