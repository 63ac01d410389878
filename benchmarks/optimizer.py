"""Norm, clipping, AdamW and rounded weights of a model of 1.2 B parameters: one launch each against PyTorch.

    python benchmarks/optimizer.py [--out benchmarks/results] [--rehearse]

The tensors of Llama-3.2-1B (hidden 2048, 16 layers, MLP width 8192, 8 KV heads of 64, tied embeddings): fp32
masters, moments and gradients, bf16 weights. ``torch`` is ``clip_grad_norm_`` (foreach),
``AdamW(fused=True)`` on the masters and one foreach copy to the weights. First masters and moments of three
steps against fp64, then medians of CUDA events in turn, and what the host needs to enqueue a step. ``floor``
has the fewest bytes, 34 a parameter: gradients read twice, masters and moments read and written, weights
written. ``--rehearse`` runs all of it on the CPU at toy sizes, there with torch's step on either side: not a
measurement. Writes ``optimizer.json``.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import machine
import torch
from gpu_time import DEVICE, race
from torch import Tensor

from flashtrain.kernels.adamw.op import optimizer
from flashtrain.kernels.adamw.slot import Hyperparameters, Slot

SLEEP_CYCLES = 20_000_000
RATE, BETAS, EPSILON, DECAY, CLIP = 3e-4, (0.9, 0.95), 1e-8, 0.1, 1.0


def shapes(hidden: int, layers: int, mlp: int, kv_width: int, vocabulary: int) -> list[tuple[int, ...]]:
    layer = [
        (hidden,), (hidden + 2 * kv_width, hidden), (hidden, hidden),
        (hidden,), (2 * mlp, hidden), (hidden, mlp),
    ]  # fmt: skip
    return [(vocabulary, hidden), *(size for _ in range(layers) for size in layer), (hidden,)]


class Ours:
    def __init__(self, weights: list[Tensor]) -> None:
        masters = [w.float() for w in weights]
        self.slots = [
            Slot(w, m, torch.zeros_like(m), torch.zeros_like(m), w.dim() > 1)
            for w, m in zip(weights, masters, strict=True)
        ]
        self.way, self.updates = optimizer(self.slots, 0), 0

    def step(self, gradients: list[Tensor]) -> None:
        self.updates += 1
        norm = self.way.squares(gradients).sum().sqrt()
        factor = torch.where(norm > CLIP, CLIP / norm, 1.0)
        values = Hyperparameters(
            rate=RATE, beta1=BETAS[0], beta2=BETAS[1], epsilon=EPSILON, decay=DECAY, update=self.updates
        )
        self.way.update(gradients, factor, norm <= 1e30, values)

    def state(self) -> list[Tensor]:
        return [t for slot in self.slots for t in (slot.master, slot.mean, slot.variance)]


class Torch:
    def __init__(self, weights: list[Tensor]) -> None:
        self.weights = weights
        self.masters = [torch.nn.Parameter(w.float()) for w in weights]
        groups = [
            {"params": [m for m in self.masters if m.dim() > 1], "weight_decay": DECAY},
            {"params": [m for m in self.masters if m.dim() <= 1], "weight_decay": 0.0},
        ]
        self.adamw = torch.optim.AdamW(groups, lr=RATE, betas=BETAS, eps=EPSILON, fused=True)

    def step(self, gradients: list[Tensor]) -> None:
        for master, gradient in zip(self.masters, gradients, strict=True):
            master.grad = gradient
        torch.nn.utils.clip_grad_norm_(self.masters, CLIP, foreach=True)
        self.adamw.step()
        with torch.no_grad():
            torch._foreach_copy_(self.weights, self.masters)

    def state(self) -> list[Tensor]:
        kept = self.adamw.state
        return [t for m in self.masters for t in (m.detach(), kept[m]["exp_avg"], kept[m]["exp_avg_sq"])]


def errors(sizes: list[tuple[int, ...]], steps: int = 3) -> dict[str, float]:
    """The worst relative error of a master or moment after some steps, on the first tensors."""
    torch.manual_seed(0)
    weights = [torch.randn(size, device=DEVICE).bfloat16() for size in sizes[1:5]]
    entrants = {"ours": Ours([w.clone() for w in weights]), "torch": Torch([w.clone() for w in weights])}
    true = [[w.double(), torch.zeros_like(w.double()), torch.zeros_like(w.double())] for w in weights]
    for step in range(1, steps + 1):
        gradients = [torch.randn_like(w.float()) for w in weights]
        for entrant in entrants.values():
            entrant.step([g.clone() for g in gradients])
        norm = torch.stack([g.double().square().sum() for g in gradients]).sum().sqrt()
        for (master, mean, variance), gradient in zip(true, gradients, strict=True):
            scaled = gradient.double() * min(1.0, CLIP / float(norm))
            master *= 1 - RATE * DECAY * (master.dim() > 1)
            mean.mul_(BETAS[0]).add_(scaled, alpha=1 - BETAS[0])
            variance.mul_(BETAS[1]).addcmul_(scaled, scaled, value=1 - BETAS[1])
            root = (variance / (1 - BETAS[1] ** step)).sqrt() + EPSILON
            master -= RATE * mean / (1 - BETAS[0] ** step) / root
    wanted = [t for three in true for t in three]
    return {
        name: max(
            float((one.double() - other).norm() / other.norm())
            for one, other in zip(entrant.state(), wanted, strict=True)
        )
        for name, entrant in entrants.items()
    }


def host_ms(call: Callable[[], Any], repeats: int = 10) -> float:
    """What the host needs to enqueue a call."""
    took = []
    for _ in range(repeats):
        if DEVICE == "cuda":
            torch.cuda.synchronize()
            torch.cuda._sleep(200_000_000)
        start = time.perf_counter()
        call()
        took.append((time.perf_counter() - start) * 1e3)
    return round(statistics.median(took), 3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--rehearse", action="store_true", help="run it on the CPU: not a measurement")
    arguments = parser.parse_args()
    sizes = shapes(64, 2, 128, 16, 512) if arguments.rehearse else shapes(2048, 16, 8192, 512, 128256)
    repeats = 3 if arguments.rehearse else 20
    report: dict[str, Any] = {
        "device": machine.gpus(1),
        "versions": machine.versions() | machine.gpu_versions(),
        "date": machine.date(),
        "errors": errors(sizes),
    }
    print(f"errors {report['errors']}", flush=True)
    torch.manual_seed(0)
    weights = [torch.randn(size, device=DEVICE).bfloat16() for size in sizes]
    count = sum(w.numel() for w in weights)
    gradients = [torch.randn(size, device=DEVICE) for size in sizes]
    entrants = {"ours": Ours(weights), "torch": Torch([w.clone() for w in weights])}
    calls = {name: (lambda e=e: e.step(gradients)) for name, e in entrants.items()}
    way = entrants["ours"].way
    report["parameters"] = count
    report["step ms"] = race(calls | {"norm alone": lambda: way.squares(gradients)}, repeats, SLEEP_CYCLES)
    bandwidth = 3.0e12 if DEVICE == "cuda" and "H100" in torch.cuda.get_device_name() else 4.3e12
    report["step ms"]["floor"] = round(34 * count / bandwidth * 1e3, 3)
    report["host ms"] = {name: host_ms(call) for name, call in calls.items()}
    print(f"{count / 1e9:.3f} B parameters: step {report['step ms']} host {report['host ms']}", flush=True)
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "optimizer.json").write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
