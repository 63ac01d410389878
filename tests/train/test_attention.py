"""Which heads and methods a run measures before it chooses its attention."""

import pytest
import torch

from flashtrain.models.decoder import Decoder
from flashtrain.nn.attend import Backend, Heads
from flashtrain.parallel.mesh import Degrees
from flashtrain.train.attention import _Shape, methods_of, pairs_of_rank
from flashtrain.train.settings import Training

TRAIN = Training(batch=8, accumulate=2, sequence=64)


@pytest.mark.parametrize(
    ("pairing", "tensor", "measured", "pairs"),
    [
        (None, 2, "[2, 4/2, 64, 32]", None),
        ("gqa-4", 2, "[2, 4/2, 64, 32]", None),
        ("gqa-2", 4, "[2, 2/1, 64, 32]", "0:0 1:0"),  # a group is cut
        ("gqkva-4.2", 1, "[2, 8/2, 64, 32]", "0:0 1:0 2:0 3:0 0:1 1:1 2:1 3:1"),
        ("gqkva-4.2", 2, "[2, 4/1, 64, 32]", "0:0 1:0 2:0 3:0"),
        ("mkva", 2, "[2, 4/4, 64, 32]", "0:0 0:1 0:2 0:3"),
    ],
)
def test_the_heads_of_a_rank_are_measured(
    pairing: str | None, tensor: int, measured: str, pairs: str | None
) -> None:
    model = Decoder.Config(hidden=256, heads=8, kv_heads=4, pairing=pairing)
    degrees = Degrees(tensor=tensor, data=2)
    own = pairs_of_rank(model, degrees)
    assert (None if own is None else " ".join(f"{i}:{j}" for i, j in own.pairs)) == pairs
    assert str(_Shape.of(model, own, TRAIN, degrees)) == measured


@pytest.mark.parametrize(
    ("backend", "methods"),
    [("auto", ["expand", "mixed", "kernel"]), ("cudnn", ["expand", "mixed"]), ("flash", ["expand"])],
)
def test_a_backend_that_is_named_is_not_measured_against_others(backend: Backend, methods: list[str]) -> None:
    assert methods_of(backend, Heads(*(torch.empty(1, 2, 64, 32) for _ in range(3)))) == methods
