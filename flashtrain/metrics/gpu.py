"""What a GPU says of itself through NVML: power, clocks, temperature, throttling, NVLink and ECC counters."""

import json
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

# Why clocks are below what they could be (nvml.h, nvmlClocksEventReasons). Idle clocks and clocks that a
# person has set are no throttling.
THROTTLES = {
    "nvmlClocksEventReasonSwPowerCap": "power cap",
    "nvmlClocksEventReasonHwSlowdown": "hardware slowdown",
    "nvmlClocksEventReasonSyncBoost": "sync boost",
    "nvmlClocksEventReasonSwThermalSlowdown": "thermal, by software",
    "nvmlClocksEventReasonHwThermalSlowdown": "thermal, by hardware",
    "nvmlClocksEventReasonHwPowerBrakeSlowdown": "power brake",
}
_ALL_LINKS = 0xFFFFFFFF  # as the scope of a field: the sum over all links
# A GPU supports one of these sets of error counters: Hopper the first, those before it the second.
_NVLINK_ERRORS = (
    (
        "NVML_FI_DEV_NVLINK_ERROR_DL_REPLAY",
        "NVML_FI_DEV_NVLINK_ERROR_DL_RECOVERY",
        "NVML_FI_DEV_NVLINK_ERROR_DL_CRC",
    ),
    (
        "NVML_FI_DEV_NVLINK_REPLAY_ERROR_COUNT_TOTAL",
        "NVML_FI_DEV_NVLINK_RECOVERY_ERROR_COUNT_TOTAL",
        "NVML_FI_DEV_NVLINK_CRC_FLIT_ERROR_COUNT_TOTAL",
        "NVML_FI_DEV_NVLINK_CRC_DATA_ERROR_COUNT_TOTAL",
    ),
)


@dataclass(frozen=True)
class GpuSample:
    """One reading after ``step``; None where this GPU or its driver does not tell.

    ``time`` in seconds since 1970. NVLink and ECC counters run since the driver was loaded: the difference
    of two samples says what happened between them.
    """

    step: int
    time: float
    power_w: float | None
    power_limit_w: float | None
    sm_clock_mhz: int | None
    memory_clock_mhz: int | None
    temperature_c: int | None
    utilization: float | None  # share of the last moments in which a kernel ran
    throttled: tuple[str, ...] | None
    nvlink_sent_bytes: int | None
    nvlink_received_bytes: int | None
    nvlink_errors: int | None
    ecc_corrected: int | None
    ecc_uncorrected: int | None

    def as_json(self) -> str:
        """One line of JSON that ``from_json`` reads back."""
        return json.dumps({field.name: getattr(self, field.name) for field in fields(self)})

    @classmethod
    def from_json(cls, line: str) -> "GpuSample":
        """The sample that ``as_json`` wrote. Raises ValueError for anything else."""
        record = json.loads(line)
        if not isinstance(record, dict) or set(record) != {field.name for field in fields(cls)}:
            raise ValueError(f"not the sample of a GPU: {line.strip()[:80]!r}")
        throttled = record.pop("throttled")
        return cls(**record, throttled=None if throttled is None else tuple(throttled))


class Gpu:
    """One GPU seen through ``nvml``, the module ``pynvml`` of nvidia-ml-py; found by its UUID.

    CUDA and NVML number GPUs differently, and CUDA_VISIBLE_DEVICES changes CUDA's numbers alone. Raises
    nvml.NVMLError if there is no driver or no such GPU.
    """

    def __init__(self, nvml: Any, uuid: str) -> None:
        self._nvml = nvml
        nvml.nvmlInit()
        try:
            self._handle = nvml.nvmlDeviceGetHandleByUUID(uuid)
            self.name = str(nvml.nvmlDeviceGetName(self._handle))
        except nvml.NVMLError:
            nvml.nvmlShutdown()
            raise

    def sample(self, step: int, time: float) -> GpuSample:
        """Read everything now; takes milliseconds and does not wait for kernels."""
        nvml, gpu = self._nvml, self._handle
        power = self._ask(nvml.nvmlDeviceGetPowerUsage, gpu)
        limit = self._ask(nvml.nvmlDeviceGetEnforcedPowerLimit, gpu)
        busy = self._ask(nvml.nvmlDeviceGetUtilizationRates, gpu)
        volatile = nvml.NVML_VOLATILE_ECC
        return GpuSample(
            step=step,
            time=time,
            power_w=None if power is None else power / 1000,
            power_limit_w=None if limit is None else limit / 1000,
            sm_clock_mhz=self._ask(nvml.nvmlDeviceGetClockInfo, gpu, nvml.NVML_CLOCK_SM),
            memory_clock_mhz=self._ask(nvml.nvmlDeviceGetClockInfo, gpu, nvml.NVML_CLOCK_MEM),
            temperature_c=self._ask(nvml.nvmlDeviceGetTemperature, gpu, nvml.NVML_TEMPERATURE_GPU),
            utilization=None if busy is None else busy.gpu / 100,
            throttled=self._throttled(),
            nvlink_sent_bytes=self._kibibytes(nvml.NVML_FI_DEV_NVLINK_THROUGHPUT_DATA_TX),
            nvlink_received_bytes=self._kibibytes(nvml.NVML_FI_DEV_NVLINK_THROUGHPUT_DATA_RX),
            nvlink_errors=self._nvlink_errors(),
            ecc_corrected=self._ask(
                nvml.nvmlDeviceGetTotalEccErrors, gpu, nvml.NVML_MEMORY_ERROR_TYPE_CORRECTED, volatile
            ),
            ecc_uncorrected=self._ask(
                nvml.nvmlDeviceGetTotalEccErrors, gpu, nvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED, volatile
            ),
        )

    def close(self) -> None:
        """Give back what NVML holds."""
        self._nvml.nvmlShutdown()

    def _ask(self, question: Callable[..., Any], *arguments: Any) -> Any:
        """An answer, or None where the device does not support the question or lost the answer."""
        try:
            return question(*arguments)
        except self._nvml.NVMLError:
            return None

    def _throttled(self) -> tuple[str, ...] | None:
        reasons = self._ask(self._nvml.nvmlDeviceGetCurrentClocksEventReasons, self._handle)
        if reasons is None:
            return None
        return tuple(words for name, words in THROTTLES.items() if reasons & getattr(self._nvml, name))

    def _kibibytes(self, field: int) -> int | None:
        value = self._field(field)
        return None if value is None else value * 1024

    def _nvlink_errors(self) -> int | None:
        for names in _NVLINK_ERRORS:
            counts = [self._field(getattr(self._nvml, name)) for name in names]
            if known := [count for count in counts if count is not None]:
                return sum(known)
        return None

    def _field(self, field: int) -> int | None:
        """The value of a field, over all links; None where it is not supported."""
        values = self._ask(self._nvml.nvmlDeviceGetFieldValues, self._handle, [(field, _ALL_LINKS)])
        if values is None or values[0].nvmlReturn != self._nvml.NVML_SUCCESS:
            return None
        return int(values[0].value.ullVal)
