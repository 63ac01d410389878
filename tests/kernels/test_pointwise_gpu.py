"""RMSNorm, SwiGLU and rotary heads on a GPU: every dtype, ragged sizes, gradients too, against fp64."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from flashtrain.kernels.rms_norm import op as norm
from flashtrain.kernels.rms_norm import reference as norm_reference
from flashtrain.kernels.rotary import op as rotary
from flashtrain.kernels.rotary import reference as rotary_reference
from flashtrain.kernels.swiglu import op as swiglu
from flashtrain.kernels.swiglu import reference as swiglu_reference
from flashtrain.models.decoder import Decoder
from flashtrain.nn.rotary import rotary_table

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]
BOUNDS = {torch.bfloat16: 4e-3, torch.float16: 6e-4, torch.float32: 5e-6}
EPSILON = 1e-5


def random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, device="cuda").to(dtype)


def error(found: Tensor, true: Tensor) -> float:
    assert not found.isnan().any(), "an element was not written"
    return float((found.double() - true).norm() / true.norm())


def outcome(function: Callable[..., Any], given: list[Tensor], slopes: list[Tensor]) -> list[Tensor]:
    leaves = [t.detach().requires_grad_() for t in given]
    found = function(*leaves)
    outputs = found if isinstance(found, tuple) else (found,)
    used = [slope.to(y.dtype) for slope, y in zip(slopes, outputs, strict=True)]
    return [*(y.detach() for y in outputs), *torch.autograd.grad(outputs, leaves, used)]


def compare(
    function: Callable[..., Any],
    wide: Callable[..., Any],
    given: list[Tensor],
    slopes: list[Tensor],
    bound: float,
) -> None:
    """Every output and gradient within ``bound`` of fp64, and the same bits in a second run."""
    true = outcome(wide, [t.double() for t in given], slopes)
    found = outcome(function, given, slopes)
    for number, (one, other) in enumerate(zip(found, true, strict=True)):
        assert error(one, other) < bound, f"result {number}"
    for one, other in zip(found, outcome(function, given, slopes), strict=True):
        assert torch.equal(one, other), "other bits in a second run"


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize(
    ("rows", "width"), [(3000, 4096), (1001, 5120), (4099, 192), (70, 14336), (1, 8192), (513, 100)]
)
def test_norm_equals_fp64(rows: int, width: int, dtype: torch.dtype, poisoned_memory: None) -> None:
    x, residual, dy, straight = (random(rows, 1, width, dtype=dtype) for _ in range(4))
    for weight in (random(width, dtype=dtype), random(width)):
        compare(
            lambda *t: norm.add_rms_norm(*t, EPSILON),
            lambda *t: norm_reference.add_rms_norm(*t, EPSILON),
            [x, residual, weight],
            [dy, straight],
            BOUNDS[dtype],
        )
        compare(
            lambda *t: norm.rms_norm(*t, EPSILON),
            lambda *t: norm_reference.rms_norm(*t, EPSILON),
            [x, weight],
            [dy],
            BOUNDS[dtype],
        )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_norm_rounds_as_the_two_steps_do(dtype: torch.dtype) -> None:
    x, residual = (random(500, 4096, dtype=dtype) for _ in range(2))
    weight = random(4096, dtype=dtype)
    normed, total = norm.add_rms_norm(x, residual, weight, EPSILON)
    assert torch.equal(total, x + residual)
    wanted = nn.functional.rms_norm(total, weight.shape, weight, EPSILON)
    assert (normed != wanted).float().mean() < 0.01
    assert torch.equal(norm.rms_norm(total, weight, EPSILON), normed)


@pytest.mark.parametrize("width", [64, 1024, 4096, 5120, 8192, 16384])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_every_launch_of_the_norm_has_the_resources(width: int, dtype: torch.dtype) -> None:
    from flashtrain.kernels.rms_norm import triton as kernels

    x, residual, weight = random(300, width, dtype=dtype), random(300, width, dtype=dtype), random(width)
    for added in (residual, None):
        y, total = kernels.forward(x, added, weight, EPSILON)
        assert kernels.backward(y, added, total, weight, EPSILON)[0].isfinite().all()


def test_norm_of_no_rows() -> None:
    x, weight = random(0, 2, 64).requires_grad_(), random(64).requires_grad_()
    norm.rms_norm(x, weight).sum().backward()
    assert weight.grad is not None
    assert not weight.grad.any()


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("shape", [(1000, 2, 4096), (333, 128), (7, 28672)])
def test_swiglu_equals_fp64(shape: tuple[int, ...], dtype: torch.dtype, poisoned_memory: None) -> None:
    slope = random(*shape[:-1], shape[-1] // 2, dtype=dtype)
    packed = 3 * random(*shape, dtype=dtype)
    compare(swiglu.swiglu, swiglu_reference.swiglu, [packed], [slope], BOUNDS[dtype])


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize(
    ("heads", "width"), [((8, 4, 1, 1), 128), ((1, 32, 8, 8), 64), ((3, 2, 1, 1), 80), ((2, 1, 1, 1), 256)]
)
@pytest.mark.parametrize(("sequence", "batch"), [(515, 2), (1, 3)])
def test_rotary_equals_fp64(
    heads: tuple[int, int, int, int],
    width: int,
    sequence: int,
    batch: int,
    dtype: torch.dtype,
    poisoned_memory: None,
) -> None:
    units, *each = heads
    packed = random(sequence, batch, units * sum(each) * width, dtype=dtype)
    table = rotary_table(sequence, width, 10_000.0, packed.device, first=100)
    # As attention gives gradients: heads first in memory for the query, sequence first for the others.
    slopes = [random(batch, units * each[0], sequence, width, dtype=dtype)]
    slopes += [random(sequence, batch, units * n, width, dtype=dtype).permute(1, 2, 0, 3) for n in each[1:]]
    compare(
        lambda t: rotary.rotary_qkv(t, table, *heads),
        lambda t: rotary_reference.rotary_qkv(t, table, *heads),
        [packed],
        slopes,
        BOUNDS[dtype],
    )


@pytest.mark.parametrize("backend", ["FLASH_ATTENTION", "CUDNN_ATTENTION"])
def test_attention_takes_the_heads_and_keeps_the_sequence_first(backend: str) -> None:
    packed = random(256, 2, 8 * 3 * 128, dtype=torch.bfloat16)
    table = rotary_table(256, 128, 10_000.0, packed.device)
    with torch.nn.attention.sdpa_kernel(getattr(torch.nn.attention.SDPBackend, backend)):
        mixed = scaled_dot_product_attention(*rotary.rotary_qkv(packed, table, 8, 1, 1, 1), is_causal=True)
    assert mixed.permute(2, 0, 1, 3).is_contiguous(), "the output projection would copy it"


def test_the_ops_pass_opcheck() -> None:
    x, residual, weight = (random(*shape).requires_grad_() for shape in ((5, 64), (5, 64), (64,)))
    torch.library.opcheck(norm.norm_kernels.traced, (x, weight, EPSILON))
    torch.library.opcheck(norm.add_norm_kernels.traced, (x, residual, weight, EPSILON))
    torch.library.opcheck(swiglu.swiglu_kernels.traced, (random(5, 256).requires_grad_(),))
    table = rotary_table(5, 8, 10_000.0, x.device)
    torch.library.opcheck(
        rotary.rotary_kernels.traced, (random(5, 2, 96).requires_grad_(), table, 3, 2, 1, 1)
    )


def test_a_decoder_equals_itself_in_fp64() -> None:
    """Loss and every gradient, with the kernels in fp32 and bf16, against torch's own code in fp64."""
    config = Decoder.Config(hidden=256, layers=2, heads=4, kv_heads=2, mlp_width=512)
    tokens, targets = torch.randint(0, 256, (2, 130, 3), device="cuda")
    found = {}
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        model = Decoder(config, torch.Generator().manual_seed(0)).to("cuda", dtype)
        loss = model(tokens, targets)
        loss.backward()
        found[dtype] = {"loss": loss.detach()} | {n: p.grad for n, p in model.named_parameters()}
    for dtype, bound in ((torch.float32, 1e-4), (torch.bfloat16, 6e-2)):
        for name, true in found[torch.float64].items():
            assert true is not None
            one = found[dtype][name]
            assert one is not None
            assert error(one, true) < bound, f"{name} in {dtype}"
