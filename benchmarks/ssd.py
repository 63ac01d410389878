"""Is the SSD recurrence right and fast on this GPU? Forward, backward and the kernels beside it.

    python benchmarks/ssd.py [--out benchmarks/results] [--grid] [--seconds 100]

First every output and every gradient, for every configuration that is timed, against fp64 on the same
inputs: relative error ‖found - true‖ / ‖true‖. Then medians of CUDA events over calls at H 64, P 64, N 128,
one group, bf16, on random data larger than the cache. Where mamba_ssm is importable, its Triton path runs in
turns with ours, at each of its chunk sizes. ``--grid`` adds the time of each kernel in each candidate
configuration. ``floor`` has the fewest bytes at 4.3 TB/s and the operations at 700 TFLOP/s, as
milliseconds. Writes ``ssd.json`` after each part, so that a run that is cut short keeps what it has.
"""

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import machine
import torch
import triton
from gpu_time import error, kernel_ms, poisoned
from torch import Tensor

from flashtrain.kernels.causal_conv.op import causal_conv
from flashtrain.kernels.gated_norm.op import gated_norm
from flashtrain.kernels.ssd import reference
from flashtrain.kernels.ssd import triton as kernels
from flashtrain.kernels.ssd.config import Backward, Forward, Scan, backward_config, forward_config
from flashtrain.kernels.ssd.op import ssd

HEADS, WIDTH, STATES = 64, 64, 128
SHAPES = ((2, 8192), (1, 32768), (8, 2048))
THEIR_CHUNKS = (128, 256)
ROUNDS = 3
SLEEP_CYCLES = 12_000_000
BANDWIDTH, RATE = 4.3e12, 700e12
NAMES = ("x", "dt", "A", "B", "C", "D", "dt_bias", "initial_state")


def candidates() -> Iterator[Forward | Backward]:
    """Configurations of the grid, those in use first; kernels of a configuration are timed one by one."""
    yield forward_config(torch.bfloat16)
    yield backward_config(torch.bfloat16)
    scan = Scan(chunk=128, columns=64, warps=4, stages=3)
    yield Forward(scan, heads=32, warps=8, stages=3)
    yield Forward(replace(scan, columns=128, stages=2), heads=16, warps=8, stages=4)
    yield Forward(replace(scan, columns=128, warps=8), heads=16, warps=8, stages=2)
    yield Forward(replace(scan, chunk=64, columns=128), heads=32, warps=4, stages=3)
    scan = Scan(chunk=64, columns=128, warps=4, stages=3)
    sizes = {"heads": 16, "warps": 4, "stages": 2, "group_warps": 4, "group_stages": 3}
    yield Backward(replace(scan, columns=64), **sizes | {"heads": 32, "stages": 3})
    yield Backward(replace(scan, stages=2), **sizes | {"stages": 1, "heads": 32, "group_warps": 8})
    yield Backward(replace(scan, stages=4), **sizes | {"heads": 8, "group_stages": 2})
    yield Backward(replace(scan, chunk=128, stages=2), **sizes | {"warps": 8, "group_warps": 8})


def inputs(batch: int, sequence: int, groups: int = 1, dtype: torch.dtype = torch.bfloat16) -> list[Tensor]:
    """Arguments of ``ssd`` in the order of ``NAMES``, on the scale of a Mamba-2 layer at its start."""

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, device="cuda")

    x = random(batch, sequence, HEADS, WIDTH).to(dtype)
    keys, queries = (random(batch, sequence, groups, STATES).to(dtype) for _ in range(2))
    rate = -torch.empty(HEADS, device="cuda").uniform_(1, 16)
    bias = torch.empty(HEADS, device="cuda").uniform_(math.log(1e-3), math.log(1e-1)).exp().expm1().log()
    dt = random(batch, sequence, HEADS).to(dtype)
    state = random(batch, HEADS, WIDTH, STATES)
    return [x, dt, rate, keys, queries, random(HEADS), bias, state]


class Truth:
    """Outputs and gradients in fp64 of one set of inputs."""

    def __init__(self, given: list[Tensor]) -> None:
        self.given = given
        wide = [t.double().requires_grad_() for t in given]
        outputs = reference.chunked(*wide)
        self.dy, self.d_final = torch.randn_like(given[0]), torch.randn_like(given[7])
        self.y, self.final = (t.detach() for t in outputs)
        self.gradients = torch.autograd.grad(outputs, wide, (self.dy.double(), self.d_final.double()))

    def of_forward(self, config: Forward | None = None) -> dict[str, float]:
        with poisoned():
            y, final = kernels.forward(*self.given, config=config)
        return {"y": error(y, self.y), "final_state": error(final, self.final)}

    def of_backward(self, config: Backward | None = None) -> dict[str, float]:
        with poisoned():
            found = kernels.backward(self.dy, self.d_final, *self.given, config=config)
            again = kernels.backward(self.dy, self.d_final, *self.given, config=config)
        same = all(torch.equal(one, other) for one, other in zip(found, again, strict=True))
        errors = {f"d{name}": error(g, t) for name, g, t in zip(NAMES, found, self.gradients, strict=True)}
        return errors | {"bits_differ": float(not same)}


def median_ms(call: Callable[[], Any], seconds: float = 0.3) -> float:
    """Median over calls, each between two events, on a queue that is never empty."""
    for _ in range(3):
        call()
    torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    torch.cuda.synchronize()
    count = max(10, min(40, int(seconds / (time.perf_counter() - start))))
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(count)]
    for before, after in events:
        torch.cuda._sleep(SLEEP_CYCLES)  # the host enqueues the whole call meanwhile
        before.record()
        call()
        after.record()
    torch.cuda.synchronize()
    return statistics.median(before.elapsed_time(after) for before, after in events)


def host_ms(call: Callable[[], Any], repeats: int = 20) -> float:
    """What the host needs to enqueue a call: where the GPU needs less, this is what one waits for."""
    call()
    torch.cuda.synchronize()
    torch.cuda._sleep(1_000_000_000)
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    took = (time.perf_counter() - start) / repeats * 1e3
    torch.cuda.synchronize()
    return took


def floor_ms(batch: int, sequence: int, chunk: int) -> dict[str, float]:
    """Fewest bytes of a forward (x, y, B, C, dt once), and its operations, as times."""
    tokens, inner = batch * sequence, HEADS * WIDTH
    moved = tokens * (2 * inner + 2 * STATES + HEADS) * 2
    operations = tokens * (2 * chunk * STATES + 2 * chunk * inner + 4 * STATES * inner)
    return {"bytes": moved / BANDWIDTH * 1e3, "operations": operations / RATE * 1e3}


def layer_calls(batch: int, sequence: int) -> dict[str, Callable[[], Any]]:
    """The two kernels beside the recurrence in a Mamba-2 layer of hidden size 2048."""
    inner = HEADS * WIDTH
    mixed = torch.randn(batch, sequence, inner + 2 * STATES, device="cuda", dtype=torch.bfloat16)
    weight = torch.randn(mixed.shape[2], 4, device="cuda")
    bias, norm = torch.randn(mixed.shape[2], device="cuda"), torch.randn(inner, device="cuda")
    y, z = (torch.randn(batch, sequence, inner, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    for tensor in (mixed, weight, bias, y, z, norm):
        tensor.requires_grad_()
    slopes = torch.randn_like(mixed), torch.randn_like(y)

    def both(make: Callable[[], Tensor], slope: Tensor, of: list[Tensor]) -> Callable[[], Any]:
        return lambda: torch.autograd.grad(make(), of, slope)

    def conv() -> Tensor:
        return causal_conv(mixed, weight, bias)[0]

    def norming() -> Tensor:
        return gated_norm(y, z, norm)

    return {
        "conv forward": conv,
        "conv forward + backward": both(conv, slopes[0], [mixed, weight, bias]),
        "norm forward": norming,
        "norm forward + backward": both(norming, slopes[1], [y, z, norm]),
    }


def peers() -> dict[str, Callable[..., Tensor]]:
    """The recurrences to compare: ours, and mamba_ssm's at each chunk size where it is importable."""

    def ours(*given: Tensor) -> Tensor:
        *first, bias = given
        return ssd(*first, dt_bias=bias)[0]

    try:
        from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined
    except ImportError as failure:
        print(f"without mamba_ssm: {failure}", flush=True)
        return {"flashtrain": ours}

    def theirs(chunk: int, *given: Tensor) -> Tensor:
        *first, skip, bias = given
        return mamba_chunk_scan_combined(*first, chunk, D=skip, dt_bias=bias, dt_softplus=True)

    return {"flashtrain": ours} | {f"mamba_ssm {chunk}": partial(theirs, chunk) for chunk in THEIR_CHUNKS}


def timings(batch: int, sequence: int) -> dict[str, Any]:
    given = inputs(batch, sequence)[:7]
    for tensor in given:
        tensor.requires_grad_()
    slope = torch.randn_like(given[0])

    def forward(of: Callable[..., Tensor]) -> Tensor:
        with torch.no_grad():
            return of(*given)

    def both(of: Callable[..., Tensor]) -> Any:
        return torch.autograd.grad(of(*given), given, slope)

    found: dict[str, Any] = {}
    contestants = peers()
    for part, run in (("forward", forward), ("both", both)):
        rounds = [
            {name: median_ms(partial(run, of)) for name, of in contestants.items()} for _ in range(ROUNDS)
        ]
        found[part] = {name: statistics.median(took[name] for took in rounds) for name in contestants}
        others = [took for name, took in found[part].items() if name != "flashtrain"]
        found[part]["faster"] = min(others) / found[part]["flashtrain"] if others else None
    ours = contestants["flashtrain"]
    found["host"] = {"forward": host_ms(partial(forward, ours)), "both": host_ms(partial(both, ours))}
    found["floor"] = {str(chunk): floor_ms(batch, sequence, chunk) for chunk in (64, 128, 256)}
    found["kernels"] = kernel_ms(partial(both, ours))
    return found


def grid_row(
    config: Forward | Backward, truth: Truth, large: list[Tensor], slope: Tensor
) -> tuple[dict[str, float], dict[str, float]]:
    """Errors and milliseconds of each kernel of one configuration."""
    if isinstance(config, Forward):
        return truth.of_forward(config), kernel_ms(lambda: kernels.forward(*large, config=config))
    return truth.of_backward(config), kernel_ms(lambda: kernels.backward(slope, None, *large, config=config))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument(
        "--grid", action="store_true", help="time each kernel in each candidate configuration"
    )
    parser.add_argument("--seconds", type=float, default=100.0, help="start no part after this long")
    arguments = parser.parse_args()
    end = time.monotonic() + arguments.seconds
    torch.manual_seed(0)
    report: dict[str, Any] = {
        "device": torch.cuda.get_device_name(),
        "versions": machine.versions() | {"triton": triton.__version__},
        "date": machine.date(),
    }
    lines: list[str] = []

    def keep(line: str) -> None:
        lines.append(line)
        print(line, flush=True)
        arguments.out.mkdir(parents=True, exist_ok=True)
        (arguments.out / "ssd.json").write_text(json.dumps(report, indent=1) + "\n")

    report["errors"] = {}
    cases = [(2, 1000, 1, dtype) for dtype in (torch.bfloat16, torch.float16, torch.float32)]
    for case in [*cases, (1, 777, 4, torch.bfloat16), (1, 8192, 1, torch.bfloat16)]:
        truth = Truth(inputs(*case))
        errors = truth.of_forward() | truth.of_backward()
        report["errors"][str(case)] = errors
        keep(f"{case}: " + " ".join(f"{name} {value:.1e}" for name, value in errors.items()))
    report["shapes"] = {}
    for shape in SHAPES:
        found = report["shapes"][str(shape)] = timings(*shape)
        keep(
            f"{shape}: forward {found['forward']} both {found['both']} ms, host {found['host']} | "
            f"{found['kernels']}"
        )
    calls = layer_calls(2, 8192)
    report["layer"] = {
        name: {"median": median_ms(call), "kernels": kernel_ms(call)} for name, call in calls.items()
    }
    for name, found in report["layer"].items():
        keep(f"{name} {found['median']:.3f} ms {found['kernels']}")
    if arguments.grid:
        report["grid"] = []
        truth, large = Truth(inputs(1, 600)), inputs(2, 8192)
        slope = torch.randn_like(large[0])
        for config in candidates():
            if time.monotonic() > end:
                keep("out of time")
                break
            try:
                errors, took = grid_row(config, truth, large, slope)
            except (triton.runtime.errors.OutOfResources, RuntimeError) as failure:
                keep(f"{config}: {str(failure)[:100]}")
                continue
            report["grid"].append({"config": str(config), "errors": errors, "kernels": took})
            worst = max(errors.values()) if not any(map(math.isnan, errors.values())) else math.nan
            keep(f"{config} worst error {worst:.1e} {took}")


if __name__ == "__main__":
    main()
