"""Attention whose queries and keys serve several layers: reference against autograd, kernels against fp64."""

import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from flashtrain.kernels.shared_attention import op, reference
from flashtrain.kernels.shared_attention.config import Blocks, Choice, refusal
from tests.kernels.interpreter import DEVICE, interpreted

with interpreted():
    from flashtrain.kernels.shared_attention import triton as kernels

SQUARE = Blocks(queries=16, keys=16, warps=4, stages=1)
SMALL = Choice(
    values=Blocks(queries=16, keys=32, warps=4, stages=1), scores=SQUARE, products=SQUARE, depth=32
)


def random(*shape: int, seed: int = 0) -> Tensor:
    """``[B, heads, S, D]`` with the sequence first in memory, as projections give it."""
    batch, heads, sequence, width = shape
    draw = torch.Generator().manual_seed(sum(shape) + seed)
    return torch.randn(sequence, batch, heads, width, generator=draw).permute(1, 2, 0, 3).to(DEVICE)


def heads(batch: int, queries: int, kv_heads: int, sequence: int, width: int, layers: int) -> list[Tensor]:
    """Query, key, the source's value and those of ``layers`` layers that share."""
    query = random(batch, queries, sequence, width)
    return [query, *(random(batch, kv_heads, sequence, width, seed=i + 1) for i in range(layers + 2))]


def naive(query: Tensor, key: Tensor, value: Tensor, *values: Tensor) -> list[Tensor]:
    group = query.shape[1] // key.shape[1]

    def attend(own: Tensor) -> Tensor:
        wide = (t.repeat_interleave(group, dim=1) for t in (key, own))
        return scaled_dot_product_attention(query, *wide, is_causal=True)

    return chain(attend(value), attend, values)


def deferred(query: Tensor, key: Tensor, value: Tensor, *values: Tensor) -> list[Tensor]:
    region = op.Pass()
    return chain(region.open(query, key, value), region.join, values)


def joined(query: Tensor, key: Tensor, value: Tensor, *values: Tensor) -> list[Tensor]:
    """The same with values that hang on no other layer."""
    region = op.Pass()
    return [region.open(query, key, value), *(region.join(own) for own in values)]


def chain(first: Tensor, attend: Any, values: tuple[Tensor, ...]) -> list[Tensor]:
    """Outputs of all layers; each one's values hang on the layer before, as in a model."""
    outputs = [first]
    for own in values:
        outputs.append(attend(own + outputs[-1][:, : own.shape[1]]))
    return outputs


def outcome(function: Any, given: list[Tensor]) -> list[Tensor]:
    """Outputs of all layers and the gradients of all that is given."""
    leaves = [t.detach().requires_grad_() for t in given]
    outputs = function(*leaves)
    slopes = [random(*y.shape, seed=90 + i).to(y) for i, y in enumerate(outputs)]
    return [*(y.detach() for y in outputs), *torch.autograd.grad(outputs, leaves, slopes)]


def error(found: Tensor, true: Tensor) -> float:
    assert found.isfinite().all(), "an element was not written"
    return float((found.double() - true.double()).norm() / true.double().norm())


@pytest.mark.parametrize("layers", [0, 1, 3])
def test_deferred_gradients_are_those_of_autograd(layers: int) -> None:
    given = [t.double() for t in heads(2, 4, 2, 13, 8, layers)]
    for found, true in zip(outcome(deferred, given), outcome(naive, given), strict=True):
        assert error(found, true) < 2e-15


@pytest.mark.parametrize(
    ("sizes", "layers"),
    [((2, 4, 2, 37, 16), 2), ((1, 2, 2, 32, 32), 1), ((1, 3, 1, 50, 16), 3), ((1, 1, 1, 1, 16), 1)],
)
def test_kernels_equal_fp64(
    sizes: tuple[int, ...], layers: int, monkeypatch: pytest.MonkeyPatch, poisoned_memory: None
) -> None:
    batch, queries, kv_heads, sequence, width = sizes
    given = heads(batch, queries, kv_heads, sequence, width, layers)
    true = outcome(naive, [t.double() for t in given])
    monkeypatch.setattr(op, "_at", lambda query: kernels)
    monkeypatch.setattr(kernels.configs, "choice", lambda dtype, width: SMALL)
    found = outcome(deferred, given)
    for one, other in zip(found, true, strict=True):
        assert one.isfinite().all(), "an element was not written"
        torch.testing.assert_close(one.double(), other, rtol=1e-5, atol=1e-5)
    for one, other in zip(found, outcome(deferred, given), strict=True):
        assert torch.equal(one, other), "other bits in a second run"


def score_arguments(layers: int) -> list[Tensor]:
    query, key, *_ = heads(2, 4, 2, 40, 16, layers)
    slopes, values = (
        torch.stack([random(2, n, 40, 16, seed=50 + n + i) for i in range(layers)], dim=3) for n in (4, 2)
    )
    output, lse = reference.attend(query, key, values[:, :, :, 0])
    total = reference.take_slope(slopes[:, :, :, 0], output, None, torch.empty_like(output))
    return [query, key, lse, total, slopes, values]


@pytest.mark.parametrize("scratch", [0, 1, 40_000, 1 << 20])
def test_little_memory_for_score_gradients_takes_more_launches(scratch: int, poisoned_memory: None) -> None:
    arguments = score_arguments(3)
    true = reference.score_gradients(*(t.double() for t in arguments))
    found = kernels.score_gradients(*arguments, choice=SMALL, scratch=scratch)
    for one, other in zip(found, true, strict=True):
        assert error(one, other) < 1e-6


def test_layers_that_gave_nothing_are_left_out(
    monkeypatch: pytest.MonkeyPatch, poisoned_memory: None
) -> None:
    """A layer whose output nobody uses has no backward pass, and its place in memory is never written."""
    given = heads(1, 2, 1, 40, 16, 2)
    for at in (reference, kernels):
        monkeypatch.setattr(op, "_at", lambda query, at=at: at)
        monkeypatch.setattr(kernels.configs, "choice", lambda dtype, width: SMALL)

        found = outcome(lambda *leaves: [*deferred(*leaves)[:2], leaves[4]], given)
        true = outcome(lambda *leaves: [*naive(*leaves)[:2], leaves[4]], [t.double() for t in given])
        for one, other in zip(found, true, strict=True):
            assert error(one, other) < 1e-5


def test_values_may_lie_in_memory_as_they_like() -> None:
    query, key, value, *others = heads(1, 2, 1, 9, 8, 3)
    others[0] = torch.cat([torch.zeros(1, device=DEVICE), others[0].flatten()])[1:].view(others[0].shape)
    others[1] = torch.stack([others[1]] * 2, dim=-1)[..., 0]

    given = [query, key, value, *others]
    true = outcome(joined, [t.double() for t in given])
    for one, other in zip(outcome(joined, given), true, strict=True):
        assert error(one, other) < 1e-6


def test_a_layer_that_does_not_follow_gives_the_source_nothing() -> None:
    given = [t.double() for t in heads(1, 2, 1, 9, 8, 1)]

    def alone(query: Tensor, key: Tensor, *values: Tensor) -> list[Tensor]:
        region = op.Pass(follow=False)
        return [region.open(query, key, values[0]), region.join(values[1])]

    found = outcome(alone, given)
    query, key, value, other = (t.requires_grad_() for t in given)
    first, second = naive(query, key, value), naive(query.detach(), key.detach(), other)
    slopes = [random(*y.shape, seed=90 + i).to(y) for i, y in enumerate((*first, *second))]
    true = torch.autograd.grad([*first, *second], [query, key, value, other], slopes)
    for one, gradient in zip(found[2:], true, strict=True):
        assert error(one, gradient) < 2e-15


def test_sizes_without_kernels_are_named() -> None:
    assert refusal(torch.bfloat16, 64) is None
    assert "not torch.float64" in str(refusal(torch.float64, 64))
    assert "not 96: set model.sharing.deferred to false" in str(refusal(torch.bfloat16, 96))
    with pytest.raises(ValueError, match="must have square tiles of one size"):
        Choice(values=SQUARE, scores=SQUARE, products=SMALL.values)
    with pytest.raises(ValueError, match="must divide its keys"):
        Choice(values=Blocks(queries=32, keys=16, warps=4, stages=1), scores=SQUARE, products=SQUARE)


COMPILED = """
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from flashtrain.kernels.shared_attention import backward
from flashtrain.kernels.shared_attention.config import choice
import re
import torch

FLOATS, POINTERS = {"scale", "root", "sigma"}, {"dv": "*bf16", "dq": "*bf16", "dk": "*bf16",
                                                "tiles_out": "*bf16", "order": "*i32"}

def facts(kernel, width, blocks, **given):
    given |= {"D": width, "PRECISION": "tf32", "STAGES": blocks.stages}
    rows, keys = blocks.queries, blocks.keys
    boxes = {"q_desc": (rows, width), "s_desc": (rows, width), "k_desc": (keys, width),
             "slopes_desc": (rows, 64), "values_desc": (keys, 64)}
    kinds = {name: f"tensordesc<bf16[1,1,{box[0]},{box[1]}]>" for name, box in boxes.items()}
    kinds |= {"tiles_desc": f"tensordesc<bf16[{keys},{rows}]>"} | dict.fromkeys(FLOATS, "fp32") | POINTERS
    kinds |= dict.fromkeys(("lse_desc", "sums_desc"), f"tensordesc<fp32[1,{rows}]>")
    names = [p.name for p in kernel.params]
    signature = {n: "constexpr" if n in given else kinds.get(n, "i32") for n in names}
    even = {(names.index(n),): [["tt.divisibility", 16]] for n in names if n in POINTERS or n[1:] == "_time"}
    source = ASTSource(kernel, signature, {(names.index(n),): v for n, v in given.items()}, even)
    options = {"num_warps": blocks.warps} | {k: v for k, v in blocks.launch.items() if k == "maxnreg"}
    asm = compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm
    return "wgmma" in asm["ptx"], "cp.async.bulk.tensor" in asm["ptx"], "mma.sync" in asm["ptx"]

for width in (64, 128):
    chosen = choice(torch.bfloat16, width)
    tile = chosen.scores.keys
    found = {
        "values": facts(backward.value_gradient_kernel, width, chosen.values, BM=chosen.values.queries,
                            BN=chosen.values.keys),
        "scores": facts(backward.score_gradient_kernel, width, chosen.scores, TILE=tile, BK=chosen.depth),
        "queries": facts(backward.query_gradient_kernel, width, chosen.products, TILE=tile),
        "keys": facts(backward.key_gradient_kernel, width, chosen.products, TILE=tile, ADD=False),
    }
    for name, seen in found.items():
        print(name, *seen)
"""


def test_compiled_for_hopper_tiles_come_through_tma_to_its_tensor_cores() -> None:
    """Needs no GPU."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    ran = subprocess.run(
        [sys.executable, "-c", COMPILED], env=environment, capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stderr
    names = ("values", "scores", "queries", "keys")
    assert ran.stdout.splitlines() == [f"{name} True True False" for name in names * 2]


def test_another_forward_has_the_same_gradients() -> None:
    def other(query: Tensor, key: Tensor, value: Tensor, *values: Tensor) -> list[Tensor]:
        region = op.Pass()
        return [
            region.open(query, key, value),
            *(region.join(v, lambda q, k, w: naive(q, k, w)[0]) for v in values),
        ]

    given = [t.double() for t in heads(1, 4, 2, 11, 8, 2)]
    for found, true in zip(outcome(other, given), outcome(joined, given), strict=True):
        assert error(found, true) < 2e-15
