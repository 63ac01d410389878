import logging
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from flashtrain.errors import UserError
from flashtrain.metrics import history
from flashtrain.metrics.gpu import GpuSample
from flashtrain.train.telemetry import GpuTelemetry
from tests.metrics.fake_nvml import FULL, UUID, FakeNvml
from tests.train.records import METRICS, run_view

CUDA = torch.device("cuda", 0)


@pytest.fixture
def nvml(monkeypatch: pytest.MonkeyPatch) -> FakeNvml:
    """pynvml with one GPU, which torch calls cuda:0."""
    fake = FakeNvml(dict(FULL))
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    uuid = UUID.removeprefix("GPU-")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid=uuid))
    return fake


def samples(out: Path, rank: int) -> list[GpuSample]:
    lines = history.telemetry_file(out, rank).read_text().splitlines()
    return [GpuSample.from_json(line) for line in lines]


def play(callback: GpuTelemetry, out: Path, first: int, last: int) -> None:
    callback.on_start(run_view(out, first_step=first))
    for step in range(first, last + 1):
        callback.on_step(replace(METRICS, step=step))
    callback.on_end(run_view(out))


def test_a_sample_every_so_many_steps_of_the_own_gpu(tmp_path: Path, nvml: FakeNvml) -> None:
    play(GpuTelemetry(3, rank=2, device=CUDA), tmp_path / "run", 1, 7)
    assert [sample.step for sample in samples(tmp_path / "run", 2)] == [3, 6]
    assert samples(tmp_path / "run", 2)[0].power_w == 612.5
    assert nvml.open == 0
    play(GpuTelemetry(3, rank=2, device=CUDA), tmp_path / "run", 8, 9)
    assert [sample.step for sample in samples(tmp_path / "run", 2)] == [3, 6, 9]
    play(GpuTelemetry(3, rank=2, device=CUDA), tmp_path / "run", 1, 3)
    assert [sample.step for sample in samples(tmp_path / "run", 2)] == [3]


def test_trouble_is_warned_of_when_it_begins(
    tmp_path: Path, nvml: FakeNvml, caplog: pytest.LogCaptureFixture
) -> None:
    callback = GpuTelemetry(1, rank=0, device=CUDA)
    callback.on_start(run_view(tmp_path))
    script = [(0x1, 0), (0x4, 0), (0x4, 2), (0x4 | 0x40, 2), (0x0, 2), (0x4, 2)]
    for step, (reasons, uncorrected) in enumerate(script, start=1):
        nvml.answers |= {"reasons": reasons, "ecc": {0: 0, 1: uncorrected}}
        callback.on_step(replace(METRICS, step=step))
    callback.on_end(run_view(tmp_path))
    assert [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING] == [
        "step 2: the clocks of this GPU are throttled: power cap",
        "step 3: 2 new uncorrected ECC errors on this GPU",
        "step 4: the clocks of this GPU are throttled: thermal, by hardware",
        "step 6: the clocks of this GPU are throttled: power cap",
    ]


def test_without_a_gpu_it_says_so_once_and_stays_off(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "flashtrain"):
        play(GpuTelemetry(1, rank=0, device=torch.device("cpu")), tmp_path, 1, 5)
    assert [record.getMessage() for record in caplog.records] == ["no GPU telemetry: this run is on the CPU"]
    assert list(tmp_path.iterdir()) == []


def test_a_gpu_that_nvml_does_not_know_is_named(
    tmp_path: Path, nvml: FakeNvml, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="mig"))
    play(GpuTelemetry(1, rank=0, device=CUDA), tmp_path, 1, 5)
    assert [record.getMessage() for record in caplog.records] == [
        "no GPU telemetry: NVML does not give GPU-mig: Not Found"
    ]
    assert list(tmp_path.iterdir()) == []
    assert nvml.open == 0


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    with pytest.raises(UserError, match=r"watch\.telemetry_every needs nvidia-ml-py"):
        GpuTelemetry(1, rank=0, device=CUDA).on_start(run_view(tmp_path))
