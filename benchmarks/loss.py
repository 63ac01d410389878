"""Output projection and cross-entropy without whole logits: time and memory against PyTorch and Liger.

    python benchmarks/loss.py [--out benchmarks/results] [--tokens 16384] [--grid] [--rehearse]

Hidden 4096, a vocabulary of 128,256 and its quarter (what a rank of four has), bf16, random data. ``ours``
adds the weight's gradient in fp32 where the optimizer reads it, as a training step does; ``eager`` is
F.linear and cross_entropy of fp32 logits, ``compiled`` that under torch.compile; Liger's fused linear
cross-entropy takes part where ``liger_kernel`` can be imported. First errors of the gradients against fp64 on
512 tokens, then medians of CUDA events, the contestants in turn, forward alone and with backward, and what
each needs beyond its operands at its peak. ``floor`` are the products alone, as cuBLAS computes them whole,
and the fewest bytes of logits: written, read, read, written, read, read. ``--grid`` varies the size of a
chunk, ``--rehearse`` runs all of it on the CPU at toy sizes: not a measurement. Writes ``loss.json`` after
each part.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import machine
import torch
from gpu_time import DEVICE, race
from torch import Tensor
from torch.nn.functional import cross_entropy, linear

from flashtrain.kernels.cross_entropy import op
from flashtrain.kernels.weight_gradient import WeightGradient

SLEEP_CYCLES = 6_000_000
Function = Callable[[Tensor, Tensor, Tensor], Tensor]


def eager(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return cross_entropy(linear(x, weight).float(), targets)


def liger() -> Function | None:
    try:
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss
    except ImportError:
        return None
    loss = LigerFusedLinearCrossEntropyLoss()
    return lambda x, weight, targets: loss(weight, x, targets)


class Case:
    """Operands of one vocabulary, and the contestants on them."""

    def __init__(self, tokens: int, hidden: int, vocabulary: int) -> None:
        torch.manual_seed(0)
        self.x = torch.randn(tokens, hidden, device=DEVICE).bfloat16().requires_grad_()
        self.weight = (torch.randn(vocabulary, hidden, device=DEVICE) * hidden**-0.5).bfloat16()
        self.weight.requires_grad_()
        self.targets = torch.randint(0, vocabulary, (tokens,), device=DEVICE)
        self.main = WeightGradient(self.weight)
        self.functions: dict[str, Function] = {
            "ours": self.ours(),
            "eager": eager,
            "compiled": torch.compile(eager, dynamic=False),
        }
        if (other := liger()) is not None and DEVICE == "cuda":
            self.functions["liger"] = other

    def ours(self, chunk_bytes: int | None = None) -> Function:
        size = {} if chunk_bytes is None else {"chunk_bytes": chunk_bytes}
        return lambda x, weight, targets: op.in_chunks(x, weight, targets, self.main, **size)

    def forward(self, function: Function) -> Any:
        with torch.no_grad():
            return function(self.x, self.weight, self.targets)

    def both(self, function: Function, tokens: int | None = None) -> Tensor:
        self.x.grad = self.weight.grad = None
        self.main.clear()
        loss = function(self.x[:tokens], self.weight, self.targets[:tokens])
        loss.backward()
        return loss.detach()

    def errors(self, tokens: int) -> dict[str, list[float]]:
        """Relative errors of loss, dx and dw, ‖found - true‖ / ‖true‖."""
        x, weight = (t.detach().double().requires_grad_() for t in (self.x[:tokens], self.weight))
        wanted = cross_entropy(linear(x, weight), self.targets[:tokens])
        true = [wanted.detach(), *torch.autograd.grad(wanted, (x, weight))]
        found = {}
        for name, function in self.functions.items():
            loss = self.both(function, tokens)
            dw = self.main.total if name == "ours" else self.weight.grad
            mine = [loss, self.x.grad[:tokens], dw]
            found[name] = [
                float((one.double() - other).norm() / other.norm())
                for one, other in zip(mine, true, strict=True)
            ]
        return found

    def products(self) -> dict[str, Callable[[], Any]]:
        """The matrix products alone, each whole."""
        x, weight = self.x.detach(), self.weight.detach()
        logits = torch.mm(x, weight.t())

        def backward() -> None:
            torch.mm(x, weight.t(), out=logits)
            torch.mm(logits, weight)
            torch.mm(logits.t(), x)

        return {"forward": lambda: torch.mm(x, weight.t(), out=logits), "both": backward}


def peak_mib(call: Callable[[], Any]) -> int:
    """MiB that ``call`` holds at its peak beyond what was held before."""
    if DEVICE == "cpu":
        return 0
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    return (torch.cuda.max_memory_allocated() - before) >> 20


def bandwidth() -> float:
    """What the memory reaches, in bytes a second."""
    return 3.0e12 if DEVICE == "cuda" and "H100" in torch.cuda.get_device_name() else 4.3e12


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--grid", action="store_true", help="vary the size of a chunk")
    parser.add_argument("--rehearse", action="store_true", help="run it on the CPU: not a measurement")
    arguments = parser.parse_args()
    tokens, hidden, vocabulary, repeats = arguments.tokens, 4096, 128256, 10
    if arguments.rehearse:
        tokens, hidden, vocabulary, repeats = 64, 32, 1024, 2
    report: dict[str, Any] = {
        "device": machine.gpus(1),
        "versions": machine.versions() | machine.gpu_versions(),
        "date": machine.date(),
        "tokens": tokens,
        "hidden": hidden,
        "vocabularies": {},
    }

    def keep(line: str) -> None:
        print(line, flush=True)
        arguments.out.mkdir(parents=True, exist_ok=True)
        (arguments.out / "loss.json").write_text(json.dumps(report, indent=1) + "\n")

    for width in (vocabulary // 4, vocabulary):
        case = Case(tokens, hidden, width)
        found: dict[str, Any] = report["vocabularies"].setdefault(width, {})
        found["errors"] = case.errors(min(tokens, 512))
        keep(f"{width}: errors {found['errors']}")
        for way, run in (("forward", case.forward), ("both", case.both)):
            calls = {name: (lambda f=f, run=run: run(f)) for name, f in case.functions.items()}
            found[f"{way} peak MiB"] = {name: peak_mib(call) for name, call in calls.items()}
            times = race(calls | {"products": case.products()[way]}, repeats, SLEEP_CYCLES)
            moved = tokens * width * 2 / bandwidth() * 1e3 * (1 if way == "forward" else 3)
            times["floor"] = round(times["products"] + moved, 3)
            found[way] = times
            keep(f"{width} {way}: {times} peak MiB {found[f'{way} peak MiB']}")
        if arguments.grid:
            sizes = {f"{mib} MiB": case.ours(mib << 20) for mib in (256, 512, 1024, 2048, 4096)}
            calls = {name: (lambda f=f, case=case: case.both(f)) for name, f in sizes.items()}
            found["chunks"] = race(calls, repeats, SLEEP_CYCLES)
            keep(f"{width} chunks: {found['chunks']}")
        del case
        if DEVICE == "cuda":
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
