"""Facts that must stand beside every number: the machine, the versions, the date, how busy it was."""

import os
import platform
import re
import time
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import flashtrain


def facts() -> dict[str, Any]:
    """Processor, cores that this process may use, memory in bytes, operating system."""
    processor = _first_processor()
    return {
        "processor": processor.get("model name", platform.processor() or "unknown"),
        "family": processor.get("cpu family", "unknown"),
        "model": processor.get("model", "unknown"),
        "cores": cores(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "virtual": "hypervisor" in processor.get("flags", "").split(),
        "system": f"{platform.system()} {platform.release()}",
    }


def cores() -> int:
    """Cores that this process may run on, which may be fewer than the machine has."""
    return len(os.sched_getaffinity(0))


def versions() -> dict[str, str]:
    """Versions of everything that a number here depends on."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "flashtrain": flashtrain.__version__,
        "blas": "mkl" if torch.backends.mkl.is_available() else "other",
        "bf16_products": "onednn" if torch.backends.mkldnn.is_available() else "native",
    }


def gpus(count: int) -> list[str]:
    """Names and memory of the first ``count`` CUDA devices; empty without CUDA."""
    if not torch.cuda.is_available():
        return []
    found = [torch.cuda.get_device_properties(index) for index in range(count)]
    return [f"{properties.name}, {properties.total_memory >> 20} MiB" for properties in found]


def gpu_versions() -> dict[str, str]:
    """Versions of the driver, CUDA, NCCL and Triton; empty without CUDA."""
    if not torch.cuda.is_available():
        return {}
    try:
        driver = Path("/proc/driver/nvidia/version").read_text()
    except OSError:
        driver = ""
    number = re.search(r"\d+\.\d+(\.\d+)?", driver)
    return {
        "driver": number[0] if number else "unknown",
        "cuda": str(torch.version.cuda),
        "nccl": ".".join(map(str, torch.cuda.nccl.version())),
        "triton": metadata.version("triton"),
    }


def date() -> str:
    """Now, in UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def load() -> list[float]:
    """Runnable threads of the whole machine, averaged over 1, 5 and 15 minutes, this run's included."""
    return [round(value, 2) for value in os.getloadavg()]


class Others:
    """How much of the cores programs other than this one use, from now on.

    A rank that shares its core waits for whole time slices, and its peers with it, so times taken beside
    other programs say little.
    """

    def __init__(self) -> None:
        self._start = _busy_and_all()

    def share(self, own_seconds: float = 0.0) -> float:
        """Their part of all processor time since the start; ``own_seconds`` of it were this program's."""
        busy, everything = (now - then for now, then in zip(_busy_and_all(), self._start, strict=True))
        return max(0.0, busy - own_seconds) / everything if everything > 0 else 0.0


def await_quiet(patience: float, share: float = 0.05, lasting: float = 1.0) -> bool:
    """Sleep until others use less than ``share`` for ``lasting`` seconds; False after ``patience``."""
    end = time.monotonic() + patience
    while time.monotonic() < end:
        others = Others()
        time.sleep(lasting)
        if others.share() < share:
            return True
    return False


def _busy_and_all() -> tuple[float, float]:
    """Seconds since boot that all cores were busy, and all there were; zeros where nobody counts them."""
    try:
        fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]
    except OSError:
        return 0.0, 0.0
    user, nice, system, idle, waiting, *rest = (int(field) / os.sysconf("SC_CLK_TCK") for field in fields)
    busy = user + nice + system + sum(rest)
    return busy, busy + idle + waiting


def _first_processor() -> dict[str, str]:
    """The first block of /proc/cpuinfo; empty where there is no such file."""
    try:
        block = Path("/proc/cpuinfo").read_text().split("\n\n")[0]
    except OSError:
        return {}
    pairs = (line.split(":", 1) for line in block.splitlines() if ":" in line)
    return {key.strip(): value.strip() for key, value in pairs}
