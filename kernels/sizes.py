"""Sizes of launches: plain Python, as Triton's own functions of these names take microseconds a call."""

from functools import cache

import torch


def cdiv(length: int, block: int) -> int:
    """How many blocks a length is."""
    return -(-length // block)


def next_power_of_2(size: int) -> int:
    """The least power of 2 that is no less than ``size``, which is at least 1."""
    return 1 << (size - 1).bit_length()


@cache
def processors(device: torch.device) -> int:
    """Multiprocessors of a GPU; 1 for a CPU, which is where Triton's interpreter runs."""
    on_gpu = device.type == "cuda"
    return torch.cuda.get_device_properties(device).multi_processor_count if on_gpu else 1
