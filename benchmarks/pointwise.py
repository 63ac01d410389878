"""Norm, gate, positions and embedding of a Llama-8B: each kernel against PyTorch, torch.compile and Liger.

    python benchmarks/pointwise.py [--out benchmarks/results] [--grid] [--seconds 240] [--rehearse]

Hidden 4096, MLP width 14336, 32 query and 8 KV heads of 128, 16384 tokens, bf16, random data. First the error
of outputs and gradients against fp64, then medians of CUDA events, forward and forward with backward, the
contestants in turn (A B C A B C). ``floor`` has the fewest bytes at what the memory reaches (4.3 TB/s on an
H200, 3.0 on an H100). Liger takes part where ``liger_kernel`` can be imported, in the layout that it wants:
gate and up apart, and of the heads query and key alone, already apart and turned in place; so it moves fewer
bytes than its floor says. The embedding has 128,256 rows and tokens as frequent as words; ``embedding_sums``
adds its gradient to fp32 sums, whose errors tests bound. ``--grid`` adds each of our kernels in other
launches, ``--rehearse`` runs all of it on the CPU at toy sizes: not a measurement. Writes ``pointwise.json``
after each part.
"""

import argparse
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gpu_time
import machine
import torch
from pointwise_cases import DEVICE, EPSILON, GROUP, HEAD_WIDTH, HIDDEN, KV_HEADS, Case, Function, cases
from torch import Tensor

from flashtrain.nn.rotary import rotary_table

SLEEP_CYCLES = 6_000_000


def both(function: Function, inputs: list[Tensor], slopes: list[Tensor]) -> list[Tensor]:
    """Outputs and gradients of fresh leaves; a gradient that is added to a sum is none."""
    leaves = [t.detach().requires_grad_() for t in inputs]
    found = function(*leaves)
    outputs = found if isinstance(found, tuple) else (found,)
    gradients = torch.autograd.grad(outputs, leaves, slopes, allow_unused=True)
    return [*(y.detach() for y in outputs), *(g for g in gradients if g is not None)]


def begin(t: Tensor) -> Tensor:
    """The first 1024 tokens of activations ``[S, 1, D]`` or heads ``[1, heads, S, D]``; others whole."""
    return t[:1024] if t.dim() == 3 else t[:, :, :1024] if t.dim() == 4 else t


def errors(case: Case, compiled: Function) -> dict[str, float]:
    """The worst relative error ‖found - true‖ / ‖true‖ of outputs and gradients, on the first 1024 tokens."""
    inputs, slopes = [begin(t) for t in case.inputs], [begin(t) for t in case.slopes]
    true = both(case.wide, [t.double() for t in inputs], [t.double() for t in slopes])
    worst = {}
    for name, function in (("ours", case.ours), ("eager", case.eager), ("compiled", compiled)):
        found = both(function, inputs, slopes)
        # A gradient that is added to a sum is not among them.
        apart = [
            (one.double() - other).norm() / other.norm() for one, other in zip(found, true, strict=False)
        ]
        worst[name] = float(torch.stack(apart).max())
    return worst


def race(calls: dict[str, tuple[Function, Function]], repeats: int) -> dict[str, float]:
    """Median milliseconds of each ``(call, untimed preparation)``, in turn."""
    prepare = {name: preparation for name, (_, preparation) in calls.items()}
    return gpu_time.race({name: call for name, (call, _) in calls.items()}, repeats, SLEEP_CYCLES, prepare)


def without_gradient(function: Function, inputs: list[Tensor]) -> Any:
    with torch.no_grad():
        return function(*inputs)


def timings(case: Case, compiled: Function, repeats: int) -> dict[str, Any]:
    nothing: Function = lambda: None  # noqa: E731
    entrants = {
        name: (function, case.inputs, case.slopes, nothing)
        for name, function in (("ours", case.ours), ("eager", case.eager), ("compiled", compiled))
    }
    if case.liger is not None:
        other = case.liger
        entrants["liger"] = (other.function, other.inputs, other.slopes, other.restore)
    forward = {n: (lambda f=f, i=i: without_gradient(f, i), r) for n, (f, i, _, r) in entrants.items()}
    whole = {n: (lambda f=f, i=i, s=s: both(f, i, s), r) for n, (f, i, s, r) in entrants.items()}
    floors = [moved / bandwidth() * 1e3 for moved in case.moved]
    return {
        "forward": race(forward, repeats) | {"floor": round(floors[0], 4)},
        "both": race(whole, repeats) | {"floor": round(sum(floors), 4)},
    }


def bandwidth() -> float:
    """What the memory reaches, in bytes a second."""
    return 3.0e12 if DEVICE == "cuda" and "H100" in torch.cuda.get_device_name() else 4.3e12


def grid(case: Case) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Our kernels of ``case`` in other launches, those in use first."""
    if case.name in ("rms_norm", "add_rms_norm"):
        from flashtrain.kernels.rms_norm import triton as kernels

        added = case.inputs[1] if case.name == "add_rms_norm" else None
        straight = case.slopes[1] if added is not None else None
        (x, *_, weight), dy = case.inputs, case.slopes[0]
        one, other = (
            launch(HIDDEN, 2, added is not None)
            for launch in (kernels.forward_launch, kernels.backward_launch)
        )
        shapes = [(8, 4, 1), (8, 4, 2), (8, 5, 3), (8, 6, 2), (16, 2, 3), (16, 3, 2), (4, 6, 2), (4, 8, 3)]
        for launch in (one, *(kernels.Launch(*shape) for shape in shapes)):
            yield f"forward {launch}", lambda g=launch: kernels.forward(x, added, weight, EPSILON, g)
        shapes = [(8, 3, 1), (8, 3, 2), (8, 2, 3), (8, 2, 4), (8, 4, 2), (16, 1, 3), (16, 2, 2), (4, 4, 3)]
        for launch in (other, *(kernels.Launch(*shape) for shape in shapes)):
            yield f"backward {launch}", lambda g=launch: kernels.backward(dy, straight, x, weight, EPSILON, g)
    elif case.name.startswith("embedding"):
        from flashtrain.kernels.embedding import triton as tables

        (table,), (dy,) = case.inputs, case.slopes
        tokens = torch.randint(0, table.shape[0], (dy.shape[0],), device=DEVICE)
        total = torch.zeros_like(table, dtype=torch.float32)
        for size in ((2048, 4), (1024, 4), (4096, 8), (2048, 8)):
            yield f"forward {size}", lambda s=size: tables.forward(tokens, table, 0, table.shape[0], *s)
            for stages in (4, 3, 6):
                launch = (*size, stages)
                yield (
                    f"backward {launch}, other tokens",
                    lambda g=launch: tables.backward(dy, tokens, 0, total, True, *g),
                )
    elif case.name == "swiglu":
        from flashtrain.kernels.swiglu import triton as gates

        for size in ((32, 4), (16, 4), (8, 4), (64, 4), (64, 8), (16, 2), (32, 8)):
            yield f"forward {size}", lambda s=size: gates.forward(case.inputs[0], *s)
            yield f"backward {size}", lambda s=size: gates.backward(case.slopes[0], case.inputs[0], *s)
    else:
        from flashtrain.kernels.rotary import triton as turns

        packed, units = case.inputs[0], (KV_HEADS, GROUP, 1, 1)
        table = rotary_table(packed.shape[0], HEAD_WIDTH, 500_000.0, packed.device)
        for size in ((1024, 4), (512, 2), (512, 4), (1024, 2), (2048, 4), (2048, 8), (4096, 8)):
            yield f"forward {size}", lambda s=size: turns.forward(packed, table, *units, *s)
            yield f"backward {size}", lambda s=size: turns.backward(*case.slopes, table, KV_HEADS, *s)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--grid", action="store_true", help="time each of our kernels in other launches")
    parser.add_argument("--seconds", type=float, default=240.0, help="start no part after this long")
    parser.add_argument("--rehearse", action="store_true", help="run it on the CPU: not a measurement")
    arguments = parser.parse_args()
    end = time.monotonic() + arguments.seconds
    tokens, repeats = (64, 2) if arguments.rehearse else (16384, 50)
    torch.manual_seed(0)
    report: dict[str, Any] = {
        "device": machine.gpus(1),
        "versions": machine.versions() | machine.gpu_versions(),
        "date": machine.date(),
        "ops": {},
    }

    def keep(line: str) -> None:
        print(line, flush=True)
        arguments.out.mkdir(parents=True, exist_ok=True)
        (arguments.out / "pointwise.json").write_text(json.dumps(report, indent=1) + "\n")

    for case in cases(tokens):
        compiled = torch.compile(case.eager, dynamic=False)
        found = report["ops"][case.name] = {"errors": errors(case, compiled)}
        keep(f"{case.name}: errors " + " ".join(f"{n} {value:.1e}" for n, value in found["errors"].items()))
        found |= timings(case, compiled, repeats)
        for way in ("forward", "both"):
            keep(f"{case.name} {way}: " + " ".join(f"{n} {value:.4f}" for n, value in found[way].items()))
        if not arguments.grid or DEVICE == "cpu":
            continue
        found["grid"] = {}
        for name, call in grid(case):
            if time.monotonic() > end:
                keep("out of time")
                break
            try:
                found["grid"] |= race({name: (call, lambda: None)}, 20)
            except Exception as failure:  # a launch that does not fit is a result, too
                found["grid"][name] = str(failure).splitlines()[0][:100]
            keep(f"{case.name} {name}: {found['grid'][name]}")


if __name__ == "__main__":
    main()
