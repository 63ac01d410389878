"""A run on one GPU: nothing in a step waits for the device, and results that are read late change no bit."""

from pathlib import Path
from typing import Any

import pytest
import torch

from flashtrain.train import step as steps
from tests.train.runs import trajectory, write_text
from tests.train.test_late import _run

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_the_host_does_not_wait_inside_a_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str
) -> None:
    real = steps.TrainStep.begin

    def watched(self: steps.TrainStep, number: int, *rest: Any) -> steps.StepUnderWay:
        # Kernels are compiled and memory is taken in the first steps.
        torch.cuda.set_sync_debug_mode("error" if number > 3 else "default")
        try:
            return real(self, number, *rest)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(steps.TrainStep, "begin", watched)
    text = write_text(tmp_path / "text.txt")
    order = _run(tmp_path / "late", text, 1, monkeypatch, dtype=dtype)
    assert order.seen.index("before 4") < order.seen.index("on 3")
    _run(tmp_path / "at once", text, 0, monkeypatch, dtype=dtype)
    assert trajectory(tmp_path / "late") == trajectory(tmp_path / "at once")
    losses = [loss for _, loss, _ in trajectory(tmp_path / "late")]
    assert losses[-1] < losses[0]
