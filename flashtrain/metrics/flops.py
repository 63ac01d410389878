"""The dense peak that a device could do."""

import re
from typing import Literal, NamedTuple

import torch


class _Device(NamedTuple):
    """Dense peaks in TFLOP/s. ``half`` is bfloat16 and float16 with fp32 accumulation; None: not given."""

    name: str  # regular expression for the whole device name without its vendor
    half: float | None
    tf32: float | None
    float32: float
    float8: float | None


# Vendors print tensor-core figures with 2:4 sparsity in large type: all figures here are dense, half of
# those. Names are matched whole, because a laptop part, a MIG slice or a custom part carries the name of
# the full device inside its own.
_DEVICES = (
    # NVIDIA A100 data sheet (2021); A800 differs in NVLink alone. The 64 GB part has more units: unknown.
    _Device(r"A[18]00(-| )(SXM4-|PCIE-)?(40|80)GB( PCIe)?", 312.0, 156.0, 19.5, None),
    # NVIDIA H100 architecture white paper, table 3, column SXM5; H800 differs in NVLink and fp64.
    _Device(r"H100 80GB HBM3|H800|GH200 (120GB|480GB|144G HBM3e)", 989.4, 494.7, 66.9, 1978.9),
    # NVIDIA H100 architecture white paper, table 3, column PCIe.
    _Device(r"H[18]00 PCIe", 756.0, 378.0, 51.2, 1513.0),
    # NVIDIA H100 data sheet, column NVL: 1671 sparse BF16, 835 sparse TF32, 3341 sparse FP8, 60 FP32.
    _Device(r"H100 NVL", 835.5, 417.5, 60.0, 1670.5),
    # NVIDIA H200 data sheet, columns SXM and NVL: the same GPU as the H100, with more memory.
    _Device(r"H200", 989.4, 494.7, 66.9, 1978.9),
    _Device(r"H200 NVL", 835.5, 417.5, 60.0, 1670.5),
    # NVIDIA H20 data sheet, 96 GB and 141 GB.
    _Device(r"H20(-3e)?", 148.0, 74.0, 44.0, 296.0),
    # NVIDIA HGX B200 data sheet, an eighth of the board: 36 PFLOP/s sparse BF16, 72 sparse FP8.
    _Device(r"B200", 2250.0, 1125.0, 75.0, 4500.0),
    # NVIDIA GB200 NVL72 data sheet, half a superchip: 10 PFLOP/s sparse BF16, 20 sparse FP8.
    _Device(r"GB200", 2500.0, 1250.0, 80.0, 5000.0),
    # NVIDIA L40S, L40 and L4 data sheets.
    _Device(r"L40S", 362.05, 183.0, 91.6, 733.0),
    _Device(r"L40", 181.05, 90.5, 90.5, 362.0),
    _Device(r"L4", 121.0, 60.0, 30.3, 242.5),
    # NVIDIA Ada and Blackwell GeForce white papers, tensor figures with fp32 accumulation.
    _Device(r"(GeForce )?RTX 4090", 165.2, 82.6, 82.6, 330.3),
    _Device(r"(GeForce )?RTX 5090", 209.5, 104.8, 104.8, 419.0),
    # NVIDIA GA102 white paper, tensor figures with fp32 accumulation.
    _Device(r"(GeForce )?RTX 3090", 71.0, 35.6, 35.6, None),
    # AMD CDNA 3 white paper and Instinct MI300X and MI325X data sheets: matrix figures.
    _Device(r"Instinct MI3(00|25)X( OAM)?", 1307.4, 653.7, 163.4, 2614.9),
)
_VENDOR = re.compile(r"^(NVIDIA|AMD|Tesla) +")


def peak_flops(device_name: str, dtype: torch.dtype | Literal["tf32"]) -> float | None:
    """Dense peak of matrix products in FLOP/s; None for a device or dtype that is not known.

    ``device_name`` is that of ``torch.cuda.get_device_name``. There is no guess: CPUs, laptop parts and
    slices of a device are unknown, and a report then shows MFU as n/a. ``torch.float32`` is true single
    precision: ask for "tf32" where TF32 is allowed, or the MFU may pass 1.
    """
    name = device_name.strip()
    while (vendor := _VENDOR.match(name)) is not None:
        name = name[vendor.end() :]
    for device in _DEVICES:
        if re.fullmatch(device.name, name):
            break
    else:
        return None
    if dtype == "tf32":
        peak = device.tf32
    elif dtype in (torch.bfloat16, torch.float16):
        peak = device.half
    elif dtype == torch.float32:
        peak = device.float32
    elif dtype in (torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz):
        peak = device.float8
    else:
        peak = None
    return None if peak is None else peak * 1e12
