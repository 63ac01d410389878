"""Kernels of shared attention on a GPU: full tiles, every width and dtype, all gradients, against fp64.

Triton 3.4 to 3.7.0 miscompiles some backward kernels on Hopper (flash-linear-attention#640), so every
gradient is compared for every dtype: an error of a thousandth is a rounding, one of a tenth is not.
"""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from flashtrain.kernels.rotary import op as rotary
from flashtrain.kernels.rotary import reference as rotary_reference
from flashtrain.kernels.shared_attention import op, reference
from flashtrain.models.decoder import Decoder
from flashtrain.nn.rotary import rotary_table
from flashtrain.nn.sharing import Sharing

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]
BOUNDS = {torch.bfloat16: 8e-3, torch.float16: 1e-3, torch.float32: 1e-5}


def random(*shape: int, dtype: torch.dtype) -> Tensor:
    """``[B, heads, S, D]`` with the sequence first in memory."""
    batch, heads, sequence, width = shape
    return torch.randn(sequence, batch, heads, width, device="cuda").to(dtype).permute(1, 2, 0, 3)


def heads(
    batch: int, queries: int, kv_heads: int, sequence: int, width: int, layers: int, dtype: torch.dtype
) -> list[Tensor]:
    """Query, key, values of the source and of ``layers`` layers, gradients of all their outputs."""
    kinds = [queries, *([kv_heads] * (layers + 2)), *([queries] * (layers + 1))]
    return [random(batch, count, sequence, width, dtype=dtype) for count in kinds]


def error(found: Tensor, true: Tensor) -> float:
    assert not found.isnan().any(), "an element was not written"
    return float((found.double() - true).norm() / true.norm())


def naive(query: Tensor, key: Tensor, *values: Tensor) -> list[Tensor]:
    group = query.shape[1] // key.shape[1]
    key, *values = (t.repeat_interleave(group, dim=1) for t in (key, *values))
    return [scaled_dot_product_attention(query, key, value, is_causal=True) for value in values]


def deferred(query: Tensor, key: Tensor, value: Tensor, *values: Tensor) -> list[Tensor]:
    region = op.Pass()
    return [region.open(query, key, value), *(region.join(own) for own in values)]


def outcome(function: Any, given: list[Tensor]) -> list[Tensor]:
    count = (len(given) - 1) // 2  # layers, with the source
    leaves = [t.detach().requires_grad_() for t in given[: count + 2]]
    outputs = function(*leaves)
    return [*(y.detach() for y in outputs), *torch.autograd.grad(outputs, leaves, given[count + 2 :])]


def compare(given: list[Tensor], bound: float) -> None:
    true = outcome(naive, [t.double() for t in given])
    found = outcome(deferred, given)
    for number, (one, other) in enumerate(zip(found, true, strict=True)):
        assert error(one, other) < bound, number
    for one, other in zip(found, outcome(deferred, given), strict=True):
        assert torch.equal(one, other), "other bits in a second run"


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("width", [16, 32, 64, 128])
@pytest.mark.parametrize(("sequence", "kv_heads"), [(512, 4), (777, 2), (300, 1), (1, 4)])
def test_every_output_and_gradient_equals_fp64(
    sequence: int, kv_heads: int, width: int, dtype: torch.dtype, poisoned_memory: None
) -> None:
    given = heads(2, 4, kv_heads, sequence, width, 3, dtype)
    if sequence > 1:
        compare(given, BOUNDS[dtype])
    else:  # queries and keys have no gradient, and relative errors no meaning
        for one, other in zip(
            outcome(deferred, given), outcome(naive, [t.double() for t in given]), strict=True
        ):
            torch.testing.assert_close(one.double(), other, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("width", [64, 128])
def test_long_sequences_and_many_layers(width: int) -> None:
    compare(heads(1, 2, 1, 4096, width, 11, torch.bfloat16), BOUNDS[torch.bfloat16])


def test_little_memory_for_score_gradients_gives_the_same_bits() -> None:
    from flashtrain.kernels.shared_attention import triton

    query, key = random(2, 8, 600, 64, dtype=torch.bfloat16), random(2, 2, 600, 64, dtype=torch.bfloat16)
    slopes, values = (torch.randn(2, n, 600, 3, 64, device="cuda").bfloat16() for n in (8, 2))
    output, lse = triton.attend(query, key, values[:, :, :, 0])
    total = triton.take_slope(slopes[:, :, :, 0], output, None, torch.empty_like(output))
    given = (query, key, lse, total, slopes, values)
    whole = triton.score_gradients(*given)
    true = reference.score_gradients(*(t.double() for t in given))
    for scratch in (0, 4 << 20):
        found = triton.score_gradients(*given, scratch=scratch)
        for one, other, exact in zip(found, whole, true, strict=True):
            assert error(one, exact) < 8e-3
            assert error(one, other.double()) < 3e-3
    assert torch.equal(triton.score_gradients(*given, scratch=4 << 20)[0], whole[0])


def test_more_layers_compile_nothing_new() -> None:
    from flashtrain.kernels.shared_attention.backward import score_gradient_kernel

    sizes = []
    for layers in (2, 3, 16, 1):
        outcome(deferred, heads(1, 4, 2, 256, 64, layers, torch.bfloat16))
        caches = score_gradient_kernel.device_caches
        sizes.append(sum(len(cache[0]) for cache in caches.values()))
    assert len(set(sizes)) == 1, sizes


def test_query_heads_alone_are_rotated() -> None:
    packed = torch.randn(100, 2, 4 * 64, device="cuda")
    table = rotary_table(100, 64, 1e4, packed.device)
    leaf = packed.clone().requires_grad_()
    found = rotary.rotary_qkv(leaf, table, 4, 1, 0, 0)[0]
    wide = packed.double().requires_grad_()
    true = rotary_reference.rotary_qkv(wide, table.double(), 4, 1, 0, 0)[0]
    assert error(found.detach(), true.detach()) < 1e-6
    slope = torch.randn_like(found)
    found.backward(slope)
    true.backward(slope.double())
    assert leaf.grad is not None
    assert wide.grad is not None
    assert error(leaf.grad, wide.grad) < 1e-6


@pytest.mark.parametrize("sharing", [Sharing(deferred=True), Sharing(deferred=False), Sharing(share="KV")])
def test_a_decoder_whose_layers_share_equals_itself_on_the_cpu(sharing: Sharing) -> None:
    config = Decoder.Config(hidden=256, layers=4, heads=4, kv_heads=2, mlp_width=256, sharing=sharing)
    tokens, targets = torch.randint(0, 256, (2, 200, 2))
    results = []
    for device in ("cpu", "cuda"):
        model = Decoder(replace(config), torch.Generator().manual_seed(0)).to(device)
        loss = model(tokens.to(device), targets.to(device))
        loss.backward()
        gradients = {n: p.grad.cpu().double() for n, p in model.named_parameters() if p.grad is not None}
        results.append((float(loss.detach()), gradients))
    (loss, wanted), (found, gradients) = results
    assert found == pytest.approx(loss, rel=1e-5)
    assert gradients.keys() == wanted.keys()
    for name, gradient in gradients.items():
        assert error(gradient, wanted[name]) < 1e-3, name
