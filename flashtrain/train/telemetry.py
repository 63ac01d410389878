"""A callback that keeps what each rank's GPU says of itself."""

import logging
import time
from importlib import import_module
from typing import TextIO

import torch

from flashtrain.errors import UserError
from flashtrain.methods.callback import Callback, Run
from flashtrain.metrics.gpu import Gpu
from flashtrain.metrics.history import telemetry_file
from flashtrain.metrics.report import StepMetrics

_log = logging.getLogger(__name__)


class GpuTelemetry(Callback):
    """Every ``every`` steps a line of out/telemetry-rankN.jsonl: power, clocks, throttling, NVLink, ECC.

    For every rank, about its own GPU. Where there is none, or NVML does not know it, one log line says so
    and the callback stays off. A warning names the reasons when clocks begin to be throttled, and tells of
    uncorrected ECC errors.
    """

    def __init__(self, every: int, rank: int, device: torch.device) -> None:
        self.every, self.rank, self.device = every, rank, device
        self._gpu: Gpu | None = None
        self._file: TextIO | None = None
        self._throttled: tuple[str, ...] = ()
        self._uncorrected: int | None = None

    def on_start(self, run: Run) -> None:
        if self.device.type != "cuda":
            _log.info("no GPU telemetry: this run is on the %s", self.device.type.upper())
            return
        try:
            nvml = import_module("pynvml")
        except ImportError as error:
            raise UserError(
                "watch.telemetry_every needs nvidia-ml-py: pip install 'flashtrain[nvml]'"
            ) from error
        uuid = f"GPU-{torch.cuda.get_device_properties(self.device).uuid}"
        try:
            self._gpu = Gpu(nvml, uuid)
        except nvml.NVMLError as error:
            _log.warning("no GPU telemetry: NVML does not give %s: %s", uuid, error)
            return
        run.out.mkdir(parents=True, exist_ok=True)
        # Samples of steps that an interrupted run did later than its checkpoint stay: they were measured.
        path = telemetry_file(run.out, self.rank)
        if run.first_step == 1:
            path.unlink(missing_ok=True)
        self._file = path.open("a", encoding="utf-8")
        _log.info("GPU telemetry every %d steps: %s, %s", self.every, self._gpu.name, uuid)

    def on_step(self, metrics: StepMetrics) -> None:
        if self._gpu is None or self._file is None or metrics.step % self.every:
            return
        sample = self._gpu.sample(metrics.step, time.time())
        self._file.write(sample.as_json() + "\n")
        self._file.flush()
        throttled = sample.throttled or ()
        if new := [reason for reason in throttled if reason not in self._throttled]:
            _log.warning("step %d: the clocks of this GPU are throttled: %s", metrics.step, ", ".join(new))
        self._throttled = throttled
        if self._uncorrected is not None and (sample.ecc_uncorrected or 0) > self._uncorrected:
            new_errors = (sample.ecc_uncorrected or 0) - self._uncorrected
            _log.warning("step %d: %d new uncorrected ECC errors on this GPU", metrics.step, new_errors)
        self._uncorrected = sample.ecc_uncorrected

    def on_end(self, run: Run) -> None:
        if self._file is not None:
            self._file.close()
        if self._gpu is not None:
            self._gpu.close()
        self._gpu = self._file = None
