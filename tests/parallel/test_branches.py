"""Attention on one rank and the SSM on another: the values, gradients and FLOPs of one rank with both."""

import hashlib
import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from flashtrain.comm import transport
from flashtrain.errors import UserError
from flashtrain.models.decoder import Decoder
from flashtrain.nn.flowhn import FlowHN
from flashtrain.nn.hybrid import ParallelHeads, Pattern
from flashtrain.nn.mamba1 import Mamba1
from flashtrain.nn.ssm import Mamba2
from flashtrain.parallel import apply, branches, mesh, sites
from flashtrain.parallel.recompute import recompute
from tests.distributed import run_distributed
from tests.parallel.test_apply import TOLERANCE, batch, off, poison, step

# Heads, groups and KV heads that no two ranks could share out.
CONFIG = Decoder.Config(hidden=48, layers=3, heads=3, kv_heads=3, mlp_width=128, tied_embeddings=True)
SSM = Mamba2.Config(head_dim=32, states=8, groups=1)
LAYOUTS: dict[str, Any] = {
    "auto": FlowHN.Config(ssm=SSM, align=1),
    "pieces": FlowHN.Config(ssm=Mamba1.Config(states=4), align=1, f=0.4, ffn="none"),
    "shared": FlowHN.Config(ssm=SSM, align=1, ffn="shared", strategy="alternating"),
    "ssm alone": FlowHN.Config(ssm=SSM, align=1, f=0.0),
    "attention alone": FlowHN.Config(ssm=SSM, align=1, f=1.0),
    "none": FlowHN.Config(ssm=SSM, align=1, strategy="none"),
    "add": ParallelHeads.Config(ssm=SSM, ssm_multiplier=0.5),
    "concat": ParallelHeads.Config(ssm=SSM, join="concat"),
}


def decoder(layout: str) -> Decoder:
    return Decoder(replace(CONFIG, layout=LAYOUTS[layout]), torch.Generator().manual_seed(0))


def by_branches(layout: str, ranks: mesh.DeviceMesh, dtype: torch.dtype = torch.float32) -> Decoder:
    model = decoder(layout).to(dtype)
    apply.parallelize(model, ranks, by_branches=True)
    return model


def held(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if not p.is_meta}


def whole(gradient: Tensor) -> Tensor:
    return gradient.full_tensor() if isinstance(gradient, DTensor) else gradient


def _gradients(
    rank: int, world: int, data: int, layouts: list[str]
) -> tuple[list[str], dict[str, list[str]]]:
    poison()
    failures, kept = [], {}
    ranks = mesh.build(mesh.Degrees(branches=2, data=data), "cpu")
    turns = itertools.cycle(("host", "group"))
    for layout, sequence in itertools.product(layouts, (16, 13)):
        transport.configure(transport.Settings(transport=next(turns)))  # type: ignore[arg-type]
        plain, model = decoder(layout), by_branches(layout, ranks)
        if sequence == 13:
            recompute(model.layers, "full")
            if "alone" in layout:  # then one rank has nothing to train up to the first block's end
                for one in (plain, model):
                    one.embedding.weight.requires_grad_(False)
        tokens, targets = batch(sequence, 2 * data)
        wanted = plain(tokens, targets)
        wanted.backward()
        loss = step(model, ranks, tokens, targets)
        if data == 1 and not off(loss, wanted.detach()) <= TOLERANCE:
            failures.append(f"{layout} {sequence}: loss")
        for name, parameter in plain.named_parameters():
            mine = model.get_parameter(name)
            if mine.is_meta:
                continue
            if parameter.grad is None:  # a branch without tokens
                if mine.grad is not None:
                    failures.append(f"{layout} {sequence}: {name} has a gradient")
                continue
            found = off(whole(mine.grad), parameter.grad)
            if not found <= 2 * TOLERANCE:
                failures.append(f"{layout} {sequence}: {name} off by {found}")
        if model.flops_per_token(16) != plain.flops_per_token(16):
            failures.append(f"{layout}: FLOPs")
        if model.parameter_count() != plain.parameter_count():
            failures.append(f"{layout}: parameters")
        kept[layout] = list(held(model))
    return failures, kept


@pytest.mark.parametrize(("data", "layouts"), [(1, list(LAYOUTS)), (2, ["auto", "add"])])
def test_gradients_equal_those_of_one_rank(data: int, layouts: list[str]) -> None:
    results = run_distributed(_gradients, 2 * data, data, layouts)
    for failures, _ in results:
        assert failures == []
    for layout in layouts:
        first, second = (set(results[rank][1][layout]) for rank in (0, 1))
        names = {name for name, _ in decoder(layout).named_parameters()}
        ssm, attention = ({name for name in names if f".{kind}" in name} for kind in ("ssm", "attention"))
        assert ssm
        assert attention
        assert (first, second) == (names - attention, names - ssm)


def _block_bits(rank: int, world: int) -> dict[str, list[str]]:
    """What differs where rows alone are exchanged: products over rows are left out, as their sums are cut."""
    poison()
    transport.configure(transport.Settings(transport="host"))
    ranks, differing = mesh.build(mesh.Degrees(branches=2), "cpu"), {}
    for layout, dtype in itertools.product(("auto", "pieces", "none"), (torch.float64, torch.bfloat16)):
        drawn = torch.randn(16, 2, CONFIG.hidden, generator=torch.Generator().manual_seed(2)).to(dtype)
        results = []
        for model, x in (
            (decoder(layout).to(dtype), drawn),
            (by_branches(layout, ranks, dtype), drawn.chunk(2)[rank]),
        ):
            x, y = x.clone().requires_grad_(), None
            for block in model.layers:
                block.fuse = _Added() if layout == "none" else nn.Identity()
                block.final = nn.Identity()
                y = block(x if y is None else y, model._rotary(torch.zeros(16, 2)))
            y.backward(torch.ones_like(y))
            results.append(
                {"y": y.detach()} | {n: p.grad for n, p in held(model.layers).items()} | {"x": x.grad}
            )
        plain, split = results
        names = [name for name in split if name in ("x", "y") or "branch" in name]
        if layout == "none":  # there the gradients of a token's two branches are added in another order
            names = ["y"]
        plain |= {name: plain[name].chunk(2)[rank] for name in ("x", "y")}
        differing[f"{layout} {dtype}"] = [n for n in names if not torch.equal(plain[n], split[n])]
    return differing


class _Added(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        first, second = x.chunk(2, -1)
        return first + second


def test_branches_and_what_they_exchange_are_those_of_one_rank_to_the_bit() -> None:
    for differing in run_distributed(_block_bits, 2):
        assert len(differing) == 6
        assert not any(differing.values()), differing


def _bits(rank: int, world: int) -> set[Any]:
    poison()
    ranks, found = mesh.build(mesh.Degrees(branches=2), "cpu"), set()
    for name in ("host", "host", "group"):
        transport.configure(transport.Settings(transport=name))  # type: ignore[arg-type]
        model = by_branches("auto", ranks)
        loss = float(step(model, ranks, *batch(13, 2)))
        gradients = {
            name: hashlib.sha256(whole(p.grad).contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()
            for name, p in held(model).items()
        }
        found.add((loss, *gradients.items()))
    return found


def test_bits_depend_on_neither_run_nor_transport_and_are_the_same_on_both_ranks() -> None:
    (first,), (second,) = run_distributed(_bits, 2)
    assert first[0] == second[0]
    common = dict(first[1:]).keys() & dict(second[1:]).keys()
    assert {"embedding.weight", "norm.weight", "layers.2.fuse.weight"} < common
    for name in common:
        assert dict(first[1:])[name] == dict(second[1:])[name], name


def _refused(rank: int, world: int) -> list[str]:
    found = []
    ranks = mesh.build(mesh.Degrees(branches=2), "cpu")
    for model in (
        Decoder(replace(CONFIG, layout=Pattern.Config(pattern="M*-", ssm=SSM))),
        Decoder(CONFIG),
    ):
        try:
            apply.parallelize(model, ranks, by_branches=True)
        except UserError as error:
            found.append(str(error))
    try:
        branches.check(decoder("auto"), 4)
    except UserError as error:
        found.append(str(error))
    return found


def test_blocks_without_two_branches_and_other_numbers_of_ranks_are_refused() -> None:
    why = "which has no attention and SSM side by side: ranks cannot have a branch each"
    for found in run_distributed(_refused, 2):
        assert found == [
            f"layers.0 is a Layer, {why}",
            f"layers.0 is a Block, {why}",
            "a block has 2 branches, which are for as many ranks, not for 4",
        ]


def test_settings_that_do_not_go_together_are_refused() -> None:
    for degrees, message in (
        (mesh.Degrees(branches=3), "parallel.branches is 3; it must be 1 or 2, as a block has two"),
        (
            mesh.Degrees(branches=2, tensor=2),
            "parallel.branches is 2 and parallel.tensor 2: set one of them to 1",
        ),
    ):
        with pytest.raises(UserError) as refused:
            degrees.validate()
        assert str(refused.value) == message
    for config, message in (
        (CONFIG, "blocks of model.layout None have no attention and SSM side by side"),
        (replace(CONFIG, layout=Pattern.Config()), r"blocks of model\.layout Pattern\.Config have no"),
        (
            replace(CONFIG, layout=LAYOUTS["auto"], vocabulary=257),
            r"^model\.vocabulary is 257; parallel\.branches 2 must divide it",
        ),
        (
            replace(CONFIG, layout=LAYOUTS["shared"], mlp_width=192),
            r"^model\.mlp_width / 64 is 3; parallel\.branches 2 must divide it",
        ),
    ):
        with pytest.raises(UserError, match=message):
            config.validate_branches(2)
    replace(CONFIG, layout=LAYOUTS["auto"], mlp_width=192).validate_branches(2)
    assert str(mesh.Degrees(branches=2)) == "parallel.tensor 1 x parallel.data 1 x parallel.branches 2"


def _sites(rank: int, world: int) -> list[tuple[str, str]]:
    ranks = mesh.build(mesh.Degrees(branches=2), "cpu")
    found = sites.survey(by_branches("auto", ranks), ranks, 32, torch.device("cpu"))
    found += sites.survey(by_branches("add", ranks), ranks, 32, torch.device("cpu"))
    return [(site.name, site.forward) for site in found if site.name.startswith("layers.0.")]


def test_branches_exchange_rows_before_and_after_and_nothing_in_between() -> None:
    both = "all-gather, reduce-scatter"
    for found in run_distributed(_sites, 2):
        assert found == [
            ("layers.0.routing", both),
            ("layers.0.fuse", ""),
            ("layers.0.final", ""),
            ("layers.0.beside", both),
            ("layers.0.mlp.gate_up", "all-gather, then product"),
            ("layers.0.mlp.down", "product, then reduce-scatter"),
        ]
