"""Do FlowHN's branches, on a GPU each, take equally long, and what does the second GPU bring?

    python -m torch.distributed.run --nproc-per-node 2 benchmarks/flowhn_branches.py
        [--out benchmarks/results] [--sizes 135M 350M 1B] [--shares auto 0.5] [--sequence 4096]
        [--repeats 3] [--rehearse]

A training step (forward, backward, update of fp32 masters) of 65,536 random tokens in bf16, circulating
windows, at the sizes of ``flowhn.py``, with ``parallel.branches`` 2 and attention's share of the tokens as in
``--shares``; with ``auto`` both branches have the same FLOPs. ``one`` is ``auto`` on one GPU; both GPUs
run it at once, each for itself. All models are in memory and repetitions take turns; the slower rank counts,
then the median. ``blocks_ms`` is forward and backward of the blocks alone, with what they exchange;
``branch_ms`` that of one branch on its GPU, with no exchange and nothing common. ``difference`` is
``|attention - ssm| / max`` of these: the claim is below 0.10 with ``auto``. ``flops_difference`` is the same
of counted FLOPs, which the alignment of the windows keeps from 0. ``speedup`` is one GPU's step over two's.

``--rehearse`` runs on any machine at toy sizes: no measurement. Writes ``flowhn-branches.json`` after each
size.
"""

import argparse
import statistics
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import machine
import torch
import torch.distributed as dist
from flowhn import SIZES, TOY, Size, keep, wait
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from flashtrain.comm.transport.base import clock
from flashtrain.errors import UserError
from flashtrain.models.decoder import Decoder
from flashtrain.nn import attend as attend_settings
from flashtrain.nn.flops import forward_flops
from flashtrain.nn.flowhn import FlowHN, FlowPast, _Branches
from flashtrain.nn.ssm import Mamba2
from flashtrain.parallel import mesh
from flashtrain.parallel.branches import RANKS
from flashtrain.parallel.data import Sharding
from flashtrain.parallel.mesh import DATA, TENSOR
from flashtrain.train import ranks
from flashtrain.train.build import build_model, build_step
from flashtrain.train.optimizer import AdamW
from flashtrain.train.settings import Training
from flashtrain.train.skips import SkipRule
from flashtrain.train.step import TrainStep

ENOUGH = 0.10


class Made(NamedTuple):
    """A model on one or two ranks, and its step."""

    model: Decoder
    step: TrainStep
    ranks: int


def made(config: Decoder.Config, train: Training, device: torch.device, of_ranks: int) -> Made:
    """A model whose blocks are computed by this rank alone or by both."""
    over = _alone(device) if of_ranks == 1 else mesh.build(mesh.Degrees(branches=2), device.type)
    model = build_model(config, train, Sharding(), over, device, by_branches=of_ranks > 1).model
    with tempfile.TemporaryDirectory() as out:
        rules = AdamW.Config(learning_rate=1e-3, warmup=1), SkipRule.Config(above=0)
        return Made(model, build_step(model, over, *rules, (), Path(out)), of_ranks)


def _alone(device: torch.device) -> DeviceMesh:
    """A mesh of this rank alone."""
    whole = init_device_mesh(device.type, (dist.get_world_size(), 1, 1), mesh_dim_names=("own", DATA, TENSOR))
    return whole[DATA, TENSOR]


def of_all(value: float) -> list[float]:
    """What each rank gives, on every rank."""
    found = [torch.zeros(1, dtype=torch.float64) for _ in range(dist.get_world_size())]
    dist.all_gather(found, torch.tensor([value], dtype=torch.float64))
    return [float(one) for one in found]


def seconds(one: "Bench", what: Callable[[], object], device: torch.device) -> float:
    """Time of one call on this rank, which begins with those of the others."""
    wait(device)
    of_all(0.0)
    start = clock()
    what()
    wait(device)
    took = clock() - start
    one.forget()
    return took


class Bench:
    """What is timed of one model, on the same tokens and activations as of any other."""

    def __init__(
        self, one: Made, batches: list[tuple[Tensor, Tensor]], passes: int, dtype: torch.dtype
    ) -> None:
        self.model, self.step, self.ranks = one
        self.batches, self.passes, self._number = batches, passes, 0
        sequence, micro = batches[0][0].shape
        device = batches[0][0].device
        self.rotary = self.model._rotary(batches[0][0])
        draw = torch.Generator(device).manual_seed(1)
        size = sequence, micro, self.model.config.hidden
        self.x = torch.randn(size, generator=draw, device=device).to(dtype)
        self.slope = torch.randn(size, generator=draw, device=device).to(dtype)

    def whole(self) -> None:
        """A training step."""
        self._number += 1
        self.step(self._number, 1e-5, self.batches)

    def blocks(self) -> None:
        """All blocks, forward and backward, as often as in a step."""
        place = dist.get_rank() if self.ranks > 1 else 0
        x, slope = (whole.chunk(self.ranks)[place] for whole in (self.x, self.slope))
        for _ in range(self.passes):
            y = x
            for block in self.model.layers:
                y = block(y, self.rotary)
            y.backward(slope)

    def branch(self, name: str) -> None:
        """A branch of all blocks on its tokens, forward and backward, as often as in a step."""
        for _ in range(self.passes):
            for block in self.model.layers:
                assert isinstance(block, FlowHN)
                now = _Branches(block.ssm_branch, block.attention_branch, FlowPast(0))
                pieces = block._pieces(now, self.rotary, 0, len(self.x))
                counts = [piece.tokens for piece in pieces]
                parts, slopes = self.x.split(counts), self.slope.split(counts)
                own = [index for index, piece in enumerate(pieces) if piece.branch == name]
                outputs = [pieces[index].compute(parts[index].requires_grad_()) for index in own]
                torch.autograd.backward(outputs, [slopes[index] for index in own])

    def forget(self) -> None:
        """Drop gradients that no step has used. It exchanges numbers, so a branch's time is without it."""
        self.step.optimizer.accumulate()
        self.step.optimizer.step(0.0, 1, limit=-1.0)

    def shares(self) -> dict[str, Any]:
        """The windows, and by how much the branches' FLOPs differ."""
        sequence, windows, flops = len(self.x), [], dict.fromkeys(RANKS, 0.0)
        for block in self.model.layers:
            assert isinstance(block, FlowHN)
            first, last = block.window(sequence)
            windows.append((first, last))
            tokens = {"attention": last - first, "ssm": sequence - (last - first)}
            branches = {"attention": block.attention_branch, "ssm": block.ssm_branch}
            for name, count in tokens.items():
                flops[name] += count * forward_flops(branches[name], count)
        auto = self.model.layers[0]._share(sequence)  # type: ignore[operator]
        return {"share": auto, "windows": windows, "flops_difference": difference(flops)}


def difference(of: dict[str, float]) -> float:
    """How much less the smaller has than the larger."""
    return (max(of.values()) - min(of.values())) / max(of.values())


def measured(
    size: Size, shares: list[str], sequence: int, layout: FlowHN.Config, repeats: int, device: torch.device
) -> dict[str, Any]:
    """All times of one size."""
    tokens = size.micro * size.accumulate * sequence
    train = Training(steps=10, dtype="bfloat16", batch=size.micro * size.accumulate, sequence=sequence)
    draw = torch.Generator(device).manual_seed(0)
    shape = sequence + 1, size.micro
    drawn = [
        torch.randint(size.model.vocabulary, shape, generator=draw, device=device)
        for _ in range(size.accumulate)
    ]
    batches = [(both[:-1].contiguous(), both[1:].contiguous()) for both in drawn]
    bench = {}
    for name in ("one", *shares):
        f = "auto" if name in ("one", "auto") else float(name)
        config = replace(size.model, layout=replace(layout, f=f))  # type: ignore[arg-type]
        one = made(config, train, device, 1 if name == "one" else 2)
        bench[name] = Bench(one, batches, size.accumulate, torch.bfloat16)
    calls: dict[tuple[str, str], Callable[[], None]] = {}
    mine = RANKS[dist.get_rank()]
    for name, one in bench.items():
        calls |= {(name, "step"): one.whole, (name, "blocks"): one.blocks}
        if one.ranks > 1:
            calls[name, "branch"] = lambda one=one: one.branch(mine)  # type: ignore[misc]
    for (name, _), call in calls.items():  # compiles, and fills the allocator's cache
        for _ in range(2):
            seconds(bench[name], call, device)
    taken: dict[tuple[str, str], list[list[float]]] = {key: [] for key in calls}
    for repeat in range(repeats):
        for key in sorted(calls, reverse=bool(repeat % 2)):
            times = [seconds(bench[key[0]], calls[key], device) for _ in range(size.steps)]
            taken[key].append(of_all(statistics.mean(times)))
    found: dict[str, Any] = {}
    for name, one in bench.items():
        steps, blocks = ([max(times) * 1e3 for times in taken[name, kind]] for kind in ("step", "blocks"))
        found[name] = one.shares() | {"step_ms": steps, "blocks_ms": blocks}
        found[name]["tokens_per_s"] = tokens / statistics.median(steps) * 1e3
        found[name]["parameters_here"] = sum(
            p.numel() for p in one.model.layers.parameters() if not p.is_meta
        )
        if one.ranks > 1:
            each = list(zip(*taken[name, "branch"], strict=True))
            branch = {kind: statistics.median(times) * 1e3 for kind, times in zip(RANKS, each, strict=True)}
            found[name] |= {"branch_ms": branch, "difference": difference(branch)}
            found[name]["speedup"] = found[name]["tokens_per_s"] / found["one"]["tokens_per_s"]
    return found | {"enough": {name: found[name]["difference"] < ENOUGH for name in shares}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--sizes", nargs="+", choices=list(SIZES), default=list(SIZES))
    parser.add_argument(
        "--shares", nargs="+", default=["auto", "0.5"], help="attention's share: auto or numbers"
    )
    parser.add_argument("--sequence", type=int, default=4096, help="tokens; a step has 65,536 of them")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--rehearse", action="store_true", help="toy sizes on any machine: no measurement")
    args = parser.parse_args()
    attend_settings.configure(attend_settings.Settings(deterministic=False))  # the fastest there is
    with ranks.joined(timeout=600) as device:
        if dist.get_world_size() != len(RANKS):
            raise UserError("branches need two ranks: start it with torchrun --nproc-per-node 2")
        report: dict[str, Any] = {"device": machine.gpus(2) or "cpu", "rehearsal": args.rehearse}
        report |= {"versions": machine.versions() | machine.gpu_versions(), "date": machine.date()}
        report |= {"sequence": args.sequence, "sizes": {}}
        for name in args.sizes:
            micro = max(1, SIZES[name].micro * 1024 // args.sequence)
            size, sequence, layout = replace(SIZES[name], micro=micro), args.sequence, FlowHN.Config()
            if args.rehearse:
                ssm = Mamba2.Config(head_dim=16, states=16)
                size, sequence, layout = TOY, 64, FlowHN.Config(ssm=ssm, align=8)
            found = report["sizes"][name] = measured(
                size, args.shares, sequence, layout, args.repeats, device
            )
            if device.type == "cuda":
                torch.cuda.empty_cache()
            if dist.get_rank() > 0:
                continue
            line = "; ".join(
                f"f {share}: {found[share]['difference']:.3f} apart "
                f"({'enough' if found['enough'][share] else 'NOT ENOUGH'}; "
                f"FLOPs {found[share]['flops_difference']:.3f}), x{found[share]['speedup']:.2f} of one GPU"
                for share in args.shares
            )
            keep(args.out / "flowhn-branches.json", report, f"{name}: {line}")


if __name__ == "__main__":
    main()
