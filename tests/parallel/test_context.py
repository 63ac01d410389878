"""Segments of sequences on several ranks: the loss and every gradient of whole sequences on one."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from flashtrain.comm import collectives, transport
from flashtrain.errors import UserError
from flashtrain.models.decoder import Decoder
from flashtrain.nn.attend import Documents
from flashtrain.nn.flowhn import FlowHN
from flashtrain.nn.hybrid import ParallelHeads, Pattern
from flashtrain.nn.mamba1 import Mamba1
from flashtrain.nn.sharing import Sharing
from flashtrain.nn.ssm import Mamba2
from flashtrain.parallel import apply, context, mesh, sites
from flashtrain.parallel.recompute import recompute
from flashtrain.train.step import mean_over_tokens
from tests.distributed import run_distributed
from tests.parallel.test_apply import local_bits, off, poison, whole

CONFIG = Decoder.Config(hidden=64, layers=2, heads=8, kv_heads=4, mlp_width=256)
SSM = Mamba2.Config(head_dim=16, states=8, groups=2)
LAYOUTS: dict[str, dict[str, Any]] = {
    "mamba": {"layout": Pattern.Config(pattern="M", ssm=SSM)},
    "pattern": {"layout": Pattern.Config(pattern="M*", ssm=replace(SSM, groups=1, norm_groups=2))},
    "parallel": {"layout": ParallelHeads.Config(ssm=SSM, join="concat")},
    "none": {"layout": FlowHN.Config(ssm=SSM, strategy="none", positions=True)},
    "attention": {"qkv_bias": True, "tied_embeddings": True},
    "pairs": {"pairing": "gqkva-4.2"},
}
BOUNDS = {torch.float64: 1e-12, torch.float32: 2e-5}


def decoder(layout: str, dtype: torch.dtype) -> Decoder:
    model = Decoder(replace(CONFIG, **LAYOUTS[layout]), torch.Generator().manual_seed(0)).to(dtype)
    for name, parameter in model.named_parameters():
        if name.endswith("log_rate"):
            parameter.data.sub_(2.0)  # slow decay, so that states reach far
    return model


def batch(ranks: mesh.DeviceMesh, sequence: int, size: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Tokens and targets ``[S, B]`` of all ranks, and those of this one."""
    every = torch.randint(0, 256, (2, sequence, size), generator=torch.Generator().manual_seed(1))
    data = ranks[mesh.DATA]
    mine = every.chunk(data.size(), 2)[data.get_local_rank()]
    own = [context.own_segment(part.t(), ranks).t().contiguous() for part in mine]
    return every[0], every[1], own[0], own[1]


def _gradients(
    rank: int, world: int, degrees: mesh.Degrees, layouts: list[str], dtypes: list[torch.dtype]
) -> list[str]:
    poison()
    failures = []
    ranks = mesh.build(degrees, "cpu")
    sequence = 7 * degrees.context
    for number, layout in enumerate(layouts):
        dtype = dtypes[number % len(dtypes)]
        transport.configure(transport.Settings(transport=("host", "group")[number % 2]))
        plain, model = decoder(layout, dtype), decoder(layout, dtype)
        apply.parallelize(model, ranks)
        tokens, targets, own_tokens, own_targets = batch(ranks, sequence, 2 * degrees.data)
        wanted = plain(tokens, targets)
        wanted.backward()
        loss = model(own_tokens, own_targets)
        loss.backward()
        apply.sum_replicated_gradients(model, ranks)
        errors = {"loss": off(mean_over_tokens(loss.detach(), ranks), wanted.detach())}
        for name, parameter in plain.named_parameters():
            errors[name] = off(whole(model.get_parameter(name).grad), parameter.grad)
        failures += [f"{layout}: {name} off by {e}" for name, e in errors.items() if not e <= BOUNDS[dtype]]
        if model.flops_per_token(sequence) != plain.flops_per_token(sequence):
            failures.append(f"{layout}: FLOPs")
        if model.parameter_count() != plain.parameter_count():
            failures.append(f"{layout}: parameters")
    return failures


@pytest.mark.parametrize(
    ("degrees", "layouts"),
    [
        (mesh.Degrees(context=2), list(LAYOUTS)),
        (mesh.Degrees(context=3), ["mamba", "pattern", "attention"]),
        (mesh.Degrees(context=2, data=2), ["pattern", "mamba"]),
        (mesh.Degrees(context=2, tensor=2), ["pattern", "mamba", "parallel", "pairs"]),
    ],
    ids=str,
)
def test_loss_and_gradients_are_those_of_one_process(degrees: mesh.Degrees, layouts: list[str]) -> None:
    dtypes = [torch.float64, torch.float32]
    assert run_distributed(_gradients, degrees.world, degrees, layouts, dtypes) == [[]] * degrees.world


def _bits(rank: int, world: int) -> list[set[Any]]:
    poison()
    ranks, found = mesh.build(mesh.Degrees(context=world), "cpu"), []
    tokens, targets = batch(ranks, 24, 2)[2:]
    for layout in ("pattern", "pairs"):
        one = set()
        for name, policy in (
            ("host", "none"),
            ("host", "pointwise"),
            ("group", "attention"),
            ("host", "full"),
        ):
            transport.configure(transport.Settings(transport=name))
            model = apply.parallelize(decoder(layout, torch.float32), ranks)
            recompute(model.layers, policy)  # type: ignore[arg-type]
            loss = model(tokens, targets)
            loss.backward()
            one.add((float(loss), local_bits(model)))
        found.append(one)
    return found


def test_bits_depend_on_neither_transport_nor_recomputation() -> None:
    for found in run_distributed(_bits, 2):
        assert [len(bits) for bits in found] == [1, 1]


def _exchanged(rank: int, world: int) -> tuple[set[str], set[str]]:
    """Names of sites in the survey, and of those that exchanged something in a pass."""
    ranks = mesh.build(mesh.Degrees(context=world), "cpu")
    model = apply.parallelize(decoder("pattern", torch.float32), ranks)
    found = {site.name for site in sites.survey(model, ranks, 12, torch.device("cpu"))}
    ran: set[str] = set()
    real = collectives.all_gather

    def seen(x: Tensor, group: str, site: str = "", rows: int | None = None) -> Tensor:
        ran.add(site)
        return real(x, group, site, rows)

    collectives.all_gather = seen  # type: ignore[assignment]
    model(*batch(ranks, 12, 1)[2:]).backward()
    return {name for name in found if "(context)" in name}, ran


def test_the_survey_names_what_is_exchanged() -> None:
    for found, ran in run_distributed(_exchanged, 2):
        assert found == ran == {"layers.0.ssm (context)", "layers.1.attention (context)"}


def _refused(rank: int, world: int) -> list[str]:
    ranks, found = mesh.build(mesh.Degrees(context=world), "cpu"), []
    group = ranks[mesh.CONTEXT]
    model = apply.parallelize(decoder("attention", torch.float32), ranks)
    attention = model.get_submodule("layers.0.attention")
    windows = Decoder(replace(CONFIG, layout=FlowHN.Config(ssm=SSM)))
    shared = Decoder(replace(CONFIG, sharing=Sharing()))
    first = Decoder(replace(CONFIG, layout=Pattern.Config(pattern="M", ssm=Mamba1.Config())))
    tokens = torch.zeros(8, 1, dtype=torch.long)
    for call in (
        lambda: apply.parallelize(nn.Linear(2, 2), ranks),
        lambda: context.GatherKeys()._apply(nn.Linear(2, 2), group),
        lambda: apply.parallelize(windows, ranks),
        lambda: apply.parallelize(shared, ranks),
        lambda: apply.parallelize(first, ranks),
        lambda: model(tokens, tokens, Documents.of(tokens.t(), 1)),
        lambda: model.extend(tokens),  # type: ignore[operator]
        lambda: attention.extend(torch.zeros(8, 1, 64), torch.zeros(2, 8, 8), ()),  # type: ignore[operator]
    ):
        try:
            call()
        except UserError as error:
            found.append(str(error))
    return found


def test_what_needs_whole_sequences_is_refused() -> None:
    wanted = [
        "parallel.context is of decoders, not of Linear",
        "GatherKeys applies to Attention, not to Linear",
        "windows of FlowHN are of whole sequences: set parallel.context 1 or model.layout.strategy none",
        "layers that share heads (model.sharing) need whole sequences: set parallel.context 1",
        "StatePassing applies to Mamba2, not to Mamba1",
        "train.document_mask is true, but documents do not end where segments do",
        "a model over segments cannot decode: load its checkpoint with parallel.context 1",
        "attention that gathers keys starts at the sequence's first token",
    ]
    assert run_distributed(_refused, 2) == [wanted] * 2
