"""Is attention over pairs of heads right and fast on this GPU, and what does a training step gain?

    python benchmarks/pairing.py [--parts errors op step] [--pairings gqkva-8.4 ...] [--layers 22] [--batch 2]
        [--grid] [--out FOLDER]

``errors``: outputs and gradients against fp64, ‖found - true‖ / ‖true‖, and the same bits twice. ``op``:
the attention alone, causal, bf16, by each method of ``attend_pairs`` (kernel: ours, gradients in a fixed
order; expand: copies and cuDNN; mixed: our forward and cuDNN's backward pass over copies) and by torch's
kernels on heads that lie there copied ("given", what multi-head attention takes; "given queries": as many KV
heads as there are); TFLOP/s count 2 products forward and 5 backward, the causal half; medians of CUDA events,
A B C A B C. ``copies`` and ``sums`` are the milliseconds of the queries' copies and of their gradients' sum.
``--grid`` adds each kernel in each candidate
configuration. ``step``: forward, backward and AdamW with fp32 masters of LLaMA-1B (22 layers, hidden 2048, 32
heads of 64, MLP 5632, vocabulary 32000) on random tokens, 4096 a sequence, one model at a time in three
interleaved rounds: tokens per second of each pairing and method over multi-head attention's. ``predicted`` is
the time model: products at 650, attention at 600 forward and 440 backward TFLOP/s, nothing else. Writes
``pairing.json`` after each part.
"""

import argparse
import gc
import json
import math
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import machine
import torch
import torch.distributed as dist
import triton
from gpu_time import error, kernel_ms, medians, poisoned
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from flashtrain.kernels.pairing_attention import reference
from flashtrain.kernels.pairing_attention import triton as kernels
from flashtrain.kernels.pairing_attention.config import Config, Tiles, config_of
from flashtrain.models.decoder import Decoder
from flashtrain.nn import attend as attend_settings
from flashtrain.nn import attention as attention_module
from flashtrain.nn.attend import Heads
from flashtrain.nn.attention_kernels import cudnn
from flashtrain.nn.copied_heads import copied, summed
from flashtrain.nn.paired_attention import Method, attend_pairs
from flashtrain.nn.pairing import Pairing
from flashtrain.parallel import mesh
from flashtrain.train.optimizer import AdamW

# heads, width of a head, pairing, batch, sequence
SHAPES = (
    (32, 64, "gqkva-8.4", 4, 4096),
    (32, 64, "gqkva-16.2", 4, 4096),
    (32, 64, "gkva-8", 4, 4096),
    (32, 64, "gqkva-8.4", 1, 16384),
    (16, 128, "gqkva-4.4", 4, 4096),
    (16, 128, "gqkva-4.4", 1, 16384),
)
MODEL = Decoder.Config(vocabulary=32000, hidden=2048, layers=22, heads=32, kv_heads=32, mlp_width=5632)


# Variants of the step: pairing and method. Multi-head is the decoder without a pairing.
class Variant(NamedTuple):
    """A model of the step: its pairing (None: multi-head), the method, and the order of gradients."""

    pairing: str | None = None
    method: Method | None = None
    fixed_order: bool = False


STEPS = {
    "mha": Variant(),
    "mha in a fixed order": Variant(fixed_order=True),
    "gqkva-8.4 kernel": Variant("gqkva-8.4", "kernel", fixed_order=True),
    "gqkva-8.4 expand": Variant("gqkva-8.4", "expand"),
    "gqkva-8.4 mixed": Variant("gqkva-8.4", "mixed"),
    "mqa": Variant("mqa"),
    "gkva-8 expand": Variant("gkva-8", "expand"),
    "gkva-8 mixed": Variant("gkva-8", "mixed"),
    "gqkva-16.2 expand": Variant("gqkva-16.2", "expand"),
    "gqkva-16.2 mixed": Variant("gqkva-16.2", "mixed"),
}
BACKENDS = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}


def heads_of(
    pairing: Pairing, width: int, batch: int, sequence: int, dtype: torch.dtype = torch.bfloat16
) -> list[Tensor]:
    """Query, key and value as a layer has them behind the rotation: dense, with the sequence first."""
    counts = pairing.n_q, pairing.n_kv, pairing.n_kv
    dense = [torch.randn(sequence, batch, n, width, device="cuda").to(dtype) for n in counts]
    return [x.permute(1, 2, 0, 3) for x in dense]


def errors(
    heads: int, width: int, name: str, sequence: int, dtype: torch.dtype, causal: bool
) -> dict[str, float]:
    """Relative errors of outputs and gradients, and whether a second run has other bits."""
    pairing = Pairing.named(name, heads)
    maps = pairing.query_of, pairing.key_of
    given = heads_of(pairing, width, 2, sequence, dtype)
    wide = [x.double().requires_grad_() for x in given]
    out, logsumexp = reference.pairing_attention(*wide, *maps, causal)
    slope = torch.randn_like(out)
    true = [out.detach(), logsumexp.detach(), *torch.autograd.grad(out, wide, slope.to(dtype).double())]
    with poisoned():
        rounds = []
        for _ in range(2):
            found = kernels.forward(*given, *maps, causal)
            gradients = kernels.backward(slope.to(dtype), None, *found, *given, *maps, causal)
            rounds.append([*found, *gradients])
    names = ("out", "logsumexp", "dq", "dk", "dv")
    result = {key: error(one, other) for key, one, other in zip(names, rounds[0], true, strict=True)}
    return result | {"bits_differ": float(not all(map(torch.equal, *rounds)))}


def op_calls(pairing: Pairing, given: list[Tensor], slope: Tensor) -> dict[str, Callable[[], Any]]:
    """Forward, and forward with backward, of every way to compute these pairs."""
    wanted = pairing.query_of, pairing.key_of, pairing.key_of
    copies = [copied(x.detach(), own).requires_grad_() for x, own in zip(given, wanted, strict=True)]

    def by(method: Method, *heads: Tensor) -> Tensor:
        return attend_pairs(Heads(*heads), pairing, True, method)

    def stock(backend: SDPBackend, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return scaled_dot_product_attention(query, key, value, is_causal=True)

    methods: tuple[Method, ...] = ("kernel", "expand", "mixed")
    ways: dict[str, tuple[Callable[..., Tensor], list[Tensor]]] = {
        method: (partial(by, method), given) for method in methods
    }
    for name, backend in BACKENDS.items():
        ways[f"{name} given"] = partial(stock, backend), copies
    if pairing.groups_keys:
        ways["cudnn given queries"] = cudnn, [copies[0], *given[1:]]

    def forward(way: Callable[..., Tensor], inputs: list[Tensor]) -> None:
        with torch.no_grad():
            way(*inputs)

    def both(way: Callable[..., Tensor], inputs: list[Tensor]) -> None:
        torch.autograd.grad(way(*inputs), inputs, slope)

    calls: dict[str, Callable[[], Any]] = {}
    for name, (way, inputs) in ways.items():
        try:
            both(way, inputs)
        except RuntimeError as failure:
            print(f"{name}: {str(failure).splitlines()[0][:90]}", flush=True)
            continue
        calls[f"{name} forward"] = partial(forward, way, inputs)
        calls[f"{name} both"] = partial(both, way, inputs)
    query = given[0].detach()
    calls["copies"] = partial(copied, query, pairing.query_of)
    calls["sums"] = partial(summed, slope, pairing.query_of, pairing.n_q)
    return calls


def op_row(heads: int, width: int, name: str, batch: int, sequence: int) -> dict[str, Any]:
    """Milliseconds and TFLOP/s of each way at one shape."""
    pairing = Pairing.named(name, heads)
    given = [x.requires_grad_() for x in heads_of(pairing, width, batch, sequence)]
    slope = torch.randn(sequence, batch, heads, width, device="cuda").bfloat16().permute(1, 2, 0, 3)
    took = medians(op_calls(pairing, given, slope))
    forward = 2.0 * sequence**2 * width * heads * batch
    rates = {}
    for way in (key.removesuffix(" both") for key in took if key.endswith(" both")):
        backward = took[f"{way} both"] - took[f"{way} forward"]
        rates[way] = {
            "forward": forward / took[f"{way} forward"] / 1e9,
            "backward": 2.5 * forward / backward / 1e9,
        }
    return {"ms": took, "tflops": rates}


def candidates(width: int) -> Iterator[Config]:
    """Configurations of the grid, the one in use first; the kernels of a configuration are timed apart."""
    used = config_of(torch.bfloat16, width)
    yield used
    forward = [
        (128, 128, 8, 2),
        (128, 128, 8, 3),
        (128, 64, 8, 3),
        (128, 64, 4, 3),
        (64, 128, 4, 2),
        (64, 64, 4, 3),
    ]
    backward = [
        (128, 64, 8, 2),
        (128, 64, 8, 3),
        (128, 32, 8, 3),
        (128, 128, 8, 2),
        (128, 128, 8, 3),
        (64, 64, 4, 3),
    ]
    for one, two in zip(forward, backward, strict=True):
        yield Config(Tiles(*one), Tiles(*two))


def grid_row(config: Config, width: int) -> dict[str, float]:
    """Milliseconds of each kernel at hidden size 2048, 4 sequences of 4096."""
    pairing = Pairing.named("gqkva-8.4" if width == 64 else "gqkva-4.4", 2048 // width)
    maps = pairing.query_of, pairing.key_of
    given = heads_of(pairing, width, 4, 4096)
    saved = kernels.forward(*given, *maps, True)
    calls = {
        "forward": partial(kernels.forward, *given, *maps, True, config),
        "backward": partial(kernels.backward, saved[0], None, *saved, *given, *maps, True, config),
    }
    found: dict[str, float] = {}
    for part, call in calls.items():
        try:
            took = kernel_ms(call, repeats=4)
        except (triton.runtime.errors.OutOfResources, RuntimeError) as failure:
            print(f"{part} {getattr(config, part)}: {str(failure)[:80]}", flush=True)
            continue
        wanted = {"forward": ("attention_kernel", "attention_hopper"), "backward": "attention_gradient"}[part]
        found[f"{part} {getattr(config, part)}"] = sum(
            ms for key, ms in took.items() if key.startswith(wanted)
        )
    return found


def predicted_ns(config: Decoder.Config, sequence: int) -> float:
    """Nanoseconds a token by the time model, without what is neither a product nor attention."""
    pairing = config.pairs() or Pairing.named("mha", config.heads)
    rows = (pairing.n_q + 2 * pairing.n_kv + config.heads) * config.head_dim + 3 * config.mlp_width
    weights = config.layers * rows * config.hidden + config.vocabulary * config.hidden
    meeting = config.layers * 2.0 * sequence * config.hidden
    return 6e9 * weights / 650e12 + 1e9 * meeting / 600e12 + 2.5e9 * meeting / 440e12


def step_seconds(config: Decoder.Config, variant: Variant, batch: int, steps: int) -> tuple[float, float]:
    """Median seconds of a step of a fresh model, and GiB at the peak."""
    attend_settings.configure(attend_settings.Settings(deterministic=variant.fixed_order))
    attention_module.attend_pairs = partial(attend_pairs, method=variant.method)  # type: ignore[assignment]
    torch.manual_seed(0)
    torch.cuda.reset_peak_memory_stats()
    with torch.device("cuda"):
        model = Decoder(config, torch.Generator("cuda").manual_seed(0)).bfloat16()
    optimizer = AdamW(model, mesh.build(mesh.Degrees(), "cpu"), AdamW.Config())
    tokens = torch.randint(0, config.vocabulary, (2, 4096, batch), device="cuda")
    times = []
    for step in range(1, steps + 3):
        torch.cuda.synchronize()
        start = time.perf_counter()
        model(*tokens).backward()
        optimizer.accumulate()
        norm = optimizer.step(1e-4, step)
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
        assert math.isfinite(norm)
    return statistics.median(times[2:]), torch.cuda.max_memory_allocated() / 2**30


def step_rows(
    pairings: list[str], layers: int, batch: int, rounds: int, steps: int, end: float
) -> dict[str, Any]:
    """Tokens per second of each variant, and ratios to multi-head attention in the same round."""
    variants = {name: one for name, one in STEPS.items() if one.pairing in (None, *pairings)}
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    peaks: dict[str, float] = {}
    configs = {name: replace(MODEL, layers=layers, pairing=one.pairing) for name, one in variants.items()}
    for number in range(rounds):
        if time.monotonic() > end:
            print("out of time", flush=True)
            break
        for name, variant in variants.items():
            took, peaks[name] = step_seconds(configs[name], variant, batch, steps)
            gc.collect()
            torch.cuda.empty_cache()
            seconds[name].append(took)
            print(f"round {number} {name}: {took * 1e3:.1f} ms, {peaks[name]:.1f} GiB", flush=True)
    found = {}
    for name, config in configs.items():
        with torch.device("meta"):
            flops = Decoder(config).flops_per_token(4096)
        ratios = [one / other for one, other in zip(seconds["mha"], seconds[name], strict=False)]
        middle = statistics.median(seconds[name])
        found[name] = {
            "ms": [value * 1e3 for value in seconds[name]],
            "tokens_per_second": batch * 4096 / middle,
            "mfu_of_989": batch * 4096 / middle * flops / 989e12,
            "ratio": statistics.median(ratios),
            "ratios": ratios,
            "predicted": predicted_ns(configs["mha"], 4096) / predicted_ns(config, 4096),
            "gib": peaks[name],
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument(
        "--parts", nargs="+", default=["errors", "op", "step"], choices=["errors", "op", "step"]
    )
    parser.add_argument(
        "--grid", action="store_true", help="time each kernel in each candidate configuration"
    )
    known = list(dict.fromkeys(one.pairing for one in STEPS.values() if one.pairing))
    parser.add_argument("--pairings", nargs="+", default=known, choices=known, help="of the step")
    parser.add_argument("--layers", type=int, default=22, help="of the model of the step")
    parser.add_argument("--batch", type=int, default=2, help="sequences of a micro-batch of the step")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=5, help="timed steps of a model in a round")
    parser.add_argument("--seconds", type=float, default=170.0, help="start no round after this long")
    arguments = parser.parse_args()
    attend_settings.configure(attend_settings.Settings(deterministic=False))  # the fastest there is
    end = time.monotonic() + arguments.seconds
    torch.manual_seed(0)
    report: dict[str, Any] = {
        "device": torch.cuda.get_device_name(),
        "versions": machine.versions() | machine.gpu_versions(),
        "date": machine.date(),
    }

    def keep(line: str) -> None:
        print(line, flush=True)
        arguments.out.mkdir(parents=True, exist_ok=True)
        (arguments.out / "pairing.json").write_text(json.dumps(report, indent=1) + "\n")

    if "errors" in arguments.parts:
        report["errors"] = {}
        for case in (
            (32, 64, "gqkva-8.4", 1000, torch.bfloat16, True),
            (16, 128, "gqkva-4.4", 777, torch.bfloat16, True),
            (6, 64, "gqkva-3.2", 197, torch.bfloat16, False),
            (8, 64, "mkva", 300, torch.float16, True),
            (8, 96, "gkva-2", 300, torch.bfloat16, True),
        ):
            found = report["errors"][str(case)] = errors(*case)
            keep(f"{case}: " + " ".join(f"{name} {value:.1e}" for name, value in found.items()))
    if "op" in arguments.parts:
        report["op"] = {}
        for shape in SHAPES:
            found = report["op"][str(shape)] = op_row(*shape)
            rates = {way: [round(v) for v in one.values()] for way, one in found["tflops"].items()}
            keep(f"{shape}: TFLOP/s forward, backward {rates}")
    if arguments.grid:
        report["grid"] = {}
        for width in (64, 128):
            for config in candidates(width):
                found = grid_row(config, width)
                report["grid"] |= {f"{width} {key}": value for key, value in found.items()}
                keep(f"{width}: " + ", ".join(f"{key} {value:.3f}" for key, value in found.items()))
    if "step" in arguments.parts:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        report["step"] = {"layers": arguments.layers, "batch": arguments.batch, "sequence": 4096}
        report["step"]["variants"] = step_rows(
            arguments.pairings,
            arguments.layers,
            arguments.batch,
            arguments.rounds,
            arguments.steps,
            end,
        )
        for name, found in report["step"]["variants"].items():
            keep(
                f"{name}: {found['tokens_per_second']:.0f} tokens/s, MFU {found['mfu_of_989']:.3f}, over MHA "
                f"{found['ratio']:.3f}, predicted {found['predicted']:.3f}"
            )
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
