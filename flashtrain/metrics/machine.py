"""Where a run computes: processor, devices, versions."""

import os
import platform
import socket
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import flashtrain


def describe_machine() -> dict[str, Any]:
    """Host, processor, usable cores, memory in bytes, GPUs, operating system and versions, as plain data."""
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "host": socket.gethostname(),
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "gpus": [f"{gpus.count(name)} x {name}" for name in sorted(set(gpus))],
        "system": f"{platform.system()} {platform.release()}",
        "flashtrain": flashtrain.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "cuda": torch.version.cuda,
    }


def _processor() -> str:
    """The model of the first processor as /proc/cpuinfo names it; the architecture where there is no such."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
