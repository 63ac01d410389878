"""What the machine can do at best: rates of copies and products, and what one call costs.

Measured on all ranks at once, as they run in an overlapped product, in the same run as what they
explain.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from timing import Call, measure
from torch import Tensor

COPIES = {"in the second-level cache": 256 << 10, "in the third-level cache": 4 << 20, "in memory": 64 << 20}
PRODUCTS = ((1024, 160, 192), (1024, 512, 192), (1024, 1024, 1024), (2048, 2048, 2048))
FRESH = 64 << 20


def floors(ways: dict[str, Callable[[Tensor, Tensor], Tensor]], quick: bool) -> dict[str, Any]:
    """Copy rates in GB/s (bytes copied, not read plus written), product rates in GFLOP/s, call costs in ms.

    ``ways`` are all-gather products by way; their call cost is that of one on a few rows and columns.
    Collective over the default group.
    """
    repeats = 3 if quick else 30

    def seconds(call: Call) -> float:
        return float(measure({"": call}, repeats=repeats, seconds=3.0, sets=1)[""].wall.median())

    copies = {where: size / 1e9 / seconds(_copy(size)) * _times(size) for where, size in COPIES.items()}
    source = torch.randn(FRESH // 4)
    copies["into fresh memory"] = FRESH / 1e9 / seconds(lambda _: source.clone())
    products = {
        f"{m}x{n}x{k} {str(dtype).removeprefix('torch.')}": 2
        * m
        * n
        * k
        / 1e9
        / seconds(_product(m, n, k, dtype))
        for m, n, k in PRODUCTS[: 2 if quick else None]
        for dtype in (torch.float32, torch.bfloat16)
    }
    calls = {name: _tiny(way) for name, way in ways.items()}
    samples = measure({"barrier": lambda _: dist.barrier()} | calls, repeats=5 * repeats, seconds=5.0, sets=1)
    return {
        "copy_gb_per_s": {where: round(rate, 2) for where, rate in copies.items()},
        "product_gflop_per_s": {shape: round(rate, 1) for shape, rate in products.items()},
        "call_ms": {name: values.summary() for name, values in samples.items()},
    }


def _times(size: int) -> int:
    """How often a short copy is repeated so that the call itself does not show."""
    return max(1, (4 << 20) // size)


def _copy(size: int) -> Call:
    source, target = torch.randn(size // 4), torch.zeros(size // 4)

    def call(_: int) -> None:
        for _ in range(_times(size)):
            target.copy_(source)

    return call


def _product(m: int, n: int, k: int, dtype: torch.dtype) -> Call:
    x, w, y = (torch.randn(*size).to(dtype) for size in ((m, k), (n, k), (m, n)))
    return lambda _: torch.mm(x, w.t(), out=y)


def _tiny(way: Callable[[Tensor, Tensor], Tensor]) -> Call:
    x, w = torch.randn(4, 8), torch.randn(8, 8)
    return lambda _: way(x, w)
