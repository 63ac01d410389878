"""One site: its tensors, and the systems that compute its forward product."""

import importlib
from collections.abc import Callable, Mapping
from typing import Any

import shapes
import systems
import torch
from on_gpu.modes import Call
from on_gpu.ranks import Ranks
from torch import Tensor

from flashtrain.comm import ops

DTYPE = torch.bfloat16
BEYOND_CACHE = 160 << 20  # bytes that a round of calls must touch; an H200 caches 50 MiB
FEWEST_SETS, MOST_SETS = 2, 8
MOST_WORDS = 200  # characters of an error that are kept
TOLERANCE = 2e-2  # relative error above which a system computed something else


class Product:
    """The tensors of ``site``: enough sets that a call finds none of its operands in the cache."""

    def __init__(self, site: shapes.Site, ranks: Ranks) -> None:
        self.site, self.ranks = site, ranks
        rows, outputs, inputs = self.local = site.local(ranks.world)
        touched = (rows * inputs + outputs * inputs + rows * outputs) * DTYPE.itemsize
        self.count = max(FEWEST_SETS, min(MOST_SETS, -(-BEYOND_CACHE // touched)))
        self.sets = [
            systems.Inputs(site, ranks.rank, ranks.world, number, DTYPE, ranks.device.device)
            for number in range(self.count)
        ]
        self.label = f"{site.shape}.{site.name}"

    def describe(self) -> dict[str, Any]:
        """What of it belongs in every row."""
        site = self.site
        return {
            "shape": site.shape,
            "name": site.name,
            "style": site.style,
            "rows": site.rows,
            "inputs": site.inputs,
            "outputs": site.outputs,
            "local_mnk": list(self.local),
            "sets": self.count,
            "bytes_received": (self.ranks.world - 1)
            * site.rows
            // self.ranks.world
            * site.width
            * DTYPE.itemsize,
        }

    def gemm(self) -> Call:
        """The plain product alone, all rows at once."""
        return lambda n: systems.plain_forward(self.sets[n].x_full, self.sets[n].w)

    def collective(self) -> Call:
        """The collective alone, on data that is there."""
        group = self.ranks.collective
        if self.site.style == "column":
            return lambda n: systems.gather_tensor(self.sets[n].x, group)
        ready = systems.plain_forward(self.sets[0].x_full, self.sets[0].w).detach()
        return lambda n: systems.scatter_tensor(ready, group)

    def sequential(self) -> Call:
        """The collective and the product, one after the other."""
        group = self.ranks.collective
        if self.site.style == "column":
            return lambda n: torch.mm(systems.gather_tensor(self.sets[n].x, group), self.sets[n].w.t())
        return lambda n: systems.scatter_tensor(torch.mm(self.sets[n].x, self.sets[n].w.t()), group)

    def sequential_with_gradient(self) -> Call:
        """The same as an autograd function."""
        way = systems.collectives(
            self.site.style, self.ranks.collective, systems.gather_tensor, systems.scatter_tensor, False
        )
        return lambda n: way(self.sets[n].x, self.sets[n].w)

    def torch_fused(self) -> Call:
        """torch's own overlapped op, called eagerly. It copies x into its symmetric workspace itself."""
        importlib.import_module("torch.distributed._symmetric_memory")  # defines the ops
        name = self.ranks.collective.group_name
        if self.site.style == "column":
            gather = torch.ops.symm_mem.fused_all_gather_matmul
            return lambda n: gather(self.sets[n].x, [self.sets[n].w.t()], 0, name, return_A=False)[1][0]
        scatter = torch.ops.symm_mem.fused_matmul_reduce_scatter
        return lambda n: scatter(self.sets[n].x, self.sets[n].w.t(), "sum", 0, name)

    def ours(self, group: str | None = None, return_gather: bool = False) -> Call:
        """The op, on the ops' group or ``group``; it pushes from plain memory, so nothing is copied in."""
        name, rows, label = group or self.ranks.ours, self.site.rows, self.label
        if self.site.style == "row":
            return lambda n: ops.matmul_reduce_scatter(self.sets[n].x, self.sets[n].w, name, label)
        return lambda n: ops.all_gather_matmul(
            self.sets[n].x, self.sets[n].w, name, label, rows, False, return_gather
        )[0]

    def reference(self) -> Tensor:
        """This rank's result for set 0 in fp32, partials unrounded."""
        x, w = self.sets[0].x.detach(), self.sets[0].w.detach().float()
        if self.site.style == "column":
            return torch.mm(systems.gather_tensor(x, self.ranks.collective).float(), w.t())
        return systems.scatter_tensor(torch.mm(x.float(), w.t()), self.ranks.collective)

    def errors(self, calls: Mapping[str, Call]) -> dict[str, float]:
        """Relative error of each call's result for set 0, in the 2-norm, of the worst rank. Collective."""
        wanted = self.reference()
        own = [float((call(0).float() - wanted).norm() / wanted.norm()) for call in calls.values()]
        worst = self.ranks.slowest(torch.tensor(own, dtype=torch.float64))
        return {name: round(value, 6) for name, value in zip(calls, worst.tolist(), strict=True)}

    def title(self) -> str:
        """As in the report: "8B qkv 2048"."""
        return f"{self.site.shape} {self.site.name} {self.site.rows}"

    def warm_up(self, calls: Mapping[str, Call]) -> None:
        """Every call on every set: compiles, allocates, tunes."""
        for call in calls.values():
            for number in range(self.count):
                call(number)
            self.ranks.device.synchronize()
            self.ranks.alive()

    def admit(
        self, name: str, make: Callable[[], Call], calls: dict[str, Call], absent: dict[str, str]
    ) -> None:
        """Add what ``make`` returns to ``calls`` if it runs on every rank, else why not to ``absent``.

        For systems that are not ours to mend: one that fails must not end the run. Collective.
        """
        problem, call = "", None
        try:
            call = make()
            self.warm_up({name: call})
        except Exception as error:
            problem = brief(error)
        complaint = self.ranks.complaint(problem)
        if complaint or call is None:
            absent[name] = complaint
        else:
            calls[name] = call


def brief(error: BaseException) -> str:
    """Kind and first line of ``error``, and of the one that led to it."""
    first = f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')[:MOST_WORDS]}"
    return first if error.__context__ is None else f"{first} (after {brief(error.__context__)})"
