"""Which attention backend is the fastest on this GPU, and what do deterministic gradients cost?

    python benchmarks/attention.py [--out benchmarks/results] [--rounds 7]

For heads of Llama 3 8B and 70B as one rank has them, bf16, causal and with documents: milliseconds and
TFLOP/s of the forward pass, and of forward and backward, of every backend that takes them, with gradients
in any order and in a fixed one. Ways take turns in every round; medians over rounds, random data, the GPU
ahead of the host. FLOPs are those of the causal half: 2 S² d a head forward, 2.5 times as many backward.
``bits`` says whether the gradients of ten passes were the same. Writes ``attention.json``.
"""

import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import machine
import torch
from torch import Tensor

from flashtrain.nn import attend
from flashtrain.nn.attend import Documents, Heads

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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="folder to write")
    parser.add_argument("--rounds", type=int, default=7, help="rounds of all ways in turn")
    args = parser.parse_args()
    torch.manual_seed(0)
    rows = [
        row for shape in SHAPES for packed in (False, True) for row in measure(shape, args.rounds, packed)
    ]
    facts = {"gpus": machine.gpus(1), **machine.versions(), **machine.gpu_versions(), "date": machine.date()}
    (args.out / "attention.json").write_text(json.dumps({"machine": facts, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
