"""Does FlowHN's split give the speed that its FLOPs promise, and which loss at equal tokens?

    python benchmarks/flowhn.py [--out benchmarks/results] [--sizes 135M 350M 1B] [--repeats 3] [--rehearse]
    python benchmarks/flowhn.py --loss [--tokens 8000000] [--strategies none circulating alternating fixed]

Speed: a training step (forward, backward, update of fp32 masters) of 64 sequences of 1024 random tokens in
bf16 on one GPU, circulating windows against both branches on all tokens, at the sizes of arXiv 2505.19472
with Mamba-2. Both models are in memory; repetitions take turns (A B B A A B), the median of each counts.
``ratio`` is tokens/s of circulating over those of none, ``flops`` the same of the counted FLOPs (causal
attention), ``share`` one over the other: the claim is at least 0.95. ``published`` are the paper's ratio and
the one that the FLOPs of its own block promise. ``blocks`` is forward and backward of the blocks alone, with
no embedding, head, loss and update: there the bytes of the loss over 65,536 tokens do not weigh.

Loss: held-out nats per byte of models that differ in the strategy alone, on the standard library's sources,
same draws and same order of samples. ``--rehearse`` runs either on any machine at toy sizes: no measurement.
Writes ``flowhn.json`` or ``flowhn-loss.json`` after each part.
"""

import argparse
import json
import statistics
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

import machine
import torch
from torch import Tensor

from flashtrain.data import Corpus, open_source
from flashtrain.metrics import peak_flops
from flashtrain.models.decoder import Decoder
from flashtrain.nn import attend as attend_settings
from flashtrain.nn.flops import forward_flops
from flashtrain.nn.flowhn import FlowHN
from flashtrain.nn.ssm import Mamba2
from flashtrain.nn.windows import Strategy
from flashtrain.parallel import mesh
from flashtrain.parallel.data import Sharding
from flashtrain.train import ranks
from flashtrain.train.build import build_model, build_step
from flashtrain.train.optimizer import AdamW
from flashtrain.train.settings import Training
from flashtrain.train.skips import SkipRule
from flashtrain.train.step import TrainStep

ENOUGH = 0.95


@dataclass(frozen=True)
class Size:
    """A model without its strategy, how a step is cut, and the paper's ratio and that of its FLOPs."""

    model: Decoder.Config
    micro: int  # sequences that go through the model at once
    accumulate: int
    steps: int  # of a repetition
    published: tuple[float, float] | None = None


def paper(hidden: int, width: int, blocks: int) -> Decoder.Config:
    """A model of the paper's shape; 32 query and 8 KV heads whatever the size."""
    return Decoder.Config(
        vocabulary=65536, hidden=hidden, layers=blocks, heads=32, kv_heads=8, mlp_width=width
    )


SIZES = {
    "135M": Size(paper(768, 2048, 2), 64, 1, 6, (1.302, 1.268)),
    "350M": Size(paper(1024, 4096, 6), 64, 1, 3, (1.675, 1.640)),
    "1B": Size(paper(2048, 8192, 6), 32, 2, 2, (1.833, 1.757)),
}
TOY = Size(replace(paper(128, 128, 3), vocabulary=256, heads=4, kv_heads=2), 2, 2, 1)
SMALL = Decoder.Config(hidden=512, layers=6, heads=8, kv_heads=2, mlp_width=1408)


def trained(
    config: Decoder.Config, layout: FlowHN.Config, train: Training, device: torch.device
) -> tuple[Decoder, float, TrainStep]:
    """A model on ``device``, its FLOPs a token, and the step that trains it."""
    ranks_of = mesh.build(mesh.Degrees(), device.type)
    built = build_model(replace(config, layout=layout), train, Sharding(), ranks_of, device)
    optimizer = AdamW.Config(learning_rate=1e-3, warmup=max(1, train.steps // 10))
    with tempfile.TemporaryDirectory() as out:
        step = build_step(built.model, ranks_of, optimizer, SkipRule.Config(above=0), (), Path(out))
    return built.model, built.flops_per_token, step


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def speed(
    size: Size, sequence: int, layout: FlowHN.Config, repeats: int, device: torch.device
) -> dict[str, Any]:
    """Throughput of both strategies, interleaved."""
    train = Training(steps=10, dtype="bfloat16", batch=size.micro * size.accumulate, sequence=sequence)
    draw = torch.Generator(device).manual_seed(0)
    shape = (sequence + 1, size.micro)
    drawn = [
        torch.randint(size.model.vocabulary, shape, generator=draw, device=device)
        for _ in range(size.accumulate)
    ]
    batches = [(tokens[:-1].contiguous(), tokens[1:].contiguous()) for tokens in drawn]
    made = {
        name: trained(size.model, replace(layout, strategy=name), train, device)  # type: ignore[arg-type]
        for name in ("none", "circulating")
    }
    number = 0

    def seconds(name: str, steps: int) -> float:
        nonlocal number
        wait(device)
        start = time.perf_counter()
        for _ in range(steps):
            number += 1
            made[name][2](number, 1e-5, batches)
        wait(device)
        return (time.perf_counter() - start) / steps

    x = torch.randn(sequence, size.micro, size.model.hidden, device=device, dtype=torch.bfloat16)
    slope = torch.randn_like(x)

    def blocks(name: str, steps: int) -> float:
        model, _, step = made[name]
        rotary = model._rotary(batches[0][0])
        wait(device)
        start = time.perf_counter()
        for _ in range(steps * size.accumulate):
            y = x
            for layer in model.layers:
                y = layer(y, rotary)
            y.backward(slope)
        wait(device)
        took = (time.perf_counter() - start) / steps
        step.optimizer.accumulate()
        step.optimizer.step(0.0, 1, limit=-1.0)  # no update: it forgets these gradients
        return took

    for name in made:
        seconds(name, 2)  # compiles, and fills the allocator's cache
        blocks(name, 1)
    taken: dict[str, list[float]] = {name: [] for name in made}
    alone: dict[str, list[float]] = {name: [] for name in made}
    for repeat in range(repeats):
        for name in sorted(made, reverse=bool(repeat % 2)):
            taken[name].append(seconds(name, size.steps))
            alone[name].append(blocks(name, size.steps))
    tokens = sequence * size.micro * size.accumulate
    peak = peak_flops(torch.cuda.get_device_name(), torch.bfloat16) if device.type == "cuda" else None
    found: dict[str, Any] = {}
    for name, (model, flops, _) in made.items():
        middle = statistics.median(taken[name])
        found[name] = {
            "step_ms": [round(value * 1e3, 3) for value in taken[name]],
            "blocks_ms": [round(value * 1e3, 3) for value in alone[name]],
            "tokens_per_s": round(tokens / middle, 1),
            "mflops_per_token_forward": round(flops / 3e6, 2),
            "mfu": None if peak is None else round(flops * tokens / middle / peak, 4),
            "parameters": model.parameter_count(),
            "windows": [layer.window(sequence) for layer in model.layers],  # type: ignore[operator]
        }
    none, split = found["none"], found["circulating"]
    ratio = split["tokens_per_s"] / none["tokens_per_s"]
    flops_ratio = made["none"][1] / made["circulating"][1]
    found |= {"ratio": ratio, "flops": flops_ratio, "share": ratio / flops_ratio, "published": size.published}
    counts = {name: sum(forward_flops(layer, sequence) for layer in made[name][0].layers) for name in made}
    ratio_of_blocks = statistics.median(alone["none"]) / statistics.median(alone["circulating"])
    flops_of_blocks = counts["none"] / counts["circulating"]
    found["blocks"] = {"ratio": ratio_of_blocks, "flops": flops_of_blocks}
    found["blocks"]["share"] = ratio_of_blocks / flops_of_blocks
    return found | {"enough": ratio / flops_ratio >= ENOUGH}


def held_out_loss(model: Decoder, windows: tuple[Tensor, Tensor], device: torch.device) -> float:
    """Mean loss over windows ``[count, sequence]``, eight at a time."""
    with torch.no_grad():
        pairs = zip(*(half.split(8) for half in windows), strict=True)
        losses = [
            (float(model(x.t().contiguous().to(device), y.t().contiguous().to(device))), x.shape[0])
            for x, y in pairs
        ]
    return sum(loss * count for loss, count in losses) / sum(count for _, count in losses)


def loss_after(
    layout: FlowHN.Config, config: Decoder.Config, train: Training, device: torch.device
) -> dict[str, Any]:
    """Train one model from the same draws as every other, and its held-out loss."""
    source = open_source(Corpus.Config())
    samples = source.samples(train.sequence, train.seed)
    held_out = source.held_out(train.sequence, train.evaluation_windows)
    model, flops, step = trained(config, layout, train, device)
    schedule, start, last = step.optimizer.config, time.perf_counter(), []
    for number in range(1, train.steps + 1):
        inputs, targets = samples.batch((number - 1) * train.batch, train.batch)
        batch = (inputs.t().contiguous().to(device), targets.t().contiguous().to(device))
        last.append(step(number, schedule.learning_rate_at(number, train.steps), [batch]).loss)
    return {
        "held_out": round(held_out_loss(model, (held_out.inputs, held_out.targets), device), 4),
        "train": round(statistics.mean(last[-20:]), 4),
        "seconds": round(time.perf_counter() - start, 1),
        "tokens": train.steps * train.batch * train.sequence,
        "mflops_per_token_forward": round(flops / 3e6, 2),
    }


def losses(args: argparse.Namespace, report: dict[str, Any], device: torch.device, path: Path) -> None:
    """Held-out loss of each strategy, and their order."""
    sequence, batch = (64, 4) if args.rehearse else (1024, 16)
    config = replace(TOY.model, layers=3) if args.rehearse else SMALL
    train = Training(
        steps=max(1, args.tokens // (sequence * batch)),
        dtype="bfloat16",
        batch=batch,
        sequence=sequence,
        evaluation_windows=64,
    )
    ssm = Mamba2.Config(head_dim=16, states=16) if args.rehearse else Mamba2.Config(states=64)
    layout = FlowHN.Config(ssm=ssm, align=16 if args.rehearse else 128)
    report["strategies"] = {}
    for strategy in args.strategies:
        found = report["strategies"][strategy] = loss_after(
            replace(layout, strategy=strategy), config, train, device
        )
        report["order"] = sorted(
            report["strategies"], key=lambda name: report["strategies"][name]["held_out"]
        )
        keep(path, report, f"{strategy}: {found}")
    print("from the lowest held-out loss: " + " < ".join(report["order"]))


def speeds(args: argparse.Namespace, report: dict[str, Any], device: torch.device, path: Path) -> None:
    """Throughput ratios of all sizes."""
    report["sizes"] = {}
    for name in args.sizes:
        size, sequence, layout = SIZES[name], 1024, FlowHN.Config()
        if args.rehearse:
            ssm = Mamba2.Config(head_dim=16, states=16)
            size, sequence, layout = TOY, 64, FlowHN.Config(ssm=ssm, align=16)
        found = report["sizes"][name] = speed(size, sequence, layout, args.repeats, device)
        if device.type == "cuda":
            found["memory_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 1)
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        none, split, blocks = (found[part] for part in ("none", "circulating", "blocks"))
        keep(
            path,
            report,
            f"{name}: {none['tokens_per_s']} -> {split['tokens_per_s']} tokens/s, MFU {none['mfu']} -> "
            f"{split['mfu']}; ratio {found['ratio']:.3f} of {found['flops']:.3f} by FLOPs: "
            f"share {found['share']:.3f}, {'enough' if found['enough'] else 'NOT ENOUGH'}; blocks alone "
            f"{blocks['ratio']:.3f} of {blocks['flops']:.3f}: {blocks['share']:.3f}",
        )


def keep(path: Path, report: dict[str, Any], line: str) -> None:
    print(line, flush=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--sizes", nargs="+", choices=list(SIZES), default=list(SIZES))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--loss", action="store_true", help="loss at equal tokens instead of speed")
    parser.add_argument("--tokens", type=int, default=8_000_000, help="tokens of each model with --loss")
    parser.add_argument("--strategies", nargs="+", choices=get_args(Strategy),
                        default=["none", "circulating", "alternating", "fixed"])  # fmt: skip
    parser.add_argument("--rehearse", action="store_true", help="toy sizes on any machine: no measurement")
    args = parser.parse_args()
    attend_settings.configure(attend_settings.Settings(deterministic=False))  # the fastest there is
    with ranks.joined(timeout=600) as device:
        report: dict[str, Any] = {"device": machine.gpus(1) or "cpu", "rehearsal": args.rehearse}
        report |= {"versions": machine.versions() | machine.gpu_versions(), "date": machine.date()}
        (losses if args.loss else speeds)(
            args, report, device, args.out / ("flowhn-loss.json" if args.loss else "flowhn.json")
        )


if __name__ == "__main__":
    main()
