"""``parallelize`` on the decoder: the model of one process, on many ranks."""

import hashlib
import itertools
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from flashtrain.comm import transport
from flashtrain.errors import UserError
from flashtrain.models.decoder import Decoder
from flashtrain.parallel import apply, mesh
from flashtrain.parallel import tensor as styles
from flashtrain.parallel.mesh import DATA
from tests.distributed import run_distributed

TOLERANCE = 1e-5
CONFIG = Decoder.Config(hidden=64, layers=2, heads=8, kv_heads=4, mlp_width=256)
TIED = replace(CONFIG, tied_embeddings=True, qkv_bias=True)


def decoder(config: Decoder.Config = CONFIG) -> Decoder:
    return Decoder(config, torch.Generator().manual_seed(0))


def batch(sequence: int, size: int) -> tuple[Tensor, Tensor]:
    """Tokens and targets ``[S, B]``."""
    drawn = torch.randint(
        0, CONFIG.vocabulary, (2, sequence, size), generator=torch.Generator().manual_seed(1)
    )
    return drawn[0], drawn[1]


def step(model: nn.Module, ranks: mesh.DeviceMesh, tokens: Tensor, targets: Tensor) -> Tensor:
    """Forward and backward of this rank's part of the batch; the loss of it."""
    degree, place = ranks[DATA].size(), ranks[DATA].get_local_rank()
    loss = model(tokens.chunk(degree, 1)[place].contiguous(), targets.chunk(degree, 1)[place].contiguous())
    loss.backward()
    apply.sum_replicated_gradients(model, ranks)
    return loss.detach()


def whole(gradient: Tensor) -> Tensor:
    return gradient.full_tensor() if isinstance(gradient, DTensor) else gradient


def off(actual: Tensor, wanted: Tensor) -> float:
    return float((actual - wanted).norm() / wanted.norm())


def local_bits(model: nn.Module) -> str:
    digest = hashlib.sha256()
    for parameter in model.parameters():
        gradient = parameter.grad.to_local() if isinstance(parameter.grad, DTensor) else parameter.grad
        digest.update(gradient.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def poison() -> None:
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True


def _gradients(
    rank: int,
    world: int,
    tensor: int,
    data: int,
    shapes: list[tuple[int, int]],
    config: Decoder.Config = CONFIG,
) -> list[str]:
    poison()
    failures = []
    ranks = mesh.build(mesh.Degrees(tensor=tensor, data=data), "cpu")
    settings = itertools.cycle(
        [
            transport.Settings(transport="host"),
            transport.Settings(transport="host", kind="ring", subchunks=2, keep_gather=True),
            transport.Settings(transport="host", subchunks=3, keep_gather=True),
        ]
    )
    for (sequence, size), chosen in zip(shapes, settings, strict=False):
        transport.configure(chosen)
        plain, model = decoder(config), decoder(config)
        apply.parallelize(model, ranks)
        if len(list(plain.parameters())) != len(list(model.parameters())):
            failures.append("a shared parameter became two")
        tokens, targets = batch(sequence, size * data)
        wanted = plain(tokens, targets)
        wanted.backward()
        step(model, ranks, tokens, targets)
        for name, parameter in plain.named_parameters():
            found = off(whole(model.get_parameter(name).grad), parameter.grad)
            if not found <= TOLERANCE:
                failures.append(f"S={sequence} B={size}: {name} off by {found}")
        with torch.no_grad():
            logits = model(tokens)
            columns = plain(tokens).chunk(tensor, dim=-1)[ranks[mesh.TENSOR].get_local_rank()]
            if not off(logits.reshape(columns.shape), columns) <= TOLERANCE:
                failures.append(f"S={sequence} B={size}: logits")
    return failures


@pytest.mark.parametrize(
    ("tensor", "data", "shapes"),
    [
        (2, 1, [(16, 2), (15, 1), (3, 1)]),
        (4, 1, [(16, 2), (15, 2), (3, 1), (15, 1)]),
        (1, 2, [(16, 1)]),
        (2, 2, [(15, 1), (16, 1), (3, 2)]),
    ],
)
def test_gradients_equal_those_of_one_process(tensor: int, data: int, shapes: list[tuple[int, int]]) -> None:
    world = tensor * data
    assert run_distributed(_gradients, world, tensor, data, shapes) == [[]] * world


@pytest.mark.parametrize(("tensor", "data"), [(2, 1), (1, 2), (2, 2)])
def test_a_table_that_is_the_output_projection_too_stays_one(tensor: int, data: int) -> None:
    world = tensor * data
    shapes = [(15, 1), (16, 2)]
    assert run_distributed(_gradients, world, tensor, data, shapes, TIED) == [[]] * world


def _tied_apart(rank: int, world: int) -> str:
    plan = styles.VocabularyParallel(rows := styles.Rows())
    try:
        apply.parallelize(decoder(TIED), mesh.build(mesh.Degrees(tensor=2), "cpu"), {"embedding": plan})
    except UserError as error:
        return str(error)
    return f"accepted with {rows}"


def test_a_plan_that_shards_half_of_a_shared_parameter_is_refused() -> None:
    for message in run_distributed(_tied_apart, 2):
        assert message.startswith("head.weight and embedding.weight are one parameter, but the parallel plan")


def _one_rank(rank: int, world: int) -> list[str]:
    poison()
    different = []
    ranks = mesh.build(mesh.Degrees(), "cpu")
    plain, model = decoder(), decoder()
    assert apply.parallelize(model, ranks) is model
    for sequence, size in ((16, 2), (15, 1)):
        tokens, targets = batch(sequence, size)
        wanted = plain(tokens, targets)
        wanted.backward()
        if not torch.equal(step(model, ranks, tokens, targets), wanted):
            different.append("loss")
        for (name, ours), theirs in zip(model.named_parameters(), plain.parameters(), strict=True):
            if type(ours) is not nn.Parameter or not torch.equal(ours.grad, theirs.grad):
                different.append(name)
    if transport.in_use():
        different.append("a transport was made for one rank")
    return different


def test_one_rank_is_the_plain_model_to_the_bit() -> None:
    assert run_distributed(_one_rank, 1) == [[]]


def _bits(rank: int, world: int, tensor: int, data: int) -> list[tuple[float, str]]:
    """Loss and gradients of one step under settings that must not matter, the first of them twice."""
    poison()
    ranks, found = mesh.build(mesh.Degrees(tensor=tensor, data=data), "cpu"), []
    for settings in (
        transport.Settings(transport="host"),
        transport.Settings(transport="host"),
        transport.Settings(transport="group"),
        transport.Settings(transport="host", subchunks=3),
    ):
        transport.configure(settings)
        model = apply.parallelize(decoder(), ranks)
        found.append((float(step(model, ranks, *batch(15, data))), local_bits(model)))
    return found


@pytest.mark.parametrize(("tensor", "data"), [(2, 1), (2, 2)])
def test_bits_depend_on_neither_run_nor_transport_nor_subchunks(tensor: int, data: int) -> None:
    ranks = run_distributed(_bits, tensor * data, tensor, data)
    for found in ranks:
        assert len(set(found)) == 1
    if data == 1:
        assert run_distributed(_bits, tensor, tensor, data) == ranks


def _sites(rank: int, world: int) -> set[str]:
    ranks = mesh.build(mesh.Degrees(tensor=2), "cpu")
    model = apply.parallelize(decoder(), ranks)
    return {module.site for module in model.modules() if hasattr(module, "site")}


def test_every_product_knows_its_place_in_the_model() -> None:
    layers = ("attention.qkv", "attention.out", "mlp.gate_up", "mlp.down")
    wanted = {f"layers.{i}.{layer}" for i in range(CONFIG.layers) for layer in layers}
    assert run_distributed(_sites, 2) == [wanted | {"embedding", "head"}] * 2
