"""Attention over pairs of heads, in one of three ways."""

import os
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from flashtrain.errors import UserError
from flashtrain.kernels.pairing_attention.config import refusal
from flashtrain.kernels.pairing_attention.op import pairing_attention
from flashtrain.nn.attend import Heads, attend, settings, why_not
from flashtrain.nn.attention_kernels import cudnn_gradients
from flashtrain.nn.copied_heads import copied, summed
from flashtrain.nn.pairing import Pairing

Method = Literal["expand", "mixed", "kernel"]

# A few new tokens leave the kernel's tiles empty, and their queries cost nothing to copy.
_FEWEST_ROWS = 16
# With it torch hands cuDNN log-sum-exps in another order; it reads it once, too.
_RAGGED = os.environ.get("TORCH_CUDNN_SDPA_AVOID_RECOMPILE") == "1"
_preferred: Method | None = None


def prefer(method: Method | None) -> None:
    """Set what ``attend_pairs`` takes from here on; None: what it takes by default."""
    global _preferred
    _preferred = method


def attend_pairs(heads: Heads, pairing: Pairing, causal: bool = True, method: Method | None = None) -> Tensor:
    """Attention ``[B, pairs, S, D]`` of query ``[B, n_q, S, D]`` and keys, values ``[B, n_kv, T, D]``.

    * ``expand`` copies heads where several pairs use them and calls ``attend``; copies of queries, and of
      keys and values where the pairs do not group by them, are kept for the backward pass.
    * ``kernel`` (GPU) copies nothing, and its gradients are in a fixed order.
    * ``mixed`` is the kernel forward and cuDNN's backward pass, whose gradients are in any order, over copies
      that live for it alone. On a CPU plain torch stands in for both.

    By default it is what ``prefer`` was told, which a run measures where gradients may be in any order
    (``flashtrain.train.attention``); without it the kernel for what it takes where gradients must be in a
    fixed order, and else expand. Raises UserError for a ``method`` that does not take these heads.
    """
    if method is None:
        method = _default(heads, causal)
    elif (reason := why_not_by(method, heads, causal)) is not None:
        raise UserError(f"attention over pairs cannot run as {method}: {reason}")
    if method == "kernel":
        return pairing_attention(*heads, pairing.query_of, pairing.key_of, causal)[0]
    # Queries that group by KV heads are met without copies of these.
    grouped = pairing.groups_keys and (causal or method == "mixed")
    of_keys = tuple(range(pairing.n_kv)) if grouped else pairing.key_of
    if method == "mixed":
        out: Tensor = _Mixed.apply(*heads, pairing.query_of, pairing.key_of, of_keys, causal)
        return out
    query = copied(heads.query, pairing.query_of)
    key, value = (copied(kv, of_keys) for kv in (heads.key, heads.value))
    return attend(Heads(query, key, value)) if causal else scaled_dot_product_attention(query, key, value)


def why_not_by(method: Method, heads: Heads, causal: bool) -> str | None:
    """Why a method cannot run ``heads`` where they are; None if it can."""
    query, key, _ = heads
    if method == "expand" or not query.is_cuda:
        return None
    if (reason := refusal(query.dtype, query.shape[3])) is not None or method == "kernel":
        return reason
    if causal and query.shape[2] != key.shape[2]:
        return "cuDNN counts positions of causal queries from the first key: give as many keys as queries"
    if _RAGGED:
        return "TORCH_CUDNN_SDPA_AVOID_RECOMPILE is 1, with which cuDNN wants log-sum-exps in another order"
    return why_not("cudnn", heads, False, False)


def _default(heads: Heads, causal: bool) -> Method:
    if not heads.query.is_cuda or heads.query.shape[2] < _FEWEST_ROWS:
        return "expand"
    wanted: Method = _preferred or ("kernel" if settings().deterministic else "expand")
    return wanted if why_not_by(wanted, heads, causal) is None else "expand"


class _Mixed(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        query_of: tuple[int, ...],
        key_of: tuple[int, ...],
        of_keys: tuple[int, ...],
        causal: bool,
    ) -> Tensor:
        out, logsumexp = pairing_attention(query, key, value, query_of, key_of, causal)
        ctx.save_for_backward(query, key, value, out, logsumexp)
        ctx.query_of, ctx.of_keys, ctx.causal = query_of, of_keys, causal
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        *heads, out, logsumexp = ctx.saved_tensors
        wanted = ctx.query_of, ctx.of_keys, ctx.of_keys
        query, key, value = (copied(x, own) for x, own in zip(heads, wanted, strict=True))
        found = cudnn_gradients(grads[0], query, key, value, out, logsumexp, ctx.causal)
        sums = [summed(g, own, x.shape[1]) for g, own, x in zip(found, wanted, heads, strict=True)]
        return (*sums, None, None, None, None)
