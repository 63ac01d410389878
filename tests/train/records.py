"""A step's metrics and a run's view, for the tests of callbacks."""

from pathlib import Path

from flashtrain.methods.callback import Run
from flashtrain.metrics import StepMetrics

METRICS = StepMetrics(
    step=1,
    loss=3.25,
    grad_norm=0.5,
    learning_rate=3e-4,
    tokens=4096,
    tokens_per_s=12_345.0,
    tflops_per_s=0.25,
    mfu=None,
    overlap=0.875,
    exposed_s=0.001,
    overhead=0.125,
    memory_bytes=3 << 30,
    step_s=0.5,
)


def run_view(out: Path, first_step: int = 1, steps: int = 10) -> Run:
    return Run(
        out=out,
        first_step=first_step,
        steps=steps,
        config_text="[data]\nsource = 'stdlib'",
        description="a small run",
    )
