"""The forward products, launch-free and host-issued, and the host's time of one call."""

from typing import Any

import torch
from on_gpu import score
from on_gpu.modes import Call, Times, host_issued, launch_free
from on_gpu.products import TOLERANCE, Product
from on_gpu.ranks import Budget, Ranks
from on_gpu.report import Report

HOST_BURST = 16  # calls, few enough for the driver's queue of launches


def measure(ranks: Ranks, report: Report) -> None:
    """One row a shape: every system in both modes, its error, and the verdict."""
    sites = ranks.settings.listed(ranks.settings.rows)
    report.plan("forward", [f"{site.shape} {site.name} {site.rows}" for site in sites])
    budget = Budget(ranks.settings.seconds)
    for index, site in enumerate(sites):
        if (left := budget.left()) <= 0:
            return
        product = Product(site, ranks)
        ranks.alive(f"forward {product.title()}")
        with torch.no_grad():
            report.add("forward", product.title(), _row(product, left / (len(sites) - index)))
        del product


def _row(product: Product, seconds: float) -> dict[str, Any]:
    ranks, site = product.ranks, product.site
    calls, absent, errors = systems(product)
    if site.style == "column":
        # What it costs to have the gathered input, too.
        calls["ours, x_full"] = product.ours(return_gather=True)
        product.warm_up({"": calls["ours, x_full"]})
    modes = {
        "launch_free": launch_free(calls, ranks, seconds=seconds / 2, sets=product.count),
        "host_issued": host_issued(calls, ranks, seconds=seconds / 4, sets=product.count),
    }
    return product.describe() | {"absent": absent, "error": errors} | verdicts(product, modes)


def systems(product: Product) -> tuple[dict[str, Call], dict[str, str], dict[str, float]]:
    """Calls of the systems that run here, why others do not, and relative errors. Collective.

    Raises RuntimeError if the op or NCCL and cuBLAS computed something else.
    """
    calls = {
        "gemm": product.gemm(),
        "collective": product.collective(),
        "nccl": product.sequential(),
        "ours": product.ours(),
    }
    absent: dict[str, str] = {}
    product.warm_up(calls)
    product.admit("torch", product.torch_fused, calls, absent)
    errors = product.errors({name: calls[name] for name in ("nccl", "ours", "torch") if name in calls})
    for name, error in errors.items():
        if not error <= TOLERANCE:
            if name != "torch":
                raise RuntimeError(f"{product.title()}: {name} is off by {error:.2g}")
            del calls[name]
            absent[name] = f"its result is off by {error:.2g}"
    return calls, absent, errors


def verdicts(product: Product, modes: dict[str, dict[str, Times]]) -> dict[str, Any]:
    """Of each mode the times, and in ``judged`` what follows from their medians."""
    site, world = product.site, product.ranks.world
    ms = {
        mode: {name: times.summary() for name, times in measured.items()} for mode, measured in modes.items()
    }
    judged = {
        mode: score.judge({name: s["median"] for name, s in found.items()}, site.rows, site.width, world)
        for mode, found in ms.items()
    }
    return {"ms": ms, "judged": judged}


def measure_host(ranks: Ranks, report: Report) -> None:
    """Milliseconds that one call keeps the host, issued in bursts while the device sleeps."""
    sites = ranks.settings.listed((ranks.settings.host_rows,))
    report.plan("host", [f"{site.shape} {site.name} {site.rows}" for site in sites])
    budget = Budget(ranks.settings.seconds)
    for index, site in enumerate(sites):
        if (left := budget.left()) <= 0:
            return
        product = Product(site, ranks)
        ranks.alive(f"host {product.title()}")
        seconds = left / (len(sites) - index) / 2
        with torch.no_grad():
            calls, absent, _ = systems(product)
            times = _bursts(
                product, {name: calls[name] for name in ("nccl", "torch", "ours") if name in calls}, seconds
            )
        with_gradient = {
            "nccl, gradient": product.sequential_with_gradient(),
            "ours, gradient": product.ours(),
        }
        product.warm_up(with_gradient)
        times |= _bursts(product, with_gradient, seconds)
        row = product.describe() | {
            "absent": absent,
            "host_ms": {name: round(found.host, 5) for name, found in times.items()},
            "late": {name: found.late for name, found in times.items()},
        }
        report.add("host", product.title(), row)
        del product


def _bursts(product: Product, calls: dict[str, Call], seconds: float) -> dict[str, Times]:
    return launch_free(calls, product.ranks, seconds=seconds, sets=product.count, burst=HOST_BURST)
