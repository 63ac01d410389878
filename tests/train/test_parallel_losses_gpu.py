"""100 steps on real text: every mesh of GPUs follows one GPU within bf16 noise, twice to the bit.

Whole runs of the trainer over nvlink, overlapped, with the ways of products as they come and as measured.
test_parallel_losses.py does the same on CPU ranks.
"""

import pytest
import torch

from tests.train.curves import Curve, Runs, assert_alike

GPUS = torch.cuda.device_count()
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(GPUS < 1, reason="needs a GPU")]

STEPS, TIMEOUT = 100, 240  # seconds: the first run compiles kernels, or measures products
SETTINGS = {
    "model.hidden": 512,
    "model.layers": 8,
    "model.heads": 8,
    "model.kv_heads": 4,
    "model.mlp_width": 1536,
    "train.steps": STEPS,
    "train.batch": 16,
    "train.sequence": 512,
    "train.dtype": "bfloat16",
    "train.evaluate_every": 0,
    "train.evaluation_windows": 16,
    "optimizer.learning_rate": 3e-4,
    "optimizer.warmup": 20,
    "checkpoint.every": 0,
    "comm.timeout": 120,
}
# The most noise beside which a comparison means something, in nats.
MOST_NOISE = 0.02


def _on(tensor: int, data: int, tune: bool) -> object:
    world = tensor * data
    mark = pytest.mark.skipif(world > GPUS, reason=f"needs {world} GPUs that reach each other's memory")
    return pytest.param(tensor, data, tune, marks=mark, id=f"{tensor}x{data}{'-tuned' * tune}")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory.mktemp("runs"), SETTINGS, TIMEOUT)


@pytest.fixture(scope="module")
def alone(runs: Runs) -> Curve:
    return runs.of()


@pytest.fixture(scope="module")
def noise(runs: Runs, alone: Curve) -> float:
    """How far runs of one GPU come apart that add up the same gradients in other orders."""
    return max(alone.distance(runs.of(train__accumulate=parts)) for parts in (2, 4))


def test_one_gpu_learns(alone: Curve) -> None:
    losses = [loss for _, loss, _ in alone.steps]
    assert len(losses) == STEPS
    print(f"one GPU: {losses[0]:.4f} nats in the first step, {alone.means()[-1]:.4f} in the last ten")
    assert alone.means()[-1] < losses[0] - 2


def test_the_noise_of_one_gpu_is_small(noise: float) -> None:
    print(f"noise {noise:.5f} nats")
    assert 0 < noise < MOST_NOISE


@pytest.mark.parametrize(
    ("tensor", "data", "tune"),
    [
        _on(2, 1, False),
        _on(2, 1, True),
        _on(1, 2, False),
        _on(4, 1, False),
        _on(4, 1, True),
        _on(1, 4, False),
        _on(2, 2, False),
        _on(2, 2, True),
    ],
)
def test_losses_stay_within_the_noise_of_one_gpu(
    runs: Runs, alone: Curve, noise: float, tensor: int, data: int, tune: bool
) -> None:
    found = runs.of(tensor, data, comm__tune=tune)
    print(f"{tensor} x {data}: {found.distance(alone):.5f} nats from one GPU, whose noise is {noise:.5f}")
    assert {name for _, name in found.transports()} == {"nvlink"}, found.log
    if torch.cuda.get_device_capability()[0] == 9:  # else there is one way for each product
        assert "not fused" not in found.log
        assert ("tuned all_gather" in found.log) == tune
    assert_alike(found, alone, noise)


@pytest.mark.skipif(GPUS < 2, reason="needs two GPUs that reach each other's memory")
@pytest.mark.parametrize("tensor", [1, 2])
def test_segments_stay_within_the_noise_of_one_gpu_and_repeat(
    runs: Runs, alone: Curve, noise: float, tensor: int
) -> None:
    if 2 * tensor > GPUS:
        pytest.skip(f"needs {2 * tensor} GPUs")
    found, again = (runs.of(tensor, parallel__context=2, again=number) for number in (0, 1))
    print(f"context 2 x {tensor}: {found.distance(alone):.5f} nats from one GPU, whose noise is {noise:.5f}")
    assert_alike(found, alone, noise)
    assert again.steps == found.steps


@pytest.mark.parametrize(
    ("tensor", "data", "tune"),
    [_on(2, 1, False), _on(4, 1, False), _on(4, 1, True), _on(1, 4, False), _on(2, 2, True)],
)
def test_two_runs_are_equal_to_the_bit(runs: Runs, tensor: int, data: int, tune: bool) -> None:
    first, second = (runs.of(tensor, data, comm__tune=tune, again=number) for number in (0, 1))
    assert len(first.steps) == STEPS
    assert second.steps == first.steps
    assert "tuned " not in second.log
