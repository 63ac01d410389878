"""Recomputed activations: the same bits, less memory, and no product or transfer twice but under full."""

import weakref
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from flashtrain.comm import transport
from flashtrain.data import Corpus
from flashtrain.models.decoder import Decoder
from flashtrain.nn import shared_attention
from flashtrain.nn.region import Region, region
from flashtrain.nn.sharing import Sharing
from flashtrain.parallel.data import Sharding
from flashtrain.parallel.mesh import Degrees
from flashtrain.parallel.recompute import Policy, recompute
from flashtrain.train.settings import Training
from flashtrain.train.trainer import Trainer
from tests.distributed import run_distributed

POLICIES: tuple[Policy, ...] = ("none", "pointwise", "attention", "full")
CONFIG = Decoder.Config(vocabulary=64, hidden=64, layers=2, heads=4, kv_heads=2, mlp_width=128)


class _Counts(TorchDispatchMode):
    """How often each op ran, where a checkpoint did not answer for it."""

    def __init__(self) -> None:
        super().__init__()
        self.ran: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.ran[func.name().partition(".")[0]] += 1
        return func(*args, **(kwargs or {}))


def model_of(policy: Policy, config: Decoder.Config = CONFIG) -> Decoder:
    model = Decoder(config, torch.Generator().manual_seed(0))
    recompute(model.layers, policy)
    return model


def batch() -> tuple[Tensor, Tensor]:
    tokens = torch.randint(0, 64, (32, 2), generator=torch.Generator().manual_seed(1))
    return tokens, tokens.roll(-1, 0)


def passes(policy: Policy) -> tuple[Tensor, dict[str, Tensor], Counter[str]]:
    """Loss, gradients, and how often each op ran."""
    model = model_of(policy)
    with _Counts() as counts:
        loss = model(*batch())
        loss.backward()
    return loss.detach(), {n: p.grad for n, p in model.named_parameters()}, counts.ran


def test_bits_stay_and_only_the_named_ops_run_again() -> None:
    plain_loss, plain, once = passes("none")
    again = {}
    for policy in POLICIES[1:]:
        loss, grads, ran = passes(policy)
        assert torch.equal(loss, plain_loss)
        for name, gradient in grads.items():
            assert torch.equal(gradient, plain[name]), f"{policy}: {name}"
        again[policy] = {name for name in ran if ran[name] > once[name]}
    attention = "aten::_scaled_dot_product_flash_attention_for_cpu"
    assert "aten::silu" in again["pointwise"]
    assert not {"aten::mm", attention} & again["pointwise"]
    assert attention in again["attention"]
    assert "aten::mm" not in again["attention"]
    assert {"aten::mm", attention} <= again["full"]


SHARING = {
    "deferred": Sharing(deferred=True),
    "layer by layer": Sharing(deferred=False),
    "source alone": Sharing(deferred=False, grad_to_source=False),
    "KV": Sharing(share="KV", source="0_0_2_2"),
    "fresh": Sharing(share="KV", kv_origin="fresh"),
}


@pytest.mark.parametrize("name", SHARING)
def test_layers_that_share_heads_run_again_to_the_bit(name: str) -> None:
    config = replace(CONFIG, layers=4, sharing=SHARING[name])
    found = {}
    for policy in POLICIES:
        model = model_of(policy, config)
        losses = []
        # The backward passes of two micro-batches come after both forward passes, the first one's first.
        for tokens in (batch(), batch()[::-1]):
            losses.append(model(*tokens))
        with _Counts() as counts:
            for loss in losses:
                loss.backward()
        grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        found[policy] = [loss.detach() for loss in losses], grads, counts.ran["aten::silu"]
        assert not model.layers[-1].attention.handover.regions
        loss = model(*batch())  # and a third pass, after reruns
        assert torch.equal(loss, found["none"][0][0])
    wanted = found.pop("none")
    for policy, (losses, grads, runs) in found.items():
        assert list(map(torch.equal, losses, wanted[0])) == [True, True], policy
        assert grads.keys() == wanted[1].keys()
        for parameter, gradient in grads.items():
            assert torch.equal(gradient, wanted[1][parameter]), f"{policy}: {parameter}"
        assert runs == 2 * config.layers


@pytest.mark.parametrize("policy", POLICIES)
def test_shared_heads_are_let_go_after_the_backward_pass(
    policy: Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[weakref.ref[Region]] = []

    def remembered(*arguments: Any) -> Region:
        made = region(*arguments)
        opened.append(weakref.ref(made))
        return made

    monkeypatch.setattr(shared_attention, "region", remembered)
    model = model_of(policy, replace(CONFIG, layers=4, sharing=SHARING["layer by layer"]))
    loss = model(*batch())
    assert [one() for one in opened] != [None]
    loss.backward()
    assert [one() for one in opened] == [None] * len(opened)


def test_evaluation_is_left_alone() -> None:
    with torch.no_grad():
        assert torch.equal(model_of("full")(*batch()), model_of("none")(*batch()))


def _ranks(rank: int, world: int, text: Path) -> dict[str, Any]:
    """Losses, gradient norms, and bytes that the last step sent: by policy, and by how blocks are sharded."""
    variants: dict[str, tuple[Policy, Sharding, Sharing | None]] = {
        policy: (policy, Sharding(), None) for policy in POLICIES
    }
    if world > 2:
        variants["kept"] = "none", Sharding(reshard=False), None
        variants["ahead"] = "full", Sharding(prefetch=2), None
    for policy in ("none", "pointwise", "full"):
        variants[f"shared {policy}"] = policy, Sharding(), Sharing()
    if world > 2:
        variants["shared ahead"] = "pointwise", Sharding(prefetch=3), Sharing()
    results: dict[str, Any] = {}
    for name, (policy, sharding, sharing) in variants.items():
        config = Trainer.Config(
            model=Decoder.Config(hidden=64, layers=4, heads=4, kv_heads=2, mlp_width=128, sharing=sharing),
            data=Corpus.Config(source=str(text)),
            train=Training(
                steps=3,
                batch=4,
                sequence=30,
                evaluation_windows=4,
                recompute=policy,
                document_mask=sharing is None,
            ),
            parallel=Degrees(tensor=2, data=world // 2),
            comm=transport.Settings(timeout=60),
            fsdp=sharding,
        )
        transport.configure(config.comm)
        trainer = Trainer(config, Path("unused"))
        trainer._build(torch.device("cpu"))
        if sharing is not None:
            trainer.model.share(1)  # of two that may, so that one gathers what the other does without
        steps = [trainer.step(step, 1e-3, trainer.batches.of(step)) for step in (1, 2)]
        sent = sum(mover.traffic.bytes_sent for mover in transport.in_use())
        results[name] = [(step.loss, step.grad_norm) for step in steps], sent
    return results


@pytest.mark.parametrize("world", [2, 4])
def test_bits_stay_under_tensor_and_data_parallelism(world: int, tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.mkdir()
    for name in "abcdefghijkl":
        (text / f"{name}.txt").write_text(f"document {name} " * 12)
    for results in run_distributed(_ranks, world, text):
        shared = {name: results.pop(f"shared {name}") for name in ("none", "pointwise", "full")}
        assert shared["none"] == shared["pointwise"]
        assert shared["none"][0] == shared["full"][0]
        if world > 2:
            assert results.pop("shared ahead") == shared["none"]
        losses, sent = results.pop("none")
        for name, (other, _) in results.items():
            assert other == losses, name
        # A product that is kept is not sent again; one that runs again is.
        assert results["pointwise"][1] == results["attention"][1] == sent
        assert results["full"][1] > sent
        if world > 2:
            assert results["kept"][1] < sent
            assert results["ahead"][1] == results["full"][1]
