"""Memory of a device, or of the process where the device is the CPU."""

from pathlib import Path

import torch

_STATUS = Path("/proc/self/status")


def current_memory(device: torch.device) -> int | None:
    """Bytes in use now: by tensors on a CUDA device, resident in the process on the CPU.

    None where the system does not tell. The allocator's reserve is not counted: it depends on what the
    process did before, not on what it needs.
    """
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    return _status("VmRSS") if device.type == "cpu" else None


def peak_memory(device: torch.device) -> int | None:
    """Most bytes in use so far, counted as in ``current_memory``.

    Since ``reset_peak_memory`` on a CUDA device, since the start of the process on the CPU.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return _status("VmHWM") if device.type == "cpu" else None


def reset_peak_memory(device: torch.device) -> None:
    """Start a new peak on a CUDA device. A process cannot forget its own: no effect on the CPU."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def _status(field: str) -> int | None:
    """A field of Linux's /proc/self/status in bytes (proc(5)); its unit there is KiB."""
    try:
        lines = _STATUS.read_text().splitlines()
    except OSError:  # not Linux
        return None
    for line in lines:
        name, _, value = line.partition(":")
        if name == field:
            return int(value.split()[0]) * 1024
    return None
