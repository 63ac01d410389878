"""Steps without an update: which they are, that they change nothing, and that all ranks agree."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.distributed.tensor import DTensor

from flashtrain.comm import transport
from flashtrain.data import Corpus
from flashtrain.errors import UserError
from flashtrain.models.decoder import Decoder
from flashtrain.parallel.mesh import Degrees
from flashtrain.train.faults import Fault
from flashtrain.train.settings import Training
from flashtrain.train.skips import SkipRule
from flashtrain.train.trainer import Trainer
from tests.distributed import run_distributed
from tests.train.runs import write_text


def test_norms_that_are_not_finite_or_far_above_their_history_are_refused() -> None:
    rule = SkipRule(SkipRule.Config(above=10, window=4))
    early = [rule.accepts(norm) for norm in (1.0, 100.0, 1.0, math.nan, 1.0)]
    assert early == [True, True, True, False, True], "no history yet: only what is not finite is refused"
    assert [rule.accepts(norm) for norm in (1.0, 1.0, 10.0)] == [True] * 3
    assert rule.reason is None
    assert not rule.accepts(11.0)
    assert rule.reason == "gradient norm 11 is 11 times its usual 1"
    assert not rule.accepts(math.inf)
    assert rule.reason == "gradient norm is inf"
    assert rule.count == 3
    # Half of the window is high by now: what is usual has changed, and the run goes on.
    assert [rule.accepts(12.0) for _ in range(3)] == [True] * 3


def test_no_limit_where_it_is_switched_off() -> None:
    rule = SkipRule(SkipRule.Config(above=0, window=1))
    assert all(rule.accepts(norm) for norm in (1.0, 1e30))
    assert not rule.accepts(math.inf)


def test_too_many_in_a_row_end_the_run() -> None:
    rule = SkipRule(SkipRule.Config(most=3))
    assert [rule.accepts(norm) for norm in (math.inf, math.inf, 1.0, math.inf, math.inf)].count(True) == 1
    with pytest.raises(UserError, match=r"3 steps in a row made no update, .*norm is nan: lower optimizer"):
        rule.accepts(math.nan)


def test_the_state_goes_on_to_the_bit() -> None:
    rule, again = SkipRule(SkipRule.Config(window=4)), SkipRule(SkipRule.Config(window=4))
    for norm in (0.1, 0.2, math.inf, 0.30000000000000004, 0.7):
        rule.accepts(norm)
    again.load_state_dict(rule.state_dict())
    assert again.state_dict() == rule.state_dict()
    for norm in (2.49, 2.51, 0.5, math.nan, 9.0):
        assert (rule.accepts(norm), rule.reason) == (again.accepts(norm), again.reason)


@pytest.mark.parametrize("setting", [{"above": 0.5}, {"above": -1.0}, {"window": 0}, {"most": 0}])
def test_settings_out_of_range(setting: dict[str, float]) -> None:
    name = next(iter(setting))
    with pytest.raises(UserError, match=rf"^skip\.{name} is "):
        SkipRule.Config(**setting).validate()  # type: ignore[arg-type]


def _bits(trainer: Trainer) -> dict[str, bytes]:
    tensors = dict(trainer.model.named_parameters()) | trainer.optimizer.state()
    local = {name: t.to_local() if isinstance(t, DTensor) else t for name, t in tensors.items()}
    return {
        name: t.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        for name, t in local.items()
    }


def _trainer(config: Trainer.Config, out: Path) -> Trainer:
    transport.configure(config.comm)
    trainer = Trainer(config, out)
    trainer._build(torch.device("cpu"))
    return trainer


def _struck(rank: int, world: int, config: Trainer.Config, out: Path) -> list[str | None]:
    """Steps 1 to 6 with faults at 2 and 5 and a high norm at 6; then the same without what was skipped."""
    trainer = _trainer(config, out)
    trainer.model.register_forward_hook(lambda _, __, loss: loss * (1000.0 if step == 6 else 1.0))
    reasons = []
    for step in range(1, 7):
        before = _bits(trainer)
        result = trainer.step(step, 1e-3, trainer.batches.of(step))
        assert (before == _bits(trainer)) == (result.skipped is not None)
        assert all(parameter.grad is None for parameter in trainer.model.parameters())
        reasons.append(result.skipped)
    assert trainer.skips.count == 3

    other = _trainer(replace(config, faults=()), out)
    for step, samples in ((1, 1), (2, 3), (3, 4)):
        other.step(step, 1e-3, other.batches.of(samples))
    assert _bits(other) == _bits(trainer), "a skipped step counts in the bias correction, or left a trace"
    return reasons


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_skipped_step_changes_nothing_on_any_rank(tmp_path: Path, dtype: str) -> None:
    faults = (Fault(kind="inf", step=2, rank=3), Fault(kind="flip", step=5, rank=1))
    config = Trainer.Config(
        model=Decoder.Config(hidden=64, layers=2, heads=8, kv_heads=4, mlp_width=256),
        data=Corpus.Config(source=str(write_text(tmp_path / "text.txt"))),
        train=Training(steps=20, batch=4, sequence=32, dtype=dtype, evaluation_windows=8),  # type: ignore[arg-type]
        parallel=Degrees(tensor=2, data=2),
        comm=transport.Settings(timeout=60),
        skip=SkipRule.Config(window=3),
        faults=faults,
    )
    ranks = run_distributed(_struck, 4, config, tmp_path)
    assert all(reasons == ranks[0] for reasons in ranks)
    assert [reason is not None for reason in ranks[0]] == [False, True, False, False, True, True]
    assert ranks[0][1] == "gradient norm is inf"
    assert "times its usual" in str(ranks[0][5])


def _dropping_out(rank: int, world: int, config: Trainer.Config, out: Path) -> None:
    trainer = _trainer(config, out)
    trainer.model.register_forward_hook(lambda _, __, loss: loss + 0 * torch.rand(()))
    for step in (1, 2):
        rng = torch.get_rng_state()
        result = trainer.step(step, 1e-3, trainer.batches.of(step))
        assert torch.equal(torch.get_rng_state(), rng) == (result.skipped is not None)


def test_a_skipped_step_leaves_the_random_numbers_to_the_next(tmp_path: Path) -> None:
    config = Trainer.Config(
        model=Decoder.Config(hidden=64, layers=1, heads=8, kv_heads=4, mlp_width=256),
        data=Corpus.Config(source=str(write_text(tmp_path / "text.txt"))),
        train=Training(batch=4, sequence=32, evaluation_windows=8),
        faults=(Fault(kind="inf", step=2),),
    )
    run_distributed(_dropping_out, 1, config, tmp_path)
