"""Attention over pairs of heads as one differentiable function: Triton kernels on a GPU, torch on a CPU."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from flashtrain.errors import UserError
from flashtrain.kernels.layout import heads_like
from flashtrain.kernels.operator import operator
from flashtrain.kernels.pairing_attention import reference
from flashtrain.kernels.pairing_attention.config import MOST_PAIRS, refusal


def pairing_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_of: Sequence[int],
    key_of: Sequence[int],
    causal: bool = True,
) -> tuple[Tensor, Tensor]:
    """Attention of each pair of heads (GQKVA, arXiv 2311.03426), and its log-sum-exp.

    query ``[B, n_q, S, D]``, key and value ``[B, n_kv, T, D]``, any strides; pair p is query head
    ``query_of[p]`` with KV head ``key_of[p]`` -> ``[B, pairs, S, D]`` and fp32 ``[B, pairs, S]``. Causal
    queries are those of the last S of T tokens. Both outputs have gradients. No head is copied; sums over the
    pairs of a head run in one order, so the same inputs give the same bits. Raises UserError for shapes and
    heads that do not fit together, and on a GPU for sizes the kernels do not have.
    """
    _check(query, key, value, query_of, key_of, causal)
    if not query.is_cuda:
        return reference.pairing_attention(query, key, value, query_of, key_of, causal)
    if (reason := refusal(query.dtype, query.shape[3])) is not None:
        raise UserError(reason)
    return pairing_kernels(query, key, value, list(query_of), list(key_of), causal)


@operator("flashtrain::pairing_attention")
def pairing_kernels(
    query: Tensor, key: Tensor, value: Tensor, query_of: Sequence[int], key_of: Sequence[int], causal: bool
) -> tuple[Tensor, Tensor]:
    """``pairing_attention`` by the Triton kernels."""
    from flashtrain.kernels.pairing_attention import triton

    return triton.forward(query, key, value, tuple(query_of), tuple(key_of), causal)


@pairing_kernels.register_fake
def _(
    query: Tensor, key: Tensor, value: Tensor, query_of: Sequence[int], key_of: Sequence[int], causal: bool
) -> tuple[Tensor, Tensor]:
    shape = (query.shape[0], len(query_of), query.shape[2])
    return heads_like(query, len(query_of)), query.new_empty(shape, dtype=torch.float32)


@operator("flashtrain::pairing_attention_backward")
def pairing_backward_kernels(
    d_out: Tensor,
    d_logsumexp: Tensor | None,
    out: Tensor,
    logsumexp: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_of: Sequence[int],
    key_of: Sequence[int],
    causal: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query ``[B, n_q, S, D]``, key and value ``[B, n_kv, T, D]``."""
    from flashtrain.kernels.pairing_attention import triton

    return triton.backward(
        d_out, d_logsumexp, out, logsumexp, query, key, value, tuple(query_of), tuple(key_of), causal
    )


@pairing_backward_kernels.register_fake
def _(
    d_out: Tensor,
    d_logsumexp: Tensor | None,
    out: Tensor,
    logsumexp: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_of: Sequence[int],
    key_of: Sequence[int],
    causal: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(heads_like(x, x.shape[1]) for x in (query, key, value))  # type: ignore[return-value]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    query, key, value, ctx.query_of, ctx.key_of, ctx.causal = inputs
    ctx.save_for_backward(*output, query, key, value)
    ctx.set_materialize_grads(False)


def _backward(context: Any, d_out: Tensor | None, d_logsumexp: Tensor | None) -> tuple[Tensor | None, ...]:
    out = context.saved_tensors[0]
    if d_out is None:
        d_out = torch.zeros_like(out)
    pairs = context.query_of, context.key_of, context.causal
    return (*pairing_backward_kernels(d_out, d_logsumexp, *context.saved_tensors, *pairs), None, None, None)


pairing_kernels.register_autograd(_backward, setup_context=_setup)


def _check(
    query: Tensor, key: Tensor, value: Tensor, query_of: Sequence[int], key_of: Sequence[int], causal: bool
) -> None:
    shapes = f"query {list(query.shape)}, key {list(key.shape)} and value {list(value.shape)}"
    if query.dim() != 4 or key.shape != value.shape or query.shape[::3] != key.shape[::3]:
        raise UserError(f"{shapes} must be [B, n_q, S, D] and twice [B, n_kv, T, D]")
    if not query.dtype == key.dtype == value.dtype:
        raise UserError(f"heads must share one dtype, not {query.dtype}, {key.dtype} and {value.dtype}")
    if not query.shape[2] or not key.shape[2] or (causal and key.shape[2] < query.shape[2]):
        raise UserError(f"{shapes}: there must be tokens, and causal queries need as many keys")
    if len(query_of) > MOST_PAIRS:
        raise UserError(f"{len(query_of)} pairs of heads are too many: at most {MOST_PAIRS}")
    for name, heads, count in (("query", query_of, query.shape[1]), ("KV", key_of, key.shape[1])):
        if len(heads) != len(query_of) or not heads:
            raise UserError(f"{len(query_of)} query heads and {len(key_of)} KV heads make no pairs")
        if not 0 <= min(heads) <= max(heads) < count:
            raise UserError(f"the pairs name {name} heads {min(heads)} to {max(heads)}; there are {count}")
