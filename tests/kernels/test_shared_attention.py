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
from flashtrain.kernels.shared_attention.config import Blocks, refusal
from tests.kernels.interpreter import DEVICE, interpreted

with interpreted():
    from flashtrain.kernels.shared_attention import triton as kernels

SMALL = Blocks(queries=16, keys=32, warps=4, stages=1)
SQUARE = Blocks(queries=16, keys=16, warps=4, stages=1)


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
    monkeypatch.setattr(op, "_kernels", lambda query: kernels)
    monkeypatch.setattr(kernels.configs, "choice", lambda dtype, width: kernels.configs.Choice(*[SMALL] * 4))
    found = outcome(deferred, given)
    for one, other in zip(found, true, strict=True):
        assert one.isfinite().all(), "an element was not written"
        torch.testing.assert_close(one.double(), other, rtol=1e-5, atol=1e-5)
    for one, other in zip(found, outcome(deferred, given), strict=True):
        assert torch.equal(one, other), "other bits in a second run"


def source_arguments(layers: int, dtype: torch.dtype = torch.float32) -> list[Any]:
    query, key, value, *values = (t.to(dtype) for t in heads(2, 4, 2, 40, 16, layers))
    slopes = [random(*query.shape, seed=50 + i).to(dtype) for i in range(layers + 1)]
    output, lse = reference.attend(query, key, value)
    return [query, key, lse, reference.row_sums(slopes[0], output), slopes[0], value, slopes[1:], values]


def wide(arguments: list[Any]) -> list[Any]:
    return [[t.double() for t in a] if isinstance(a, list) else a.double() for a in arguments]


@pytest.mark.parametrize("scratch", [0, 1, 40_000, 1 << 20])
def test_little_memory_for_score_gradients_takes_more_launches(scratch: int, poisoned_memory: None) -> None:
    arguments = source_arguments(2)
    true = reference.source_gradient(*wide(arguments))
    found = kernels.source_gradient(*arguments, blocks=(SMALL, SMALL), scratch=scratch)
    for one, other in zip(found, true, strict=True):
        assert error(one, other) < 1e-6


def test_layers_of_unlike_layout_are_copied() -> None:
    arguments = source_arguments(3)
    arguments[6][1] = arguments[6][1].contiguous()
    arguments[7][2] = torch.cat([arguments[7][2]] * 2, dim=3)[..., :16]
    arguments[7][0] = torch.cat([arguments[7][0].flatten(), torch.zeros(1, device=DEVICE)])[1:].view_as(
        arguments[7][0].contiguous()
    )
    true = reference.source_gradient(*wide(arguments))
    for one, other in zip(kernels.source_gradient(*arguments, blocks=(SQUARE, SQUARE)), true, strict=True):
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
    with pytest.raises(ValueError, match="must have tiles of one size"):
        kernels.source_gradient(*source_arguments(1), blocks=(SMALL, SQUARE))


COMPILED = """
import re
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from flashtrain.kernels.shared_attention import backward, forward
from flashtrain.kernels.shared_attention.config import choice
import torch

FP32, NUMBERS = {"lse", "sums", "total"}, {"sequence", "heads", "group", "kv_heads", "count", "members",
                                           "first_pair", "first_member"}
TENSORS = {"q", "k", "v", "o", "slope", "slopes", "values", "scores_out", "scores", "dk", "dv", "dq"}

def ptx(kernel, blocks, **given):
    given |= {"D": 64, "BM": blocks.queries, "BN": blocks.keys, "PRECISION": "tf32", "STAGES": blocks.stages}
    names = [p.name for p in kernel.params]
    kinds = {n: "constexpr" if n in given else "*i64" if n == "places" else "*fp32" if n in FP32 else
             "*bf16" if n in TENSORS else "fp32" if n in ("scale", "sigma") else "i32" for n in names}
    even = {(names.index(n),): [["tt.divisibility", 16]] for n in names
            if n not in NUMBERS and kinds[n] != "fp32" and n not in given}
    source = ASTSource(kernel, kinds, {(names.index(n),): v for n, v in given.items()}, even)
    return compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": blocks.warps}).asm["ptx"]

chosen = choice(torch.bfloat16, 64)
found = {
    "forward": ptx(forward.shared_attention_kernel, chosen.forward, GIVEN=False),
    "values": ptx(backward.value_gradient_kernel, chosen.values, EVEN=True),
    "source": ptx(backward.key_gradient_kernel, chosen.source, ADD=False, EVEN=True),
    "query": ptx(backward.query_gradient_kernel, chosen.query),
}
for name, text in found.items():
    ahead = re.search(r"cp\\.async\\.c[ag][^\\n]*0x10", text) is not None
    print(name, "wgmma" in text, ahead, re.search(r"ld\\.global\\.b16", text) is None)
"""


def test_compiled_for_hopper_tiles_are_loaded_ahead_for_its_tensor_cores() -> None:
    """Needs no GPU. A place that is read from the table must not cost the loads their width."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    ran = subprocess.run(
        [sys.executable, "-c", COMPILED], env=environment, capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.splitlines() == [
        f"{name} True True True" for name in ("forward", "values", "source", "query")
    ]


def test_another_forward_has_the_same_gradients() -> None:
    def other(query: Tensor, key: Tensor, value: Tensor, *values: Tensor) -> list[Tensor]:
        region = op.Pass()
        return [
            region.open(query, key, value),
            *(region.join(v, lambda q, k, w: naive(q, k, w)[0]) for v in values),
        ]

    def plain(query: Tensor, key: Tensor, value: Tensor, *values: Tensor) -> list[Tensor]:
        region = op.Pass()
        return [region.open(query, key, value), *(region.join(own) for own in values)]

    given = [t.double() for t in heads(1, 4, 2, 11, 8, 2)]
    for found, true in zip(outcome(other, given), outcome(plain, given), strict=True):
        assert error(found, true) < 2e-15
