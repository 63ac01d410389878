"""Attention kernels on a GPU: torch's cuDNN, FlashAttention and memory-efficient ones, flash-attn, our own.

All take ``query [B, H, S, D]``, ``key`` and ``value [B, kv heads, S, D]`` and give causal attention
``[B, H, S, D]``; flash, fa and triton also that of queries of the last S of T tokens. Forward, all are
deterministic. Backward:

    cudnn      sums dQ in any order, as torch passes cuDNN no other wish (pytorch#182551); where it is to be
               deterministic, the backward pass is that of triton
    flash      sums dQ in any order, or in a fixed one where torch.are_deterministic_algorithms_enabled()
    fa         the same by its argument ``deterministic``
    triton     blocks add to dQ by turns: always in a fixed order
    efficient  splits keys among blocks that add in any order, or does not, by torch's flag

torch reads its flag when the backward pass runs, so the flag is set there, around that one kernel.
"""

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor

from flashtrain.errors import UserError
from flashtrain.kernels.pairing_attention import reference
from flashtrain.kernels.pairing_attention.config import refusal
from flashtrain.kernels.pairing_attention.op import pairing_attention, pairing_backward_kernels

__all__ = [
    "WIDEST",
    "cudnn",
    "cudnn_gradients",
    "efficient",
    "flash",
    "flash_package",
    "package",
    "refusal",
    "triton",
]

# Widest head. cuDNN's backward pass has no kernel for wider ones on all GPUs that have its forward pass.
WIDEST = {"cudnn": 128, "flash": 256, "fa": 128, "triton": 1024, "efficient": 1024}
_aten = torch.ops.aten


def cudnn(query: Tensor, key: Tensor, value: Tensor, deterministic: bool = False) -> Tensor:
    """cuDNN's attention; KV heads are not copied. ``deterministic``: with our backward pass.

    Raises UserError where a version of torch gives another log-sum-exp than that one reads.
    """
    keeps = torch.is_grad_enabled() and any(part.requires_grad for part in (query, key, value))
    if keeps and deterministic:
        out: Tensor = _Cudnn.apply(query, key, value)
    else:
        out, *_ = _aten._scaled_dot_product_cudnn_attention(
            query, key, value, None, compute_log_sumexp=keeps, is_causal=True
        )
    return out


class _Cudnn(torch.autograd.Function):
    """cuDNN forward, the kernels of attention over pairs of heads backward."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out, sums, *_ = _aten._scaled_dot_product_cudnn_attention(
            query, key, value, None, compute_log_sumexp=True, is_causal=True
        )
        ctx.save_for_backward(out, log_sums(sums, query), query, key, value)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        out, sums, *heads = ctx.saved_tensors
        pairs = _grouped(*heads[:2])
        found: tuple[Tensor, ...] = pairing_backward_kernels(grads[0], None, out, sums, *heads, *pairs, True)
        return found


def log_sums(sums: Tensor, query: Tensor) -> Tensor:
    """cuDNN's log-sum-exp ``[B, H, S]`` or ``[B, H, S, 1]``, natural, as our kernels read it: ``[B, H, S]``.

    Raises UserError for another shape or dtype.
    """
    wanted = query.shape[:3]
    if sums.dtype != torch.float32 or sums.shape not in (wanted, (*wanted, 1)):
        raise UserError(
            f"torch {torch.__version__} gives cuDNN's log-sum-exp as {list(sums.shape)} {sums.dtype}, "
            f"not {list(wanted)} float32: set attention.backend to triton or flash"
        )
    return sums.reshape(wanted).contiguous()


def _grouped(query: Tensor, key: Tensor) -> tuple[list[int], list[int]]:
    """The pairs that grouped queries are."""
    heads = list(range(query.shape[1]))
    group = len(heads) // key.shape[1]
    return heads, [head // group for head in heads]


def cudnn_gradients(
    slope: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    causal: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """cuDNN's backward pass for an output that another kernel has computed; on a CPU plain torch's.

    ``slope`` is the gradient of ``out [B, H, S, D]``, and ``logsumexp [B, H, S]``, dense fp32, the natural
    logarithm of the sum over the scaled scores of a row: torch hands cuDNN ``[B, H, S, 1]`` of its own so
    (aten/src/ATen/native/cudnn/MHA.cpp). Without dropout the random state is not read.
    """
    if query.device.type == "cpu":
        return reference.gradients(slope, query, key, value, out, logsumexp, causal)
    if slope.stride() != out.stride():
        # Torch keeps cuDNN's graphs by the strides of query, key and value, and not by those of this one.
        slope = torch.empty_like(out).copy_(slope)
    unread = query.new_empty(0, dtype=torch.int64)
    found: tuple[Tensor, Tensor, Tensor] = _aten._scaled_dot_product_cudnn_attention_backward(
        slope,
        query,
        key,
        value,
        out,
        logsumexp.unsqueeze(3),
        unread,
        unread,
        None,
        None,
        None,
        query.shape[2],
        key.shape[2],
        0.0,
        causal,
    )
    return found


def flash(
    query: Tensor, key: Tensor, value: Tensor, bounds: Tensor | None, longest: int, deterministic: bool
) -> Tensor:
    """FlashAttention 2 as torch has it; KV heads are not copied.

    ``bounds`` int32 ``[documents + 1]`` and ``longest`` as in ``Documents``; heads of several sequences are
    copied then.
    """
    batch, _, sequence, _ = query.shape
    tokens = [_tokens_first(part, bounds is not None) for part in (query, key, value)]
    out: Tensor = _Flash.apply(*tokens, bounds, longest, deterministic)
    return out.view(batch, sequence, *out.shape[-2:]).transpose(1, 2)


class _Flash(torch.autograd.Function):
    """``query [B, S, H, D]`` or with ``bounds`` ``[tokens, H, D]`` -> the same."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        bounds: Tensor | None,
        longest: int,
        deterministic: bool,
    ) -> Tensor:
        out, sums, seed, unused, _ = _aten._flash_attention_forward(
            query, key, value, bounds, bounds, longest, longest, 0.0, True, False
        )
        ctx.save_for_backward(query, key, value, out, sums, seed, unused, bounds)
        ctx.longest, ctx.deterministic = longest, deterministic
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, out, sums, seed, unused, bounds = ctx.saved_tensors
        with _in_fixed_order(ctx.deterministic):
            dquery, dkey, dvalue = _aten._flash_attention_backward(
                grads[0].contiguous(),
                query,
                key,
                value,
                out,
                sums,
                bounds,
                bounds,
                ctx.longest,
                ctx.longest,
                0.0,
                True,
                seed,
                unused,
            )
        return dquery, dkey, dvalue, None, None, None


def triton(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """The kernels of attention over pairs of heads, for the pairs that grouped queries are."""
    return pairing_attention(query, key, value, *_grouped(query, key))[0]


def efficient(query: Tensor, key: Tensor, value: Tensor, deterministic: bool) -> Tensor:
    """torch's memory-efficient attention; it takes fp32 too, but as many KV heads as query heads alone."""
    out: Tensor = _Efficient.apply(query, key, value, deterministic)
    return out


class _Efficient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, deterministic: bool) -> Tensor:
        out, sums, seed, offset = _aten._scaled_dot_product_efficient_attention(
            query, key, value, None, compute_log_sumexp=any(ctx.needs_input_grad), is_causal=True
        )
        ctx.save_for_backward(query, key, value, out, sums, seed, offset)
        ctx.deterministic = deterministic
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, out, sums, seed, offset = ctx.saved_tensors
        with _in_fixed_order(ctx.deterministic):
            dquery, dkey, dvalue, _ = _aten._scaled_dot_product_efficient_attention_backward(
                grads[0],
                query,
                key,
                value,
                None,
                out,
                sums,
                seed,
                offset,
                0.0,
                [*ctx.needs_input_grad[:3], False],
                True,
            )
        return dquery, dkey, dvalue, None


def flash_package(
    query: Tensor, key: Tensor, value: Tensor, bounds: Tensor | None, longest: int, deterministic: bool
) -> Tensor:
    """The package flash-attn; arguments as of ``flash``."""
    batch, _, sequence, _ = query.shape
    found = package()
    assert found is not None
    tokens = [_tokens_first(part, bounds is not None) for part in (query, key, value)]
    if bounds is None:
        out = found.flash_attn_func(*tokens, causal=True, deterministic=deterministic)
    else:
        out = found.flash_attn_varlen_func(
            *tokens,
            cu_seqlens_q=bounds,
            cu_seqlens_k=bounds,
            max_seqlen_q=longest,
            max_seqlen_k=longest,
            causal=True,
            deterministic=deterministic,
        )
    out = out[0] if isinstance(out, tuple) else out
    return out.view(batch, sequence, *out.shape[-2:]).transpose(1, 2)


@cache
def package() -> Any | None:
    """The newest FlashAttention that is installed and fits this GPU: 4, 3, 2; None without any."""
    hopper = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] >= 9
    for name in (("flash_attn.cute", "flash_attn_interface") if hopper else ()) + ("flash_attn",):
        try:
            found = importlib.import_module(name)
        except ImportError:
            continue
        if hasattr(found, "flash_attn_func"):
            return found
    return None


def _tokens_first(heads: Tensor, packed: bool) -> Tensor:
    """``[B, n, S, D]`` -> ``[B, S, n, D]``, or ``packed`` ``[B·S, n, D]``."""
    tokens = heads.transpose(1, 2)
    return tokens.flatten(0, 1) if packed else tokens


@contextmanager
def _in_fixed_order(wanted: bool) -> Iterator[None]:
    """Let torch's kernels add in a fixed order while this is open, if that is ``wanted``."""
    if not wanted:
        yield
        return
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    fills = torch._C._get_deterministic_fill_uninitialized_memory()
    torch._C._set_deterministic_algorithms(True, warn_only=False)
    torch._C._set_deterministic_fill_uninitialized_memory(False)
    try:
        yield
    finally:
        torch._C._set_deterministic_algorithms(before[0], warn_only=before[1])
        torch._C._set_deterministic_fill_uninitialized_memory(fills)
