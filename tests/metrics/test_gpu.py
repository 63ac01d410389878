import dataclasses

import pytest

from flashtrain.metrics.gpu import THROTTLES, Gpu, GpuSample
from tests.metrics.fake_nvml import FULL, UUID, FakeNvml, NVMLError


def test_everything_in_its_unit() -> None:
    sample = Gpu(FakeNvml(), UUID).sample(step=7, time=1.5)
    assert sample == GpuSample(
        step=7,
        time=1.5,
        power_w=612.5,
        power_limit_w=700.0,
        sm_clock_mhz=1755,
        memory_clock_mhz=2619,
        temperature_c=61,
        utilization=0.97,
        throttled=("power cap", "thermal, by hardware"),
        nvlink_sent_bytes=3 * 1024,
        nvlink_received_bytes=4 * 1024,
        nvlink_errors=6,
        ecc_corrected=2,
        ecc_uncorrected=0,
    )
    assert GpuSample.from_json(sample.as_json()) == sample


@pytest.mark.parametrize("missing", sorted(FULL.keys() - {"name"}))
def test_what_a_gpu_does_not_support_is_none_and_the_rest_is_kept(missing: str) -> None:
    whole = dataclasses.asdict(Gpu(FakeNvml(), UUID).sample(1, 0.0))
    part = dataclasses.asdict(
        Gpu(FakeNvml({k: v for k, v in FULL.items() if k != missing}), UUID).sample(1, 0.0)
    )
    gone = {name for name in whole if part[name] is None}
    assert gone
    assert {name: value for name, value in part.items() if name not in gone} == {
        name: value for name, value in whole.items() if name not in gone
    }


def test_older_gpus_count_nvlink_errors_elsewhere() -> None:
    older = FULL | {"fields": {38: 1, 45: 2, 52: 3, 59: 4}}
    sample = Gpu(FakeNvml(older), UUID).sample(1, 0.0)
    assert (sample.nvlink_errors, sample.nvlink_sent_bytes) == (10, None)


def test_an_unknown_gpu_gives_nvml_back() -> None:
    nvml = FakeNvml()
    with pytest.raises(NVMLError, match="Not Found"):
        Gpu(nvml, "GPU-other")
    assert nvml.open == 0
    gpu = Gpu(nvml, UUID)
    assert nvml.open == 1
    gpu.close()
    assert nvml.open == 0


def test_the_real_module_has_every_name_that_is_used() -> None:
    pynvml = pytest.importorskip("pynvml", reason="nvidia-ml-py is not installed")
    names = [name for name in dir(FakeNvml) if name.startswith(("nvml", "NVML"))]
    assert len(names) > 20
    assert set(THROTTLES) <= set(names)
    for name in names:
        fake = getattr(FakeNvml, name)
        assert hasattr(pynvml, name), name
        if isinstance(fake, int):
            assert getattr(pynvml, name) == fake, name


@pytest.mark.parametrize("line", ["[]", '{"step": 1}', ""])
def test_other_lines_are_refused(line: str) -> None:
    with pytest.raises(ValueError, match=r"not the sample|Expecting"):
        GpuSample.from_json(line)
