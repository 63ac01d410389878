"""What do layers that share queries and keys, or keys and values, gain on this GPU?

    python benchmarks/sharing.py [--parts errors op step] [--layers 22] [--seconds 160]

``errors``: outputs and all gradients of a region by the kernels against fp64. ``op``: attention of 12
layers alone, forward and backward: every layer with its own queries and keys (cuDNN), a region whose
layers form all their gradients (cuDNN), a region whose gradients are formed once (ours), with the rate
of the operations that each executes. ``step``: forward, backward and update (torch's fused AdamW, bf16)
of LLaMA-1B (22 layers, d 2048, 32 x 64 heads, ff 5632, vocabulary 32000) at 4096 and 32768 tokens:
plain, EPAS in the later half layer by layer and with gradients formed once, KV sharing of 25, 50 and 95
% of the layers. Interleaved rounds, a fresh model each time; ``ratio`` is the median of baseline over
variant within a round, ``bound`` the ratio of the operations. ``largest`` repeats 4096 tokens with the
micro-batch that each variant can hold. Writes ``sharing.json`` after each part.
"""

import argparse
import gc
import json
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")

import machine
import torch
from gpu_time import error, kernel_ms, medians
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from flashtrain.kernels.shared_attention import reference
from flashtrain.kernels.shared_attention import triton as kernels
from flashtrain.models.decoder import Decoder
from flashtrain.nn import attend as attend_settings
from flashtrain.nn.attend import Heads, attend
from flashtrain.nn.region import Deferred, LayerByLayer
from flashtrain.nn.sharing import Sharing

SHARING = 11  # layers that share in the op, beside their source
MODEL = Decoder.Config(vocabulary=32_000, hidden=2048, layers=22, heads=32, kv_heads=32, mlp_width=5632)
GOALS = {"epas": 1.05, "epas deferred": {4096: 1.08, 32768: 1.12}}
PEAK = 989e12


def heads(batch: int, kv_heads: int, sequence: int, width: int, layers: int) -> list[Tensor]:
    """Query, key, the values of ``layers`` layers and the gradients of their outputs."""
    kinds = [32, kv_heads, *([kv_heads] * layers), *([32] * layers)]
    return [
        torch.randn(sequence, batch, count, width, device="cuda").bfloat16().permute(1, 2, 0, 3)
        for count in kinds
    ]


def errors(kv_heads: int, width: int, sequence: int) -> dict[str, float]:
    """Relative errors of the kernels with two layers that share, and whether a second run has other bits."""
    query, key, *rest = heads(1, kv_heads, sequence, width, 3)
    wide = [t.double() for t in (query, key)]

    def passes(at: ModuleType, query: Tensor, key: Tensor, rest: list[Tensor]) -> dict[str, Tensor]:
        values, slopes = rest[:3], rest[3:]
        _, lse = at.attend(query, key, values[0])
        outputs = [at.attend(query, key, value)[0] for value in values]
        kept, total = torch.stack(slopes, dim=3), None
        for number, (slope, out) in enumerate(zip(slopes, outputs, strict=True)):
            total = at.take_slope(slope, out, total, kept[:, :, :, number])
        dq, dk = at.score_gradients(query, key, lse, total, kept, torch.stack(values, dim=3))
        dv = at.value_gradient(query, key, lse, slopes[1])
        return {"o": outputs[0], "lse": lse, "dv": dv, "dq": dq, "dk": dk}

    true = passes(reference, *wide, [t.double() for t in rest])
    rounds = [list(passes(kernels, query, key, rest).values()) for _ in range(2)]
    result = {name: error(one, other) for one, (name, other) in zip(rounds[0], true.items(), strict=True)}
    return result | {"bits_differ": float(not all(map(torch.equal, *rounds)))}


def op_row(batch: int, kv_heads: int, sequence: int, width: int, rounds: int) -> dict[str, Any]:
    """Forward, and forward with backward, of 12 layers in each way; TFLOP/s of the operations executed."""
    layers = SHARING + 1
    query, key, *rest = heads(batch, kv_heads, sequence, width, layers)
    values, slopes = rest[:layers], rest[layers:]
    leaves = [t.requires_grad_() for t in (query, key, *values)]

    def alone() -> list[Tensor]:
        return [attend(Heads(query, key, value)) for value in values]

    def naive() -> list[Tensor]:
        region = LayerByLayer("QK", follow=True)
        return [region.open(Heads(query, key, values[0])), *(region.join(value) for value in values[1:])]

    def deferred() -> list[Tensor]:
        region = Deferred(follow=True)
        return [region.open(Heads(query, key, values[0])), *(region.join(value) for value in values[1:])]

    def both(forward: Callable[[], list[Tensor]]) -> Any:
        return torch.autograd.grad(forward(), leaves, slopes)

    ways = {"own heads": alone, "layer by layer": naive, "deferred": deferred}
    calls: dict[str, Callable[[], Any]] = {f"{name}, both": partial(both, way) for name, way in ways.items()}
    calls |= {f"{name}, forward": way for name, way in ways.items()}
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        found = medians(calls, rounds)
    product = float(batch * 32 * width) * sequence * sequence  # operations of one causal product of all heads
    products = {
        name: (2 * layers, 2 * layers + (3 * SHARING + 6 if "deferred" in name else 5 * layers))
        for name in ways
    }
    rates = {
        f"{name}, {part}": products[name][index] * product / found[f"{name}, {part}"] / 1e9
        for name in ways
        for index, part in enumerate(("forward", "both"))
    }
    return {
        "ms": found,
        "tflops": rates,
        "gain over layer by layer": found["layer by layer, both"] / found["deferred, both"],
        "kernels": kernel_ms(calls["deferred, both"], repeats=2),
    }


def variants(layers: int) -> dict[str, Sharing | None]:
    """What each variant of the step shares."""
    found: dict[str, Sharing | None] = {
        "baseline": None,
        "epas": Sharing(deferred=False),
        "epas deferred": Sharing(deferred=True),
    }
    for percent in (25, 50, 95):
        count = min(layers - 1, max(1, round(layers * percent / 100 - 0.01)))
        found[f"kv {percent} %"] = Sharing(share="KV", targets=tuple(range(layers - count, layers)))
    return found


def bound(config: Decoder.Config, sharing: Sharing | None, sequence: int) -> float:
    """Operations that the hardware executes for a token, of the baseline over the variant."""

    def operations(shared: int, rows: int, saved: int) -> float:
        weights = config.layers * (4 * config.hidden + 3 * config.mlp_width) * config.hidden
        weights += config.vocabulary * config.hidden - shared * rows * config.hidden
        product = 1.0 * sequence * config.hidden  # of a token with half of the keys, in one layer
        return 6.0 * weights + (7 * config.layers - saved) * product

    if sharing is None:
        return 1.0
    shared = len(sharing.targets_of(config.layers))
    saved = 2 * shared if sharing.deferred else 0
    return operations(0, 0, 0) / operations(shared, 2 * config.hidden, saved)


def step_seconds(config: Decoder.Config, batch: int, sequence: int, steps: int) -> tuple[float, float, float]:
    """Median seconds of a step of a fresh model, GiB at the peak, and the last loss."""
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    torch.manual_seed(0)
    with torch.device("cuda"):
        model = Decoder(config, torch.Generator("cuda").manual_seed(0)).bfloat16()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    tokens, targets = torch.randint(0, config.vocabulary, (2, sequence, batch), device="cuda")
    times = []
    for _ in range(steps + 1):
        events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        events[0].record()
        loss = model(tokens, targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        events[1].record()
        torch.cuda.synchronize()
        times.append(events[0].elapsed_time(events[1]) / 1e3)
    return statistics.median(times[1:]), torch.cuda.max_memory_allocated() / 2**30, float(loss.detach())


def largest(config: Decoder.Config, sequence: int) -> int:
    """The micro-batch that fills 92 % of this GPU's memory, told from two small ones."""
    total = torch.cuda.get_device_properties(0).total_memory / 2**30
    one, two = (step_seconds(config, batch, sequence, 1)[1] for batch in (1, 2))
    return max(1, int((0.92 * total - (2 * one - two)) / (two - one)))


def step_rows(
    layers: int, sequence: int, batches: dict[str, int], rounds: int, steps: int, end: float
) -> dict[str, Any]:
    """Tokens per second of each variant, and ratios to the baseline in the same round."""
    base = replace(MODEL, layers=layers)
    ways = variants(layers)
    rows: dict[str, dict[str, list[float]]] = {name: {"rate": [], "gib": [], "loss": []} for name in ways}
    for number in range(rounds):
        for name, sharing in ways.items():
            if time.monotonic() > end:
                print("out of time", flush=True)
                break
            try:
                took, gib, loss = step_seconds(replace(base, sharing=sharing), batches[name], sequence, steps)
            except torch.cuda.OutOfMemoryError:
                print(f"{sequence} {name}: out of memory with {batches[name]} sequences", flush=True)
                continue
            rate = batches[name] * sequence / took
            for key, value in (("rate", rate), ("gib", gib), ("loss", loss)):
                rows[name][key].append(value)
            print(
                f"{sequence} round {number} {name}: {rate:.0f} tokens/s, {gib:.1f} GiB, {loss:.3f}",
                flush=True,
            )
    found = {}
    for name, sharing in ways.items():
        row = rows[name]
        if not row["rate"] or not rows["baseline"]["rate"]:
            continue
        with torch.device("meta"):
            flops = Decoder(replace(base, sharing=sharing)).flops_per_token(sequence)
        ratios = [own / plain for own, plain in zip(row["rate"], rows["baseline"]["rate"], strict=False)]
        goal = GOALS.get(name)
        found[name] = {
            "batch": batches[name],
            "tokens_per_second": statistics.median(row["rate"]),
            "mfu_of_989": statistics.median(row["rate"]) * flops / PEAK,
            "ratio": statistics.median(ratios),
            "ratios": ratios,
            "bound": bound(base, sharing, sequence),
            "goal": goal.get(sequence) if isinstance(goal, dict) else goal,
            "gib": row["gib"][-1],
            "loss": row["loss"][-1],
        }
        print(
            f"{sequence} {name}: x{found[name]['ratio']:.3f} (bound {found[name]['bound']:.3f})", flush=True
        )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--parts", nargs="+", default=["errors", "op", "step"])
    parser.add_argument("--layers", type=int, default=MODEL.layers)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=160.0, help="start nothing after this long")
    arguments = parser.parse_args()
    attend_settings.configure(attend_settings.Settings(deterministic=False))  # the fastest there is
    end = time.monotonic() + arguments.seconds
    torch.manual_seed(0)
    report: dict[str, Any] = {
        "device": machine.gpus(1),
        "versions": machine.versions() | machine.gpu_versions(),
        "date": machine.date(),
        "layers": arguments.layers,
    }

    def keep(key: str, value: Any) -> None:
        report[key] = value
        arguments.out.mkdir(parents=True, exist_ok=True)
        (arguments.out / "sharing.json").write_text(json.dumps(report, indent=1) + "\n")

    if "errors" in arguments.parts:
        found = {}
        for case in ((32, 64, 1024), (4, 64, 1000), (32, 128, 777)):
            found[str(case)] = errors(*case)
            keep("errors", found)
            print(case, {name: f"{value:.1e}" for name, value in found[str(case)].items()}, flush=True)
    if "op" in arguments.parts:
        found = {}
        for case in ((4, 32, 4096, 64), (4, 4, 4096, 64), (1, 32, 32768, 64), (2, 32, 4096, 128)):
            if time.monotonic() < end:
                found[str(case)] = op_row(*case, rounds=2 if case[2] > 8192 else 5)
                keep("op", found)
                print(case, json.dumps(found[str(case)], indent=1), flush=True)
            gc.collect()
            torch.cuda.empty_cache()
    if "step" in arguments.parts:
        layers, rounds = arguments.layers, arguments.rounds
        names = variants(layers)
        for sequence, batch, steps in ((4096, 4, 3), (32768, 1, 1)):
            fixed = dict.fromkeys(names, batch)
            keep(f"step {sequence}", step_rows(layers, sequence, fixed, rounds, steps, end))
        if time.monotonic() < end:
            base = replace(MODEL, layers=layers)
            batches = {name: largest(replace(base, sharing=way), 4096) for name, way in names.items()}
            keep("step 4096 largest", step_rows(layers, 4096, batches, 1, 2, end))


if __name__ == "__main__":
    main()
