"""Pairs of heads on several ranks: the model of one process, whichever side of the pairs is split."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from flashtrain.comm import transport
from flashtrain.errors import UserError
from flashtrain.models.decoder import Decoder
from flashtrain.nn.attention import Attention
from flashtrain.nn.pairing import Pairing
from flashtrain.parallel import apply, heads, mesh, sites, tensor
from flashtrain.train.optimizer import AdamW
from tests.distributed import run_distributed

CONFIG = Decoder.Config(vocabulary=64, hidden=64, layers=1, heads=8, mlp_width=256, qkv_bias=True)
SPLIT_KEYS, SPLIT_QUERIES = "query", "key value"
# Pairing, order, ranks, and which weights are whole on every rank.
CASES = [
    ("gqkva-2.4", "j_major", 2, SPLIT_KEYS),
    ("gqkva-2.4", "i_major", 2, SPLIT_QUERIES),
    ("gkva-2", "j_major", 2, ""),
    ("mkva", "j_major", 2, SPLIT_KEYS),
    ("gqa-4", "j_major", 2, ""),
    ("mqa", "j_major", 2, "weight"),
    ("1:0 0:1 0:0 1:1 2:2 3:3 3:2 2:3", "j_major", 2, ""),
    ("gqkva-4.2", "j_major", 4, "query key value"),
    ("gqkva-4.2", "i_major", 4, SPLIT_QUERIES),
    ("gqa-2", "j_major", 4, "weight"),
]


def config(name: str, order: str) -> Decoder.Config:
    return replace(CONFIG, pairing=name, pair_order=order)


def whole(value: Tensor) -> Tensor:
    return value.full_tensor() if isinstance(value, DTensor) else value


def off(actual: Tensor, wanted: Tensor) -> float:
    return float((actual - wanted).norm() / wanted.norm())


def _steps(rank: int, world: int, cases: list[tuple[str, str, int, str]]) -> list[str]:
    """What differs from one process after a step and in the loss of the next."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    failures = []
    ranks = mesh.build(mesh.Degrees(tensor=world), "cpu")
    settings = [transport.Settings(transport="host"), transport.Settings(transport="host", keep_gather=True)]
    for number, (name, order, _, replicated) in enumerate(cases):
        transport.configure(settings[number % 2])
        draw = torch.Generator().manual_seed(0)
        plain, model = (Decoder(config(name, order), torch.Generator().manual_seed(0)) for _ in range(2))
        with torch.no_grad():
            for parameter in plain.layers[0].attention.qkv.parameters():
                if parameter.dim() == 1:
                    parameter.normal_(generator=draw)
        model.load_state_dict(plain.state_dict())
        apply.parallelize(model, ranks)
        projection = model.layers[0].attention.qkv
        names = {n.removesuffix("_weight") for n, p in projection.named_parameters()
                 if n.endswith("weight") and not isinstance(p, DTensor)}  # fmt: skip
        if names != set(replicated.split()):
            failures.append(f"{name}: {names} are whole")
        optimizer = AdamW(model, ranks, AdamW.Config(clip_norm=0.05))
        tokens = torch.randint(0, 64, (2, 15 + number % 2, 2), generator=draw)
        plain(*tokens).backward()
        model(*tokens).backward()
        wanted = [parameter.grad for parameter in plain.parameters()]
        norm = float(torch.cat([gradient.reshape(-1) for gradient in wanted]).norm())
        optimizer.accumulate()
        found = optimizer.step(1e-3, 1)
        if abs(found - norm) > 1e-4 * norm:
            failures.append(f"{name}: norm {found}, of one process {norm}")
        reference = torch.optim.AdamW(
            [
                {"params": [p for p in plain.parameters() if p.dim() > 1], "weight_decay": 0.1},
                {"params": [p for p in plain.parameters() if p.dim() == 1], "weight_decay": 0.0},
            ],
            lr=1e-3,
            betas=(0.9, 0.95),
        )
        for gradient in wanted:
            gradient.mul_(0.05 / norm)
        reference.step()
        for key, parameter in plain.named_parameters():
            error = off(whole(model.get_parameter(key).detach()), parameter.detach())
            if not error < 1e-4:
                failures.append(f"{name}: {key} off by {error} after a step")
        if not off(model(*tokens).detach(), plain(*tokens).detach()) < 1e-5:
            failures.append(f"{name}: loss of the second step")
    return failures


def _gradients(rank: int, world: int, cases: list[tuple[str, str, int, str]]) -> list[str]:
    torch.use_deterministic_algorithms(True)
    failures = []
    ranks = mesh.build(mesh.Degrees(tensor=world), "cpu")
    for name, order, _, _ in cases:
        found = []
        for settings in (
            transport.Settings(transport="host"),
            transport.Settings(transport="group", subchunks=2),
        ):
            transport.configure(settings)
            model = Decoder(config(name, order), torch.Generator().manual_seed(0))
            plain = Decoder(config(name, order), torch.Generator().manual_seed(0))
            apply.parallelize(model, ranks)
            tokens = torch.randint(0, 64, (2, 16, 2), generator=torch.Generator().manual_seed(1))
            model(*tokens).backward()
            apply.sum_replicated_gradients(model, ranks)
            plain(*tokens).backward()
            for key, parameter in plain.named_parameters():
                if parameter.grad.norm() < 1e-7:  # keys' biases, which softmax does not see
                    continue
                if not (error := off(whole(model.get_parameter(key).grad), parameter.grad)) < 1e-5:
                    failures.append(f"{name}: {key} off by {error}")
            found.append([whole(p.grad).clone() for p in model.parameters()])
        if not all(map(torch.equal, *found)):
            failures.append(f"{name}: bits depend on the transport")
    return failures


@pytest.mark.parametrize("world", [2, 4])
def test_gradients_equal_those_of_one_process(world: int) -> None:
    cases = [case for case in CASES if case[2] == world]
    assert run_distributed(_gradients, world, cases) == [[]] * world


@pytest.mark.parametrize("world", [2, 4])
def test_a_step_is_that_of_one_process(world: int) -> None:
    cases = [case for case in CASES if case[2] == world]
    assert run_distributed(_steps, world, cases) == [[]] * world


def _refused(rank: int, world: int) -> tuple[str, str, list[str]]:
    ranks = mesh.build(mesh.Degrees(tensor=2), "cpu")
    rows, messages = tensor.Rows(), []
    for name in ("gqkva-1.3", "0:0 0:1 1:0 2:0"):
        attention = Attention(
            64, name.count(":") or 3, 1, 8, pairing=Pairing.named(name, name.count(":") or 3)
        )
        try:
            heads.HeadParallel(rows)._apply(attention.qkv, ranks["tensor"])
        except UserError as error:
            messages.append(str(error))
    model = apply.parallelize(Decoder(config("gqkva-2.4", "j_major")), ranks)
    found = sites.survey(model, ranks, 16, torch.device("cpu"))
    return (*messages, [site.name for site in found if site.overlapped])  # type: ignore[return-value]


def test_pairs_that_ranks_cannot_share_are_refused_and_the_product_is_overlapped() -> None:
    for uneven, lopsided, overlapped in run_distributed(_refused, 2):
        assert (
            uneven == "pairing: 3 pairs do not divide by 2 ranks; choose parallel.tensor among their divisors"
        )
        assert lopsided.startswith(
            "these pairs give 2 ranks 32 to 40 rows of Q, K and V to compute: put pairs"
        )
        assert "layers.0.attention.qkv" in overlapped
