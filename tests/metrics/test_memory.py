import sys
from pathlib import Path

import pytest
import torch

from flashtrain.metrics import current_memory, memory, peak_memory, reset_peak_memory

CPU = torch.device("cpu")


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_process_grows_by_what_it_touches() -> None:
    before = current_memory(CPU)
    block = torch.ones(64 << 20, dtype=torch.uint8)
    after, peak = current_memory(CPU), peak_memory(CPU)
    assert before is not None
    assert after is not None
    assert peak is not None
    assert after - before > 0.8 * block.nbytes
    assert peak >= after - (1 << 20)  # the kernel batches its counters
    reset_peak_memory(CPU)


def test_unknown_where_the_system_does_not_tell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_STATUS", tmp_path / "none")
    assert current_memory(CPU) is None
    (tmp_path / "other").write_text("Name:\tpython\nVmRSS:\t    12 kB\n")
    monkeypatch.setattr(memory, "_STATUS", tmp_path / "other")
    assert current_memory(CPU) == 12 * 1024
    assert peak_memory(CPU) is None
    assert current_memory(torch.device("meta")) is None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_device_counts_its_tensors() -> None:
    device = torch.device("cuda", 0)
    before = current_memory(device)
    block = torch.ones(64 << 20, dtype=torch.uint8, device=device)
    assert current_memory(device) - before == block.nbytes
    del block
    assert peak_memory(device) - before >= 64 << 20
    reset_peak_memory(device)
    assert peak_memory(device) == current_memory(device)
