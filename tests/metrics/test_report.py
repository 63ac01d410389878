import json
import math
from dataclasses import replace

import pytest

from flashtrain.metrics import StepMetrics

METRICS = StepMetrics(
    step=7,
    loss=0.1 + 0.2,
    grad_norm=1 / 3,
    learning_rate=3e-4,
    tokens=2**40,
    tokens_per_s=1234.5,
    tflops_per_s=0.25,
    mfu=None,
    overlap=0.875,
    exposed_s=0.001,
    overhead=0.125,
    memory_bytes=3 << 30,
    step_s=0.5,
)


def test_json_keeps_every_bit() -> None:
    line = METRICS.as_json()
    assert "\n" not in line
    assert json.loads(line)["loss"] == 0.30000000000000004
    assert json.loads(line)["mfu"] is None
    assert StepMetrics.from_json(line) == METRICS


def test_a_diverged_step_is_still_valid_json() -> None:
    def refuse(constant: str) -> float:
        raise AssertionError(f"{constant} is no JSON")

    line = replace(METRICS, loss=math.nan, grad_norm=math.inf, learning_rate=-math.inf).as_json()
    json.loads(line, parse_constant=refuse)
    back = StepMetrics.from_json(line)
    assert math.isnan(back.loss)
    assert (back.grad_norm, back.learning_rate) == (math.inf, -math.inf)


@pytest.mark.parametrize("line", ["", "[]", '{"step": 1}', METRICS.as_json()[:-5]])
def test_other_lines_are_refused(line: str) -> None:
    with pytest.raises(ValueError, match=r"not the metrics|Expecting|Unterminated|delimiter"):
        StepMetrics.from_json(line)
