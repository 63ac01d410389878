"""Products on nvlink in CUDA graphs, on real GPUs; test_captured_on_threads.py tells what needs none."""

import pytest
import torch

from tests.comm.transport import gpu_graph_ranks
from tests.distributed import run_distributed

GPUS = torch.cuda.device_count()
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(GPUS < 2, reason="needs two GPUs that reach each other's memory"),
]
WORLDS = [pytest.param(w, marks=pytest.mark.skipif(w > GPUS, reason=f"needs {w} GPUs")) for w in (2, 4)]


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("connections", ["8", "1", "32"])
def test_replays_with_changing_inputs_have_the_bits_of_calls(world: int, connections: str) -> None:
    for compared, wrong in run_distributed(gpu_graph_ranks.replayed, world, connections, 200, timeout=100):
        assert compared > 1000
        assert wrong == 0


@pytest.mark.parametrize("world", WORLDS)
def test_a_block_trains_through_make_graphed_callables(world: int) -> None:
    assert run_distributed(gpu_graph_ranks.graphed, world, timeout=60) == [0] * world


@pytest.mark.parametrize("world", WORLDS)
def test_captures_that_were_not_prepared_are_refused(world: int) -> None:
    for messages in run_distributed(gpu_graph_ranks.refused, world, timeout=60):
        why = ["comm.graphs is off"] * 2 + ["it has not run with these shapes"] * 2
        for message, reason in zip(messages, why, strict=True):
            assert message.startswith(f"down cannot be captured in a CUDA graph: {reason}")


@pytest.mark.parametrize("world", WORLDS)
def test_a_peer_that_stops_replaying_is_named_and_the_context_survives(world: int) -> None:
    for rank, (message, took) in enumerate(run_distributed(gpu_graph_ranks.stopped, world, timeout=60)):
        assert message.startswith(f"rank {rank}: layers.3.mlp.down: ")
        if rank != world - 1:
            assert "start of a replay of a CUDA graph" in message
            assert f"peer rank {world - 1}" in message or f"of rank {world - 1} never arrived" in message
            assert took < 10
