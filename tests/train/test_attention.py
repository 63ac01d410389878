"""Which heads and methods a run measures before it chooses its attention."""

import pytest
import torch

from flashtrain.models.decoder import Decoder
from flashtrain.nn import attend, paired_attention
from flashtrain.nn.attend import Backend, Heads, Settings
from flashtrain.parallel.mesh import Degrees
from flashtrain.train import attention
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
    ("fixed", "refused", "names"),
    [
        (True, False, ["cudnn", "flash"]),
        (False, False, ["cudnn", "flash", "cudnn in a fixed order"]),
        (False, True, ["cudnn", "flash"]),
    ],
)
def test_where_order_is_free_a_fixed_one_may_win(
    fixed: bool, refused: bool, names: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The fastest way is in force afterwards, and pairs of heads keep what was measured for them."""
    model = Decoder.Config(hidden=256, heads=8, kv_heads=4, pairing="gqkva-4.2")
    measured: list[list[str]] = []

    def last(name: str, candidates: list[str], *_: object) -> str:
        measured.append(candidates)
        return candidates[-1]

    def why_not(name: str, heads: Heads, documents: bool, deterministic: bool) -> str | None:
        return "no" if refused and deterministic else None

    monkeypatch.setattr(attention, "_fastest", last)
    monkeypatch.setattr(_Shape, "heads", lambda *_: Heads(*(torch.empty(1, 2, 64, 32) for _ in range(3))))
    monkeypatch.setattr(attend, "candidates", lambda *_: ["cudnn", "flash"])
    monkeypatch.setattr(attend, "why_not", why_not)
    before = attend.settings()
    try:
        attention.prepare(Settings(deterministic=fixed), model, TRAIN, Degrees(), torch.device("cuda"))
        found, preferred = attend.settings(), paired_attention._preferred
    finally:
        attend.configure(before)
        paired_attention.prefer(None)
    assert measured[0] == names
    ordered = fixed or not refused
    assert found == Settings(backend="flash" if names[-1] == "flash" else "cudnn", deterministic=ordered)
    assert preferred == (None if fixed else "kernel")


@pytest.mark.parametrize(
    ("backend", "methods"),
    [("auto", ["expand", "mixed", "kernel"]), ("cudnn", ["expand", "mixed"]), ("flash", ["expand"])],
)
def test_a_backend_that_is_named_is_not_measured_against_others(backend: Backend, methods: list[str]) -> None:
    assert methods_of(backend, Heads(*(torch.empty(1, 2, 64, 32) for _ in range(3)))) == methods
