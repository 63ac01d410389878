"""Attention over pairs of heads in plain torch; differentiable."""

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
