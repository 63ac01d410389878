import os
from collections.abc import Iterator

import pytest
import torch

import tests.offline  # noqa: F401 - keeps tests away from the network
from flashtrain.nn import attend

# Two ranks share two cores in CI: one thread each keeps timings steady and products reproducible.
os.environ.setdefault("OMP_NUM_THREADS", "1")
torch.set_num_threads(1)
# Tests use no network; transformers would ask the hub about folders that lie here.
os.environ.setdefault("HF_HUB_OFFLINE", "1")


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """Fill fresh tensors with NaN, so that an output that is read before it is written fails."""
    before = torch.utils.deterministic.fill_uninitialized_memory
    # Warnings alone: references that run beside have no deterministic version on a GPU.
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = before


@pytest.fixture(autouse=True)
def _attention_as_it_was() -> Iterator[None]:
    """A run that a test trains in this process sets attention's backend for the whole process."""
    before = attend.settings()
    yield
    attend.configure(before)
