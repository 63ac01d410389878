"""Whole runs on meshes of CPU ranks, real text, bfloat16: what test_parallel_losses_gpu.py does on GPUs."""

import math
from pathlib import Path

import pytest

from tests.train.curves import AVERAGED, FLOOR, MULTIPLE, Curve, Runs, assert_alike

TINY = {
    "model.hidden": 64,
    "model.layers": 2,
    "model.heads": 8,
    "model.kv_heads": 4,
    "model.mlp_width": 256,
    "train.steps": 6,
    "train.batch": 4,
    "train.sequence": 32,
    "train.dtype": "bfloat16",
    "train.evaluate_every": 0,
    "train.evaluation_windows": 4,
    "optimizer.warmup": 3,
    "checkpoint.every": 0,
    "comm.timeout": 60,
}


def test_runs_on_meshes_of_cpu_ranks_train_alike_and_repeat_to_the_bit(tmp_path: Path) -> None:
    runs = Runs(tmp_path, TINY, timeout=60)
    alone = runs.of()
    noise = alone.distance(runs.of(train__accumulate=2))
    assert 0 < noise < FLOOR
    for tensor, data in ((2, 1), (2, 2)):
        found = runs.of(tensor, data)
        assert found.transports() >= {(ranks, "host") for ranks in (tensor, data) if ranks > 1}
        assert found.distance(alone) > 0
        assert_alike(found, alone, noise)
    assert runs.of(2, 1, again=1).steps == runs.of(2, 1).steps


def _curve(steps: int, loss: float = 0.0, norm: float = 0.0, since: int = 1) -> Curve:
    """A falling loss; from step ``since`` on ``loss`` nats higher, and the norm by its share ``norm``."""
    return Curve(
        [
            (n, 2 + 3 * math.exp(-n / 20) + loss * (n >= since), 1 + norm * (n >= since))
            for n in range(1, steps + 1)
        ],
        "",
    )


def test_curves_that_are_apart_are_told() -> None:
    alone = _curve(100)
    for fine in (_curve(100), _curve(100, loss=2e-3), _curve(100, loss=0.9 * FLOOR, norm=0.1, since=6)):
        assert_alike(fine, alone, 0.0)
    assert_alike(_curve(100, loss=2 * FLOOR, since=6), alone, FLOOR)
    # A single step may stand out, as batches do.
    assert_alike(_curve(100, loss=FLOOR * AVERAGED * 0.9, since=100), alone, 0.0)
    for apart, noise in (
        (_curve(100, loss=0.01, since=5), 1.0),
        (_curve(100, norm=0.02, since=5), 1.0),
        (_curve(100, loss=1.1 * FLOOR, since=80), 0.0),
        (_curve(100, loss=-1.1 * FLOOR, since=6), 0.0),
        (_curve(100, loss=1.1 * MULTIPLE * FLOOR, since=6), FLOOR),
        (_curve(99), 1.0),
        (_curve(100, loss=math.nan, since=90), 1.0),
    ):
        with pytest.raises(AssertionError):
            assert_alike(apart, alone, noise)
