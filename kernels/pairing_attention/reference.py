"""Attention over pairs of heads in plain torch, differentiable; and gradients from a saved log-sum-exp."""

from collections.abc import Sequence

import torch
from torch import Tensor


def pairing_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_of: Sequence[int],
    key_of: Sequence[int],
    causal: bool = True,
) -> tuple[Tensor, Tensor]:
    """``softmax(query[i] · key[j]ᵀ / sqrt(D)) · value[j]`` for each pair (i, j), and the log of the sum.

    query ``[B, n_q, S, D]``, key and value ``[B, n_kv, T, D]``, ``query_of`` and ``key_of`` the heads of
    each pair -> ``[B, pairs, S, D]`` in query's dtype, and ``[B, pairs, S]``. Causal queries are those of the
    last S of T tokens. Computed in fp32 (fp64 for fp64).
    """
    wide = torch.float64 if query.dtype == torch.float64 else torch.float32
    chosen, keys = query[:, list(query_of)].to(wide), key[:, list(key_of)].to(wide)
    scores = chosen @ keys.transpose(2, 3) * query.shape[3] ** -0.5
    if causal:
        new, every = scores.shape[2:]
        seen = torch.ones(new, every, dtype=torch.bool, device=query.device).tril(every - new)
        scores = scores.masked_fill(~seen, float("-inf"))
    logsumexp = scores.logsumexp(-1)
    out = (scores - logsumexp.unsqueeze(-1)).exp() @ value[:, list(key_of)].to(wide)
    return out.to(query.dtype), logsumexp


def gradients(
    d_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    causal: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of ``query [B, H, S, D]`` and ``key``, ``value [B, kv heads, T, D]``, H a multiple of theirs.

    Query head h meets KV head ``h // (H / kv heads)``; ``out`` and ``logsumexp [B, H, S]`` are what attention
    gave. With P the shares: dV = Pᵀ dO, dS = P · (dO Vᵀ - rowsum(dO · O)), dQ = dS K / √D, dK = dSᵀ Q / √D.
    """
    wide = torch.float64 if query.dtype == torch.float64 else torch.float32
    group, scale = query.shape[1] // key.shape[1], query.shape[3] ** -0.5
    slope, chosen = d_out.to(wide), query.to(wide)
    keys, values = (x.to(wide).repeat_interleave(group, dim=1) for x in (key, value))
    shares = (chosen @ keys.transpose(2, 3) * scale - logsumexp.unsqueeze(3)).exp()
    if causal:
        shares = shares.tril(key.shape[2] - query.shape[2])
    inner = slope @ values.transpose(2, 3) - (slope * out.to(wide)).sum(3, keepdim=True)
    d_scores = shares * inner * scale
    d_key, d_value = (
        (left.transpose(2, 3) @ right).unflatten(1, (-1, group)).sum(2)
        for left, right in ((d_scores, chosen), (shares, slope))
    )
    return (d_scores @ keys).to(query.dtype), d_key.to(key.dtype), d_value.to(value.dtype)
