"""Both gradients of an overlapped product against NCCL and cuBLAS, by hand and through autograd.

By hand nothing but the collectives and products is called, or the op's own function for both gradients.
Autograd adds to either what its engine costs, a change of threads and back a call among it; in a model's
backward pass many calls share that.

column   dx_shard = RS(dy · w)      dw = dyᵀ · AG(x_shard)
row      dx = AG(dy_shard) · w      dw = AG(dy_shard)ᵀ · x
"""

from typing import Any

import systems
import torch
from on_gpu.modes import Call, host_issued, launch_free
from on_gpu.products import TOLERANCE, Product
from on_gpu.ranks import Budget, Ranks
from on_gpu.report import Report
from torch import Tensor

from flashtrain.comm import ops


def measure(ranks: Ranks, report: Report) -> None:
    """One row a site."""
    sites = ranks.settings.listed((ranks.settings.backward_rows,))
    report.plan("backward", [f"{site.shape} {site.name} {site.rows}" for site in sites])
    budget = Budget(ranks.settings.seconds)
    for index, site in enumerate(sites):
        if (left := budget.left()) <= 0:
            return
        product = Product(site, ranks)
        ranks.alive(f"backward {product.title()}")
        report.add("backward", product.title(), _row(product, left / (len(sites) - index)))
        del product


def _row(product: Product, seconds: float) -> dict[str, Any]:
    by_collectives = _by_hand(product)
    calls = {
        "gemm": _plain(product),
        "nccl": by_collectives,
        "ours": _ours(product),
        "nccl, autograd": _through_autograd(product, product.sequential_with_gradient()),
        "ours, autograd": _through_autograd(product, product.ours()),
    }
    product.warm_up(calls)
    difference = _difference(product, calls["ours"], by_collectives)
    modes = {
        "launch_free": launch_free(calls, product.ranks, seconds=seconds / 2, sets=product.count),
        "host_issued": host_issued(calls, product.ranks, seconds=seconds / 4, sets=product.count),
    }
    ms = {mode: {name: t.summary() for name, t in measured.items()} for mode, measured in modes.items()}

    def ratio(one: str, other: str) -> dict[str, float]:
        return {mode: round(s[one]["median"] / s[other]["median"], 4) for mode, s in ms.items()}

    return product.describe() | {
        "difference": difference,
        "ms": ms,
        "G": ratio("gemm", "ours"),
        "over_nccl": ratio("nccl", "ours"),
        "over_nccl_with_autograd": ratio("nccl, autograd", "ours, autograd"),
    }


def _plain(product: Product) -> Call:
    def call(number: int) -> tuple[Tensor, Tensor]:
        inputs = product.sets[number]
        return systems.plain_backward(inputs.x_full.detach(), inputs.w.detach(), inputs.dy_full)

    return call


def _by_hand(product: Product) -> Call:
    group = product.ranks.collective

    def column(number: int) -> tuple[Tensor, Tensor]:
        inputs = product.sets[number]
        x, w, dy = inputs.x.detach(), inputs.w.detach(), inputs.dy
        dx = systems.scatter_tensor(torch.mm(dy, w), group)
        return dx, torch.mm(dy.t(), systems.gather_tensor(x, group))

    def row(number: int) -> tuple[Tensor, Tensor]:
        inputs = product.sets[number]
        dy = systems.gather_tensor(inputs.dy, group)
        return systems.plain_backward(inputs.x.detach(), inputs.w.detach(), dy)

    return column if product.site.style == "column" else row


def _ours(product: Product) -> Call:
    name, label = product.ranks.ours, product.label
    gradients = ops.column_gradients if product.site.style == "column" else ops.row_gradients

    def call(number: int) -> tuple[Tensor, Tensor]:
        inputs = product.sets[number]
        return gradients(inputs.dy, inputs.x.detach(), inputs.w.detach(), name, label)

    return call


def _through_autograd(product: Product, forward: Call) -> Call:
    graphs = [forward(number) for number in range(product.count)]

    def call(number: int) -> tuple[Tensor, ...]:
        inputs = product.sets[number]
        return torch.autograd.grad(graphs[number], (inputs.x, inputs.w), inputs.dy, retain_graph=True)

    return call


def _difference(product: Product, ours: Call, theirs: Call) -> dict[str, float]:
    """Relative, of dx and dw, on the worst rank; RuntimeError if they are not the same gradients."""
    own = [
        float((mine.float() - other.float()).norm() / other.float().norm())
        for mine, other in zip(ours(0), theirs(0), strict=True)
    ]
    worst = product.ranks.slowest(torch.tensor(own, dtype=torch.float64)).tolist()
    for name, value in zip(("dx", "dw"), worst, strict=True):
        if not value <= TOLERANCE:
            raise RuntimeError(f"{product.title()}: {name} is off by {value:.2g} from NCCL and cuBLAS")
    return {name: round(value, 6) for name, value in zip(("dx", "dw"), worst, strict=True)}
