"""Algorithm 1 of EPAS (arXiv 2601.19089), and the callback that follows it."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from flashtrain.errors import UserError
from flashtrain.methods.callback import Run
from flashtrain.methods.progressive_sharing import ProgressiveSharing
from flashtrain.models.decoder import Decoder
from flashtrain.nn.shared_attention import SwitchableAttention
from flashtrain.nn.sharing import Sharing

CONFIG = Decoder.Config(hidden=32, layers=5, heads=2, kv_heads=1, mlp_width=64)
Schedule = ProgressiveSharing.Config


def algorithm_1(steps: int, interval: int, targets: list[int], growth: int) -> list[list[int]]:
    """The region of each step as the paper writes it, with its lists."""
    region: list[int] = []
    trace = []
    for step in range(1, steps + 1):
        trace.append(region)
        if step % interval == 0 and len(targets) >= growth:
            region = targets[-growth:] + region
            targets = targets[:-growth]
    return trace


@pytest.mark.parametrize(("interval", "growth"), [(1, 1), (4, 1), (3, 3), (30, 1)])
def test_the_schedule_is_algorithm_1(interval: int, growth: int) -> None:
    schedule = Schedule(interval=interval, growth=growth)
    schedule.validate(3)
    for step, region in enumerate(algorithm_1(20, interval, [2, 3, 4], growth), 1):
        assert schedule.shared_at(step, 3) == len(region), step


def test_the_first_change_acts_in_the_step_after_the_interval() -> None:
    schedule = Schedule(interval=4)
    assert [schedule.shared_at(step, 3) for step in (1, 4, 5, 8, 9, 12, 13, 100)] == [0, 0, 1, 1, 2, 2, 3, 3]
    later = replace(schedule, start_step=10)
    assert [later.shared_at(step, 3) for step in (1, 10, 14, 15)] == [0, 0, 0, 1]


@pytest.mark.parametrize(
    ("schedule", "targets", "message"),
    [
        (Schedule(growth=0), 3, "sharing.growth is 0; it must be at least 1"),
        (Schedule(interval=0), 3, "sharing.interval is 0; it must be at least 1"),
        (Schedule(start_step=-1), 3, "sharing.start_step is -1; it must be at least 0"),
        (Schedule(), 0, "sharing needs layers that may share: set model.sharing"),
        (Schedule(growth=2), 3, "3 layers may share; sharing.growth 2 must divide their number"),
    ],
)
def test_schedules_that_do_not_fit_are_named(schedule: Schedule, targets: int, message: str) -> None:
    with pytest.raises(UserError) as caught:
        schedule.validate(targets)
    assert str(caught.value) == message


def sharing_layers(model: Decoder) -> list[int]:
    found = [m for m in model.modules() if isinstance(m, SwitchableAttention)]
    return [attention.layer for attention in found if attention.source != attention.layer]


def run(first_step: int, steps: int = 20) -> Run:
    return Run(Path("unused"), first_step, steps, "", "")


def unchanged(means: Any) -> None:
    raise AssertionError(f"a switch without init mean changes weights: {means}")


def test_layers_share_from_the_step_on_wherever_the_run_begins(caplog: pytest.LogCaptureFixture) -> None:
    model = Decoder(replace(CONFIG, sharing=Sharing(targets=(2, 3, 4))))
    assert sharing_layers(model) == [2, 3, 4], "without a schedule all share"
    callback = ProgressiveSharing(Schedule(interval=4), model, unchanged)
    callback.on_start(run(1))
    assert sharing_layers(model) == []
    seen = []
    with caplog.at_level("INFO", "flashtrain"):
        for step in range(1, 15):
            callback.before_step(step)
            seen.append(sharing_layers(model))
    assert seen == algorithm_1(14, 4, [2, 3, 4], 1)
    assert [r.getMessage() for r in caplog.records] == [
        f"step {step}: {count} of 3 layers share" for step, count in ((5, 1), (9, 2), (13, 3))
    ]
    assert callback.state_dict() == {"shared": 3}

    again = ProgressiveSharing(Schedule(interval=4), model, unchanged)
    again.load_state_dict({"shared": 1})
    again.on_start(run(9))
    assert sharing_layers(model) == [4], "as in the step that was the last"
    again.before_step(9)
    assert sharing_layers(model) == [3, 4]
    again.on_start(run(21, steps=8))
    assert sharing_layers(model) == [4], "a run that has ended is evaluated as in its last step"
