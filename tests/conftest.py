import os
from collections.abc import Iterator

import pytest
import torch

import tests.offline  # noqa: F401 - keeps tests away from the network

# Two ranks share two cores in CI: one thread each keeps timings steady and products reproducible.
os.environ.setdefault("OMP_NUM_THREADS", "1")
torch.set_num_threads(1)


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """Fill fresh tensors with NaN, so that an output that is read before it is written fails."""
    before = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = before
