"""Which attention backend is the fastest on this GPU, and what do deterministic gradients cost?

    python benchmarks/attention.py [--parts backends passes] [--before FOLDER] [--out benchmarks/results]

backends: for heads of Llama 3 8B and 70B as one rank has them, bf16, causal and with documents: milliseconds
and TFLOP/s of the forward pass, and of forward and backward, of every backend that takes them, with gradients
in any order and in a fixed one. Ways take turns in every round; medians over rounds, random data, the GPU
ahead of the host. FLOPs are those of the causal half: 2 S² d a head forward, 2.5 times as many backward.
``bits`` says whether the gradients of ten passes were the same.

passes: our forward and backward pass alone beside cuDNN's: ``ours`` in the configuration in use, on Hopper by
partitions of warps, ``portable`` the other kernels, backward with several tiles; and the backward pass that
does not wait for turns, which is wrong in its order alone, so that the difference is what the order costs.
``error`` is that of the worst gradient against fp64 at 1000 tokens; ``bits`` as above. ``kernels`` are
milliseconds of each kernel of the configuration in use. --before: a folder with an older
``kernels/pairing_attention``, measured in turn. Writes ``attention.json``.
"""

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from importlib import import_module
from pathlib import Path
from typing import Any

import machine
import torch
import triton
from gpu_time import error, kernel_ms
from torch import Tensor

from flashtrain.kernels.pairing_attention import reference
from flashtrain.kernels.pairing_attention import triton as kernels
from flashtrain.kernels.pairing_attention.config import Tiles, config_of
from flashtrain.nn import attend
from flashtrain.nn.attend import Documents, Heads
from flashtrain.nn.pairing import Pairing

# Batch, query heads, KV heads, sequence, width: 8B on 4, 2 and 1 ranks, 70B on 8 and 4, Llama 3.2 1B on 2.
SHAPES = (
    (2, 8, 2, 8192, 128),
    (1, 16, 4, 8192, 128),
    (1, 32, 8, 8192, 128),
    (1, 8, 1, 8192, 128),
    (2, 16, 2, 8192, 128),
    (2, 16, 4, 8192, 64),
)
BACKENDS = ("cudnn", "fa", "flash", "triton", "efficient")
# Batch, sequence, width, heads, pairing.
PASSES = (
    (2, 8192, 128, 8, "gqa-2"),
    (2, 8192, 128, 16, "gqa-4"),
    (4, 4096, 64, 32, "gqkva-8.4"),
    (4, 4096, 64, 32, "mha"),
    (4, 4096, 128, 16, "mha"),
    (1, 32768, 128, 8, "gqa-2"),
)
TILES = {
    64: ((128, 128, 8, 3), (128, 128, 8, 2), (128, 64, 8, 3), (64, 64, 4, 3)),
    128: ((128, 64, 8, 3), (128, 64, 8, 2), (128, 32, 8, 3), (128, 32, 8, 4)),
}
PORTABLE = {64: Tiles(128, 64, 8, 3), 128: Tiles(128, 128, 8, 2)}  # forward
SLEEP_CYCLES = 4_000_000
REPEATS = 4


def heads_of(shape: tuple[int, ...]) -> tuple[Heads, Tensor]:
    """Heads as a projection of [S, B, hidden] lays them out, and a gradient from above."""
    batch, queries, kv, sequence, width = shape

    def one(count: int) -> Tensor:
        made = torch.randn(sequence, batch, count, width, device="cuda", dtype=torch.bfloat16)
        return made.permute(1, 2, 0, 3).requires_grad_()

    return Heads(one(queries), one(kv), one(kv)), one(queries).detach()


def documents_of(shape: tuple[int, ...]) -> Documents:
    """Documents of 512 to 2048 tokens, the same mix in every sequence."""
    batch, sequence = shape[0], shape[3]
    cuts = [row * sequence + c for row in range(batch) for c in range(0, sequence, 1024)]
    cuts = [cut + 512 * (number % 2) * (cut % sequence > 0) for number, cut in enumerate(cuts)]
    bounds = torch.tensor([*cuts, batch * sequence], dtype=torch.int32)
    return Documents(bounds.cuda(), int(bounds.diff().max()))


def burst_ms(call: Callable[[], Any]) -> float:
    """Milliseconds of a call among several that the host has issued ahead."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(SLEEP_CYCLES)
    begin.record()
    for _ in range(REPEATS):
        call()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / REPEATS


def repeats_bits(both: Callable[[], tuple[Tensor, ...]]) -> bool:
    first = both()
    return all(torch.equal(mine, other) for _ in range(9) for mine, other in zip(both(), first, strict=True))


def measure(shape: tuple[int, ...], rounds: int, packed: bool) -> list[dict[str, Any]]:
    heads, upstream = heads_of(shape)
    documents = documents_of(shape) if packed else None
    ways: dict[tuple[str, bool], tuple[Callable[[], Any], Callable[[], Any]]] = {}
    for name in BACKENDS:
        for fixed in (False, True):
            if attend.why_not(name, heads, packed, fixed) is not None:
                continue

            def forward(name: str = name, fixed: bool = fixed) -> Tensor:
                return attend.run(name, heads, documents, fixed)

            def both(name: str = name, fixed: bool = fixed) -> tuple[Tensor, ...]:
                return torch.autograd.grad(attend.run(name, heads, documents, fixed), heads, upstream)

            ways[name, fixed] = forward, both
    bits = {key: repeats_bits(both) for key, (_, both) in ways.items()}
    taken: dict[tuple[str, bool], list[tuple[float, float]]] = {key: [] for key in ways}
    for _ in range(rounds):
        for key, (forward, both) in ways.items():
            taken[key].append((burst_ms(forward), burst_ms(both)))
    batch, queries, _, sequence, width = shape
    lengths = [sequence] * batch if documents is None else documents.bounds.diff().tolist()
    operations = sum(2.0 * queries * length**2 * width for length in lengths)
    rows = []
    for (name, fixed), times in taken.items():
        forward_ms, both_ms = (statistics.median(side) for side in zip(*times, strict=True))
        rows.append(
            {
                "shape": shape,
                "documents": packed,
                "backend": name,
                "deterministic": fixed,
                "bits": bits[name, fixed],
                "forward_ms": forward_ms,
                "both_ms": both_ms,
                "forward_tflops": operations / forward_ms / 1e9,
                "both_tflops": 3.5 * operations / both_ms / 1e9,
            }
        )
        print(json.dumps(rows[-1]), flush=True)
    return rows


def older(folder: Path) -> Any:
    """The launches of an older version of the kernels that lie under ``folder``."""
    place = Path(tempfile.mkdtemp())
    for file in (folder / "kernels" / "pairing_attention").glob("*.py"):
        text = file.read_text().replace("flashtrain.kernels.pairing_attention", "pairing_before")
        (place / "pairing_before").mkdir(exist_ok=True)
        (place / "pairing_before" / file.name).write_text(text)
    sys.path.insert(0, str(place))
    return import_module("pairing_before.triton")


MAPS_OF = kernels.maps_of


@cache
def no_turns(*arguments: Any) -> Any:
    """``maps_of`` with the first turn for every visit: nobody waits."""
    maps = MAPS_OF(*arguments)
    visits = maps.visits.clone()
    visits[arguments[1] + 1 :] &= (1 << 32) - 1
    return maps._replace(visits=visits)


def passes(shape: tuple[Any, ...], rounds: int, before: Any) -> dict[str, Any]:
    """Milliseconds and TFLOP/s of each pass at one shape."""
    batch, sequence, width, count, name = shape
    pairing = Pairing.named(name, count)
    maps = pairing.query_of, pairing.key_of

    def heads(tokens: int) -> tuple[list[Tensor], Tensor]:
        made = [
            torch.randn(tokens, batch, n, width, device="cuda", dtype=torch.bfloat16).permute(1, 2, 0, 3)
            for n in (pairing.n_q, pairing.n_kv, pairing.n_kv, count)
        ]
        return made[:3], made[3]

    small, slope = heads(1000)
    wide = [x.double().requires_grad_() for x in small]
    true = torch.autograd.grad(reference.pairing_attention(*wide, *maps)[0], wide, slope.double())
    out, sums = kernels.forward(*small, *maps, True)

    given, upstream = heads(sequence)
    used = config_of(torch.bfloat16, width)
    portable = replace(used, forward=PORTABLE[width], partitioned=False)
    forward: dict[str, Callable[[], Any]] = {
        "ours": partial(kernels.forward, *given, *maps, True),
        "portable": partial(kernels.forward, *given, *maps, True, portable),
    }
    backward: dict[str, Callable[[], Any]] = {}
    facts: dict[str, Any] = {"error": {}, "bits": {}}
    saved = kernels.forward(*given, *maps, True)
    configs = {"ours": used}
    for numbers in TILES[width]:
        configs[f"portable {numbers}"] = replace(used, backward=Tiles(*numbers), partitioned=False)
    for label, config in configs.items():
        call = partial(kernels.backward, upstream, None, *saved, *given, *maps, True, config)
        try:
            found = kernels.backward(slope, None, out, sums, *small, *maps, True, config)
            facts["error"][label] = max(map(error, found, true))
            facts["bits"][label] = repeats_bits(call)
        except (triton.runtime.errors.OutOfResources, RuntimeError) as failure:
            print(f"{label}: {str(failure).splitlines()[0][:90]}", flush=True)
            continue
        backward[label] = call

    def unordered() -> None:
        kernels.maps_of = no_turns
        kernels.backward(upstream, None, *saved, *given, *maps, True)
        kernels.maps_of = MAPS_OF

    backward["ours, no turns"] = unordered
    most = max(map(pairing.key_of.count, range(pairing.n_kv)))
    split = kernels.splits_of

    def divided(splits: int) -> None:
        kernels.splits_of = lambda *_: splits
        kernels.backward(upstream, None, *saved, *given, *maps, True)
        kernels.splits_of = split

    for splits in (2, 4):
        if splits <= most:
            backward[f"ours, {splits} splits"] = partial(divided, splits)
    if before is not None:
        forward["before"] = partial(before.forward, *given, *maps, True)
        backward["before"] = partial(before.backward, upstream, None, *saved, *given, *maps, True)
    stock = given  # with a copy for each pair where heads of it are no groups
    if not pairing.is_grouped:
        owners = pairing.query_of, pairing.key_of, pairing.key_of
        stock = [x[:, list(own)] for x, own in zip(given, owners, strict=True)]
    leaves = [x.detach().requires_grad_() for x in stock]
    forward["cudnn"] = partial(attend.run, "cudnn", Heads(*leaves), None, False)
    out = attend.run("cudnn", Heads(*leaves), None, False)
    backward["cudnn"] = partial(torch.autograd.grad, out, leaves, upstream, retain_graph=True)
    if pairing.is_grouped:
        mine = kernels.backward(upstream, None, *saved, *given, *maps, True)
        facts["from cudnn"] = [
            error(one, other) for one, other in zip(mine, backward["cudnn"](), strict=True)
        ]
    calls = {f"forward {key}": call for key, call in forward.items()}
    calls |= {f"backward {key}": call for key, call in backward.items()}
    for call in calls.values():
        call()
    taken: dict[str, list[float]] = {key: [] for key in calls}
    for _ in range(rounds):
        for key, call in calls.items():
            taken[key].append(burst_ms(call))
    operations = 2.0 * batch * count * sequence**2 * width
    ms = {key: statistics.median(times) for key, times in taken.items()}
    facts["kernels"] = kernel_ms(partial(kernels.backward, upstream, None, *saved, *given, *maps, True), 4)
    facts |= {"shape": shape, "ms": ms}
    facts["tflops"] = {
        key: operations * (2.5 if key.startswith("backward") else 1.0) / value / 1e9
        for key, value in ms.items()
    }
    print(f"\n{shape}", flush=True)
    for key, value in ms.items():
        label = key.removeprefix("backward ")
        checked = ""
        if label in facts["error"]:
            checked = f"error {facts['error'][label]:.1e}, bits {facts['bits'][label]}"
        print(f"  {key:32} {value:7.3f} ms {facts['tflops'][key]:6.0f} TFLOP/s  {checked}", flush=True)
    print(f"  kernels {facts['kernels']}\n  from cudnn {facts.get('from cudnn')}", flush=True)
    return facts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="folder to write")
    parser.add_argument("--rounds", type=int, default=7, help="rounds of all ways in turn")
    parser.add_argument("--parts", nargs="+", default=["backends", "passes"], choices=["backends", "passes"])
    parser.add_argument("--before", type=Path, help="folder with an older kernels/pairing_attention")
    args = parser.parse_args()
    torch.manual_seed(0)
    facts = {"gpus": machine.gpus(1), **machine.versions(), **machine.gpu_versions(), "date": machine.date()}
    report: dict[str, Any] = {"machine": facts}
    args.out.mkdir(parents=True, exist_ok=True)

    def keep(part: str, found: list[dict[str, Any]]) -> None:
        report[part] = report.get(part, []) + found
        (args.out / "attention.json").write_text(json.dumps(report, indent=1) + "\n")

    if "passes" in args.parts:
        before = None if args.before is None else older(args.before)
        for shape in PASSES:
            keep("passes", [passes(shape, args.rounds, before)])
    if "backends" in args.parts:
        for heads in SHAPES:
            for packed in (False, True):
                keep("rows", measure(heads, args.rounds, packed))


if __name__ == "__main__":
    main()
