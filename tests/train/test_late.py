"""Steps whose results are read while the next one runs: the same run, to the bit, told one step later."""

import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from flashtrain import config as configs
from flashtrain import recipes
from flashtrain.checkpoint import CheckpointStore
from flashtrain.data import Corpus
from flashtrain.errors import Stopped, UserError
from flashtrain.methods.callback import Callback
from flashtrain.metrics.report import StepMetrics
from flashtrain.models.decoder import Decoder
from flashtrain.train import ranks, results, trainer
from flashtrain.train.faults import Fault
from flashtrain.train.settings import Training
from flashtrain.train.skips import SkipRule
from flashtrain.train.trainer import Trainer
from tests.distributed import run_distributed
from tests.train.runs import command, metrics, trajectory, write_text
from tests.train.test_skips import _bits, _trainer


def _config(text: Path, **changes: object) -> Trainer.Config:
    config = Trainer.Config(
        model=Decoder.Config(hidden=64, layers=1, heads=8, kv_heads=4, mlp_width=256),
        data=Corpus.Config(source=str(text)),
        train=Training(batch=4, sequence=32, evaluation_windows=8, dtype="bfloat16"),
        skip=SkipRule.Config(window=3, most=2),
        faults=(Fault(kind="inf", step=2), Fault(kind="flip", step=5)),
    )
    return replace(config, **changes)  # type: ignore[arg-type]


def _both(rank: int, world: int, config: Trainer.Config, out: Path) -> None:
    at_once, late = _trainer(config, out), _trainer(config, out)
    wanted = [at_once.step(step, 1e-3, at_once.batches.of(step)) for step in range(1, 8)]
    running = [late.step.begin(step, 1e-3, late.batches.of(step), lambda: (1.5,)) for step in range(1, 8)]
    found = [one.result() for one in running]
    assert [(r.loss, r.grad_norm, r.skipped) for r in found] == [
        (r.loss, r.grad_norm, r.skipped) for r in wanted
    ]
    assert [r.skipped is not None for r in found] == [False, True, False, False, True, False, False]
    assert all(r.notes == [[1.5]] for r in found)
    assert _bits(late) == _bits(at_once)
    assert late.skips.state_dict() == at_once.skips.state_dict()


def test_results_that_are_read_late_are_the_same(tmp_path: Path) -> None:
    run_distributed(_both, 1, _config(write_text(tmp_path / "text.txt")), tmp_path)


def _ending(rank: int, world: int, config: Trainer.Config, out: Path) -> None:
    late = _trainer(config, out)
    for step in (1, 2, 3):
        late.step.begin(step, 1e-3, late.batches.of(step))
    before = _bits(late)
    with pytest.raises(UserError, match="2 steps in a row made no update"):
        late.step.begin(4, 1e-3, late.batches.of(4))
    assert _bits(late) == before


def test_too_many_skipped_steps_end_the_run_before_the_next_update(tmp_path: Path) -> None:
    faults = (Fault(kind="inf", step=2), Fault(kind="inf", step=3))
    run_distributed(_ending, 1, _config(write_text(tmp_path / "text.txt"), faults=faults), tmp_path)


def _drawing(rank: int, world: int, config: Trainer.Config, out: Path) -> None:
    late = _trainer(config, out)
    late.model.register_forward_hook(lambda _, __, loss: loss + 0 * torch.rand(()))
    for step in (1, 2):
        rng = torch.get_rng_state()
        skipped = late.step.begin(step, 1e-3, late.batches.of(step))._result
        assert skipped is not None, "random numbers were drawn, and the result was left for later"
        assert torch.equal(torch.get_rng_state(), rng) == (skipped.skipped is not None)


def test_a_step_that_draws_random_numbers_is_waited_for(tmp_path: Path) -> None:
    run_distributed(_drawing, 1, _config(write_text(tmp_path / "text.txt")), tmp_path)


class _Order(Callback):
    """What came in which order; asks for SIGTERM before step 7 of a run that is to be stopped."""

    def __init__(self, stops: bool) -> None:
        self.seen: list[str] = []
        self.stops = stops

    def before_step(self, step: int) -> None:
        self.seen.append(f"before {step}")
        if self.stops and step == 7:
            os.kill(os.getpid(), signal.SIGTERM)

    def waits_for(self, step: int) -> bool:
        return step == 2

    def on_step(self, metrics: StepMetrics) -> None:
        self.seen.append(f"on {metrics.step}")


def _run(
    out: Path,
    text: Path,
    behind: int,
    monkeypatch: pytest.MonkeyPatch,
    stops: bool = False,
    dtype: str = "float32",
) -> _Order:
    """A run of one rank in this process, ten steps, a checkpoint after every fifth."""
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(ranks, "log_to_stderr", lambda: None)
    monkeypatch.setattr(results, "_behind", lambda device: behind)
    order, real = _Order(stops), trainer.build_callbacks
    monkeypatch.setattr(trainer, "build_callbacks", lambda *given: [*real(*given), order])
    settings = {"parallel__tensor": 1, "train__steps": 10, "checkpoint__every": 5, "train__dtype": dtype}
    words = command(out, text, **settings)[7:]
    try:
        Trainer(configs.resolve(recipes.demo(), overrides=words), out).run()
    finally:
        monkeypatch.setattr(trainer, "build_callbacks", real)
    return order


def test_a_run_that_reads_late_is_the_same_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = write_text(tmp_path / "text.txt")
    at_once = _run(tmp_path / "at once", text, 0, monkeypatch)
    late = _run(tmp_path / "late", text, 1, monkeypatch)
    assert at_once.seen == [f"{what} {step}" for step in range(1, 11) for what in ("before", "on")]
    # Two steps are under way, but where somebody waits: a callback after step 2, checkpoints after 5 and 10.
    order = "b1 b2 o1 o2 b3 b4 o3 b5 o4 o5 b6 b7 o6 b8 o7 b9 o8 b10 o9 o10"
    assert " ".join(late.seen).replace("before ", "b").replace("on ", "o") == order
    assert trajectory(tmp_path / "late") == trajectory(tmp_path / "at once")
    assert all(line["step_s"] > 0 for line in metrics(tmp_path / "late"))


def test_a_wish_to_stop_is_known_one_step_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text, out = write_text(tmp_path / "text.txt"), tmp_path / "run"
    with pytest.raises(Stopped, match="after step 8"):
        _run(out, text, 1, monkeypatch, stops=True)
    latest = CheckpointStore(out / "checkpoints").latest()
    assert latest is not None
    assert latest.name.startswith("step-00000008")
    _run(out, text, 1, monkeypatch)
    _run(tmp_path / "unbroken", text, 1, monkeypatch)
    assert trajectory(out) == trajectory(tmp_path / "unbroken")
