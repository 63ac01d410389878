"""The ops that ``pointwise.py`` times, on the inputs of a Llama-8B layer, and what they are compared with."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import rms_norm, silu

from flashtrain.kernels.embedding import op as embedding
from flashtrain.kernels.rms_norm import op as norm
from flashtrain.kernels.rms_norm import reference as norm_reference
from flashtrain.kernels.rotary import op as rotary
from flashtrain.kernels.rotary import reference as rotary_reference
from flashtrain.kernels.swiglu import op as swiglu
from flashtrain.kernels.swiglu import reference as swiglu_reference
from flashtrain.kernels.weight_gradient import WeightGradient
from flashtrain.nn.rotary import rotary_table

HIDDEN, WIDTH, HEADS, KV_HEADS, HEAD_WIDTH = 4096, 14336, 32, 8, 128
GROUP, EPSILON = HEADS // KV_HEADS, 1e-5
PACKED = (HEADS + 2 * KV_HEADS) * HEAD_WIDTH
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
Function = Callable[..., Any]


@dataclass
class Liger:
    """Liger's function of its own inputs; ``restore`` undoes what its backward pass writes over them."""

    function: Function
    inputs: list[Tensor]
    slopes: list[Tensor]
    restore: Callable[[], Any] = lambda: None


@dataclass
class Case:
    """One op: what is compared, on which inputs, and how many bytes move each way at least."""

    name: str
    ours: Function
    eager: Function
    wide: Function
    inputs: list[Tensor]
    slopes: list[Tensor]
    moved: tuple[int, int]
    liger: Liger | None


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, device=DEVICE).to(torch.bfloat16)


def eager_add_norm(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    total = x + residual
    return rms_norm(total, weight.shape, weight, EPSILON), total


def eager_swiglu(packed: Tensor) -> Tensor:
    gate, up = packed.unflatten(-1, (-1, 2, swiglu.PACKING)).unbind(-2)
    return (silu(gate) * up).flatten(-2)


def eager_rotary(packed: Tensor, table: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """In the activations' dtype, as models usually have it."""
    heads = packed.unflatten(-1, (KV_HEADS, GROUP + 2, HEAD_WIDTH)).permute(1, 2, 3, 0, 4)
    cosine, sine = table.to(packed.dtype)

    def rotate(x: Tensor) -> Tensor:
        first, second = x.chunk(2, dim=-1)
        return x * cosine + torch.cat([-second, first], dim=-1) * sine

    return rotate(heads[:, :, :GROUP].flatten(1, 2)), rotate(heads[:, :, GROUP]), heads[:, :, GROUP + 1]


def cases(tokens: int) -> Iterator[Case]:
    """One after the other, since they are large; activations are ``[S, 1, ...]``."""
    x, residual, weight = random(tokens, 1, HIDDEN), random(tokens, 1, HIDDEN), random(HIDDEN)
    dy, straight = random(tokens, 1, HIDDEN), random(tokens, 1, HIDDEN)
    yield Case(
        "rms_norm",
        lambda x, weight: norm.rms_norm(x, weight, EPSILON),
        lambda x, weight: rms_norm(x, weight.shape, weight, EPSILON),
        lambda x, weight: norm_reference.rms_norm(x, weight, EPSILON),
        [x, weight],
        [dy],
        (2 * HIDDEN * tokens * 2, 3 * HIDDEN * tokens * 2),
        liger_norm([x, weight], [dy]),
    )
    yield Case(
        "add_rms_norm",
        lambda *given: norm.add_rms_norm(*given, EPSILON),
        eager_add_norm,
        lambda *given: norm_reference.add_rms_norm(*given, EPSILON),
        [x, residual, weight],
        [dy, straight],
        (4 * HIDDEN * tokens * 2, 4 * HIDDEN * tokens * 2),
        liger_norm([x, residual, weight], [dy, straight]),
    )
    packed, dy = random(tokens, 1, 2 * WIDTH), random(tokens, 1, WIDTH)
    yield Case(
        "swiglu",
        swiglu.swiglu,
        eager_swiglu,
        swiglu_reference.swiglu,
        [packed],
        [dy],
        (3 * WIDTH * tokens * 2, 5 * WIDTH * tokens * 2),
        liger_swiglu(packed, dy),
    )
    packed = random(tokens, 1, PACKED)
    table = rotary_table(tokens, HEAD_WIDTH, 500_000.0, packed.device)
    units = (KV_HEADS, GROUP, 1, 1)
    slopes = [random(tokens, 1, n, HEAD_WIDTH).permute(1, 2, 0, 3) for n in (HEADS, KV_HEADS, KV_HEADS)]
    yield Case(
        "rotary_qkv",
        lambda packed: rotary.rotary_qkv(packed, table[:, : packed.shape[0]], *units),
        lambda packed: eager_rotary(packed, table[:, : packed.shape[0]]),
        lambda packed: rotary_reference.rotary_qkv(packed, table[:, : packed.shape[0]], *units),
        [packed],
        slopes,
        (2 * PACKED * tokens * 2, 2 * PACKED * tokens * 2),
        liger_rotary(table, slopes),
    )
    yield from embedding_cases(tokens)


def embedding_cases(positions: int) -> Iterator[Case]:
    """With a gradient in bf16, and added to fp32 sums that hold some; tokens as frequent as words (Zipf)."""
    vocabulary = min(128_256, 16 * positions)
    frequency = 1 / torch.arange(1, vocabulary + 1, device=DEVICE)
    tokens = torch.multinomial(frequency, positions, replacement=True)
    table, dy, main = random(vocabulary, HIDDEN), random(positions, HIDDEN), None
    row, touched = HIDDEN * 2, tokens.unique().numel()
    forward = (touched + positions) * row
    for name, backward in (
        ("embedding", (positions + vocabulary) * row),
        ("embedding_sums", positions * row + touched * HIDDEN * 4 * 2),
    ):
        if name == "embedding_sums":
            main = WeightGradient(table)
            main.add(torch.zeros_like(table))
        yield Case(
            name,
            lambda table, main=main: embedding.embedding(tokens, table, main=main),
            lambda table, main=main: torch.nn.functional.embedding(tokens, adding(table, main)),
            lambda table, main=main: torch.nn.functional.embedding(tokens, adding(table, main)),
            [table],
            [dy],
            (forward, backward),
            None,
        )


class _Adding(torch.autograd.Function):
    """A table whose gradient, that of all its rows, is added to an fp32 sum."""

    @staticmethod
    def forward(ctx: Any, table: Tensor, main: WeightGradient) -> Tensor:
        ctx.main = main
        return table.view_as(table)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, None]:
        ctx.main.add(gradient)
        return None, None


@torch.compiler.disable
def adding(table: Tensor, main: WeightGradient | None) -> Tensor:
    found: Tensor = table if main is None else _Adding.apply(table, main)
    return found


def liger_norm(given: list[Tensor], slopes: list[Tensor]) -> Liger | None:
    try:
        from liger_kernel.ops.fused_add_rms_norm import LigerFusedAddRMSNormFunction
        from liger_kernel.ops.rms_norm import LigerRMSNormFunction
    except ImportError:
        return None
    function = LigerRMSNormFunction if len(given) == 2 else LigerFusedAddRMSNormFunction
    # Not in place: the slope would be gone after the first call.
    return Liger(lambda *t: function.apply(*t, EPSILON, 0.0, "llama", False), given, slopes)


def liger_swiglu(packed: Tensor, slope: Tensor) -> Liger | None:
    try:
        from liger_kernel.ops.swiglu import LigerSiLUMulFunction
    except ImportError:
        return None
    pristine = [part.contiguous() for part in packed.chunk(2, dim=-1)]
    inputs = [part.clone() for part in pristine]

    def restore() -> None:
        with torch.no_grad():
            for one, other in zip(inputs, pristine, strict=True):
                one.copy_(other)

    return Liger(LigerSiLUMulFunction.apply, inputs, [slope], restore)


def liger_rotary(table: Tensor, slopes: list[Tensor]) -> Liger | None:
    try:
        from liger_kernel.ops.rope import LigerRopeFunction
    except ImportError:
        return None
    cosine, sine = table.unsqueeze(1).to(torch.bfloat16)
    inputs = [torch.randn_like(slope) for slope in slopes[:2]]
    return Liger(lambda q, k: LigerRopeFunction.apply(q, k, cosine, sine), inputs, slopes[:2])
