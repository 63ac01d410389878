"""The nvlink transport on real GPUs; what can be seen without one is in the files on threads."""

from pathlib import Path

import pytest
import torch

from tests.comm.transport import gpu_ranks
from tests.distributed import run_distributed

GPUS = torch.cuda.device_count()
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(GPUS < 2, reason="needs two GPUs that reach each other's memory"),
]
WORLDS = [pytest.param(w, marks=pytest.mark.skipif(w > GPUS, reason=f"needs {w} GPUs")) for w in (2, 4)]


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize(("kind", "subchunks"), [("direct", 1), ("direct", 3), ("ring", 1), ("ring", 2)])
def test_bits_equal_those_over_nccl_and_of_the_replayed_schedule(
    world: int, kind: str, subchunks: int
) -> None:
    assert min(run_distributed(gpu_ranks.bits, world, kind, subchunks, timeout=150)) > 100


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("subchunks", [1, 3])
def test_bits_of_fused_products_are_those_of_their_kernel_on_whole_operands(
    world: int, subchunks: int
) -> None:
    assert min(run_distributed(gpu_ranks.fused_bits, world, subchunks, timeout=150)) > 60


@pytest.mark.parametrize("world", WORLDS)
def test_the_tuner_measures_once_and_every_rank_takes_the_same_way(world: int, tmp_path: Path) -> None:
    answers = run_distributed(gpu_ranks.tuned, world, str(tmp_path), timeout=300)
    (once, twice) = answers[0][1]
    assert once == twice
    assert once.count("all_gather") >= 2
    assert once.count("reduce_scatter") >= 2
    assert max(error for error, _ in answers) < 4e-3


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize(("operations", "connections"), [(2000, "8"), (300, "1"), (300, "32")])
def test_operations_back_to_back_with_random_delays(world: int, operations: int, connections: str) -> None:
    for result in run_distributed(gpu_ranks.stress, world, operations, connections, timeout=150):
        assert result["wrong"] == 0
        assert result["grown"] <= 64 << 20


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize(("behind", "connections"), [(0, "8"), (0, "1"), (3000, "8")])
def test_a_peer_that_stops_is_named_and_the_context_survives(
    world: int, behind: int, connections: str
) -> None:
    for rank, result in enumerate(run_distributed(gpu_ranks.stopped, world, behind, connections, timeout=60)):
        message = result["message"]
        assert message.startswith(f"rank {rank}: layers.3.mlp.down: reduce_scatter")
        assert result["error"] < 0.01
        if rank != world - 1:
            assert f"peer rank {world - 1}" in message or f"of rank {world - 1} never arrived" in message
            assert result["took"] < 3.5


@pytest.mark.skipif(GPUS < 4, reason="needs 4 GPUs")
def test_products_and_collectives_of_nccl_beside_them_end() -> None:
    assert run_distributed(gpu_ranks.beside_nccl, 4, 300, timeout=100) == [0] * 4
