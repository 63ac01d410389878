"""A stand-in for the module pynvml: one GPU whose answers a test chooses."""

from types import SimpleNamespace
from typing import Any

UUID = "GPU-01234567-89ab-cdef-0123-456789abcdef"


class NVMLError(Exception):
    """What pynvml raises."""


class FakeNvml:
    """``answers`` by the name of the question; a missing one is not supported."""

    NVMLError = NVMLError
    NVML_SUCCESS = 0
    NVML_CLOCK_SM, NVML_CLOCK_MEM, NVML_TEMPERATURE_GPU = 1, 2, 0
    NVML_VOLATILE_ECC, NVML_MEMORY_ERROR_TYPE_CORRECTED, NVML_MEMORY_ERROR_TYPE_UNCORRECTED = 0, 0, 1
    NVML_FI_DEV_NVLINK_THROUGHPUT_DATA_TX, NVML_FI_DEV_NVLINK_THROUGHPUT_DATA_RX = 138, 139
    NVML_FI_DEV_NVLINK_ERROR_DL_REPLAY, NVML_FI_DEV_NVLINK_ERROR_DL_RECOVERY = 161, 162
    NVML_FI_DEV_NVLINK_ERROR_DL_CRC = 163
    NVML_FI_DEV_NVLINK_CRC_FLIT_ERROR_COUNT_TOTAL, NVML_FI_DEV_NVLINK_CRC_DATA_ERROR_COUNT_TOTAL = 38, 45
    NVML_FI_DEV_NVLINK_REPLAY_ERROR_COUNT_TOTAL, NVML_FI_DEV_NVLINK_RECOVERY_ERROR_COUNT_TOTAL = 52, 59
    nvmlClocksEventReasonGpuIdle, nvmlClocksEventReasonSwPowerCap = 0x1, 0x4
    nvmlClocksEventReasonHwSlowdown, nvmlClocksEventReasonSyncBoost = 0x8, 0x10
    nvmlClocksEventReasonSwThermalSlowdown, nvmlClocksEventReasonHwThermalSlowdown = 0x20, 0x40
    nvmlClocksEventReasonHwPowerBrakeSlowdown = 0x80

    def __init__(self, answers: dict[str, Any] | None = None) -> None:
        self.answers = FULL if answers is None else answers
        self.open = 0

    def nvmlInit(self) -> None:
        self.open += 1

    def nvmlShutdown(self) -> None:
        self.open -= 1

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:
        if uuid != UUID:
            raise NVMLError("Not Found")
        return "handle"

    def _answer(self, name: str) -> Any:
        if name not in self.answers:
            raise NVMLError("Not Supported")
        return self.answers[name]

    def nvmlDeviceGetName(self, gpu: str) -> Any:
        return self._answer("name")

    def nvmlDeviceGetPowerUsage(self, gpu: str) -> Any:
        return self._answer("power")

    def nvmlDeviceGetEnforcedPowerLimit(self, gpu: str) -> Any:
        return self._answer("limit")

    def nvmlDeviceGetUtilizationRates(self, gpu: str) -> Any:
        return SimpleNamespace(gpu=self._answer("busy"))

    def nvmlDeviceGetClockInfo(self, gpu: str, kind: int) -> Any:
        return self._answer("clocks")[kind]

    def nvmlDeviceGetTemperature(self, gpu: str, sensor: int) -> Any:
        return self._answer("temperature")

    def nvmlDeviceGetCurrentClocksEventReasons(self, gpu: str) -> Any:
        return self._answer("reasons")

    def nvmlDeviceGetTotalEccErrors(self, gpu: str, kind: int, counter: int) -> Any:
        return self._answer("ecc")[kind]

    def nvmlDeviceGetFieldValues(self, gpu: str, fields: list[tuple[int, int]]) -> Any:
        assert all(scope == 0xFFFFFFFF for _, scope in fields)  # all links at once
        known = self._answer("fields")
        return [
            SimpleNamespace(
                nvmlReturn=0 if field in known else 3, value=SimpleNamespace(ullVal=known.get(field, 99))
            )
            for field, _ in fields
        ]


FULL: dict[str, Any] = {
    "name": "NVIDIA Test",
    "power": 612_500,
    "limit": 700_000,
    "busy": 97,
    "clocks": {1: 1755, 2: 2619},
    "temperature": 61,
    "reasons": 0x1 | 0x4 | 0x40,
    "ecc": {0: 2, 1: 0},
    "fields": {138: 3, 139: 4, 161: 1, 163: 5},
}
