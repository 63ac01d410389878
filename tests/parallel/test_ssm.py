"""Hybrids on many tensor ranks: the values, gradients and checkpoints of one."""

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from flashtrain.comm import transport
from flashtrain.errors import UserError
from flashtrain.models.decoder import Decoder
from flashtrain.nn.flowhn import FlowHN
from flashtrain.nn.hybrid import ParallelHeads, Pattern
from flashtrain.nn.mamba1 import Mamba1
from flashtrain.nn.ssm import Mamba2
from flashtrain.parallel import apply, mesh, sites
from flashtrain.parallel import ssm as styles
from tests.distributed import run_distributed
from tests.parallel.test_apply import TOLERANCE, batch, local_bits, off, poison, step, whole

CONFIG = Decoder.Config(hidden=64, layers=3, heads=8, kv_heads=4, mlp_width=256)
GROUPED = Mamba2.Config(head_dim=16, states=8, groups=4)
SHARED = Mamba2.Config(head_dim=16, states=8, groups=1, norm_groups=4)
HALVES = Mamba2.Config(head_dim=16, states=8, groups=2, norm_groups=4)
LAYOUTS: dict[str, Any] = {
    "pattern": Pattern.Config(pattern="M*-", ssm=GROUPED),
    "shared": Pattern.Config(pattern="M*-", ssm=SHARED),
    "halves": Pattern.Config(pattern="M-M", ssm=HALVES),
    "parallel": ParallelHeads.Config(ssm=GROUPED, join="concat", ssm_multiplier=0.5),
    "flowhn": FlowHN.Config(ssm=GROUPED, align=1, f=0.4),
    "none": FlowHN.Config(ssm=SHARED, align=1, strategy="none", ffn="shared"),
    "pieces": FlowHN.Config(ssm=Mamba1.Config(states=4), align=1, f=0.4),
    "channels": Pattern.Config(pattern="M*M", ssm=Mamba1.Config(states=4)),
    "mixers": FlowHN.Config(ssm=SHARED, align=1, ffn="none", f=1 / 3),
}


def decoder(layout: str) -> Decoder:
    return Decoder(replace(CONFIG, layout=LAYOUTS[layout]), torch.Generator().manual_seed(0))


def _gradients(rank: int, world: int, tensor: int, data: int, layouts: list[str]) -> list[str]:
    poison()
    failures = []
    ranks = mesh.build(mesh.Degrees(tensor=tensor, data=data), "cpu")
    settings = itertools.cycle(
        [transport.Settings(transport="host"), transport.Settings(transport="group", keep_gather=True)]
    )
    for layout, sequence in itertools.product(layouts, (16, 13)):
        transport.configure(next(settings))
        plain, model = decoder(layout), decoder(layout)
        apply.parallelize(model, ranks)
        tokens, targets = batch(sequence, 2 * data)
        wanted = plain(tokens, targets)
        wanted.backward()
        if data == 1 and not off(step(model, ranks, tokens, targets), wanted.detach()) <= TOLERANCE:
            failures.append(f"{layout} {sequence}: loss")
        if data > 1:
            step(model, ranks, tokens, targets)
        for name, parameter in plain.named_parameters():
            found = off(whole(model.get_parameter(name).grad), parameter.grad)
            if not found <= 2 * TOLERANCE:
                failures.append(f"{layout} {sequence}: {name} off by {found}")
        if model.flops_per_token(16) != plain.flops_per_token(16):
            failures.append(f"{layout}: FLOPs")
        if model.parameter_count() != plain.parameter_count():
            failures.append(f"{layout}: parameters")
    return failures


@pytest.mark.parametrize(
    ("tensor", "data", "layouts"),
    [
        (2, 1, list(LAYOUTS)),
        (4, 1, ["shared", "halves", "flowhn", "channels"]),
        (2, 2, ["mixers", "channels"]),
    ],
)
def test_gradients_equal_those_of_one_process(tensor: int, data: int, layouts: list[str]) -> None:
    world = tensor * data
    assert run_distributed(_gradients, world, tensor, data, layouts) == [[]] * world


def _bits(rank: int, world: int) -> list[set[Any]]:
    poison()
    ranks, found = mesh.build(mesh.Degrees(tensor=world), "cpu"), []
    for layout in ("shared", "flowhn", "channels"):
        one = set()
        for settings in (
            transport.Settings(transport="host"),
            transport.Settings(transport="host"),
            transport.Settings(transport="group"),
            transport.Settings(transport="host", subchunks=3),
        ):
            transport.configure(settings)
            model = apply.parallelize(decoder(layout), ranks)
            one.add((float(step(model, ranks, *batch(13, 2))), local_bits(model)))
        found.append(one)
    return found


def test_bits_depend_on_neither_run_nor_transport() -> None:
    for found in run_distributed(_bits, 2):
        assert [len(bits) for bits in found] == [1, 1, 1]


def _one_rank(rank: int, world: int) -> bool:
    ranks = mesh.build(mesh.Degrees(), "cpu")
    plain, model = decoder("flowhn"), apply.parallelize(decoder("flowhn"), ranks)
    wanted = plain(*batch(16, 2))
    wanted.backward()
    same = torch.equal(step(model, ranks, *batch(16, 2)), wanted)
    return same and all(
        torch.equal(a.grad, b.grad) for a, b in zip(plain.parameters(), model.parameters(), strict=True)
    )


def test_one_rank_is_the_plain_model_to_the_bit() -> None:
    assert run_distributed(_one_rank, 1) == [True]


def _refused(rank: int, world: int) -> list[str]:
    ranks, found = mesh.build(mesh.Degrees(tensor=world), "cpu"), []
    for module in (nn.Linear(4, 4), Mamba2(8, 3, 4, 4), Mamba2(8, 6, 4, 4, groups=3)):
        try:
            styles.SSMHeads()._apply(module, ranks[mesh.TENSOR])
        except UserError as error:
            found.append(str(error))
    return found


def test_mixers_that_do_not_divide_are_refused() -> None:
    degree = "do not divide by the tensor-parallel degree 2"
    wanted = ["SSMHeads applies to Mamba1 and Mamba2, not to Linear"]
    wanted += [f"3 heads in 1 groups of Mamba2 {degree}", f"6 heads in 3 groups of Mamba2 {degree}"]
    assert run_distributed(_refused, 2) == [wanted] * 2


def _sites(rank: int, world: int) -> dict[str, tuple[str, bool]]:
    ranks = mesh.build(mesh.Degrees(tensor=world), "cpu")
    model = apply.parallelize(decoder("flowhn"), ranks)
    channels = apply.parallelize(decoder("channels"), ranks)
    found = sites.survey(model, ranks, 32, torch.device("cpu"))
    found += sites.survey(channels, ranks, 32, torch.device("cpu"))
    return {site.name: (site.product, site.overlapped) for site in found if site.name.startswith("layers.0.")}


def test_every_product_and_every_transfer_is_a_site() -> None:
    inputs = 2 * 128 + 2 * 4 * 8 + 8
    wanted = {
        "layers.0.ssm_branch.0.ssm": (f"[32, 64] x [64, {inputs}]", True),
        "layers.0.ssm_branch.0.ssm.out": ("[32, 128] x [128, 64]", True),
        "layers.0.attention_branch.0.attention.qkv": ("[32, 64] x [64, 128]", True),
        "layers.0.attention_branch.0.attention.out": ("[32, 64] x [64, 64]", True),
        "layers.0.ssm": (f"[32, 64] x [64, {2 * 128}]", True),
        "layers.0.ssm.select": ("", False),
        "layers.0.ssm.out": ("[32, 128] x [128, 64]", True),
        "layers.0.routing": ("", False),
        "layers.0.fuse": ("", False),
        "layers.0.final": ("", False),
    }
    for branch in ("ssm_branch", "attention_branch"):
        wanted[f"layers.0.{branch}.1.mlp.gate_up"] = ("[32, 64] x [64, 512]", True)
        wanted[f"layers.0.{branch}.1.mlp.down"] = ("[32, 256] x [256, 64]", True)
    assert run_distributed(_sites, 2) == [wanted] * 2
