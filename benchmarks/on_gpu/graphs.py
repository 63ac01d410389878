"""The forward products replayed from CUDA graphs, one graph for each set of inputs.

On a group of its own, so that a capture that fails leaves the transport of the other parts alone; it is the
last part, as what it may leave behind is not known. It ends, with the reason, where a system cannot be
captured or a replay with other inputs gives another result than a call.
"""

from dataclasses import replace
from typing import Any

import torch
from on_gpu.forward import verdicts
from on_gpu.modes import Call, host_issued
from on_gpu.products import TOLERANCE, Product, brief
from on_gpu.ranks import Budget, Ranks
from on_gpu.report import Report
from torch import Tensor

from flashtrain.comm import transport


def measure(ranks: Ranks, report: Report) -> None:
    """One row a shape, until a system cannot be captured: then the reason."""
    sites = ranks.settings.listed(ranks.settings.rows)
    report.plan("graph", [f"{site.shape} {site.name} {site.rows}" for site in sites])
    transport.configure(replace(transport.settings(), graphs=True))
    budget, group = Budget(ranks.settings.seconds), ranks.new_group()
    for index, site in enumerate(sites):
        if (left := budget.left()) <= 0:
            return
        product = Product(site, ranks)
        ranks.alive(f"graph {product.title()}")
        with torch.no_grad():
            row, absent = _row(product, group, left / (len(sites) - index))
        if absent:
            report.note("graph", {"absent": absent, "at": product.title()})
            return
        report.add("graph", product.title(), row)
        del product


def _row(product: Product, group: str, seconds: float) -> tuple[dict[str, Any], dict[str, str]]:
    """The row, or the system that has none and why."""
    eager = {
        "gemm": product.gemm(),
        "collective": product.collective(),
        "nccl": product.sequential(),
        "ours": product.ours(group),
    }
    product.warm_up(eager)
    calls = {}
    for name, call in eager.items():
        problem, replay = "", None
        try:
            replay = _captured(product, call)
            problem = _disagreement(product, call, replay)
        except Exception as error:
            problem = brief(error)
        reason = product.ranks.complaint(problem)
        if reason or replay is None:
            return {}, {name: reason}
        calls[name] = replay
    product.warm_up(calls)
    modes = {"graph": host_issued(calls, product.ranks, seconds=seconds / 2, sets=product.count)}
    return product.describe() | verdicts(product, modes), {}


def _captured(product: Product, call: Call) -> Call:
    """``call`` of each set as a graph; a replay returns the tensor that it overwrites."""
    if product.ranks.device.device.type != "cuda":
        raise NotImplementedError("there are no CUDA graphs on a CPU")
    graphs: list[tuple[torch.cuda.CUDAGraph, Tensor]] = []
    for number in range(product.count):
        graph = torch.cuda.CUDAGraph()
        # Other threads, such as NCCL's watchdog, may call the driver meanwhile.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            result = call(number)
        graphs.append((graph, result))

    def replay(number: int) -> Tensor:
        graph, result = graphs[number]
        graph.replay()
        return result

    return replay


def _disagreement(product: Product, call: Call, replay: Call) -> str:
    """Whether replays follow their inputs: what is wrong, or nothing."""
    inputs = product.sets[0]
    for turn in range(3):
        for tensor in (inputs.x, inputs.x_full):
            tensor.mul_(-0.5)
        wanted, found = call(0).float(), replay(0).float()
        if not (found - wanted).norm() <= TOLERANCE * wanted.norm():
            return f"replay {turn} with other inputs differs from a call"
    return ""
