"""Attention whose queries and keys serve several layers, in plain torch: what the kernels must compute.

All of ``query [B, H, S, D]`` and ``key`` and ``value [B, kv heads, S, D]`` are of one sequence, causal, with
query head h at KV head ``h // (H / kv heads)``. Results are in the inputs' dtype, computed in fp32 (fp64 for
fp64), log-sum-exps and row sums ``[B, H, S]`` are fp32 (fp64).
"""

import torch
from torch import Tensor


def _wide(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _repeated(tensor: Tensor, group: int) -> Tensor:
    """``[B, kv heads, S, D]`` -> ``[B, H, S, D]``, wide."""
    return _wide(tensor).repeat_interleave(group, dim=1)


def _summed(gradient: Tensor, group: int) -> Tensor:
    """``[B, H, S, D]`` -> ``[B, kv heads, S, D]``: what the heads of a group give to their KV head."""
    return gradient.unflatten(1, (-1, group)).sum(2)


def _scores(query: Tensor, key: Tensor) -> Tensor:
    """Scaled scores ``[B, H, S, S]`` with minus infinity after the query's own position."""
    sequence, width = query.shape[2:]
    scores = _wide(query) @ _repeated(key, query.shape[1] // key.shape[1]).transpose(2, 3) * width**-0.5
    later = torch.ones(sequence, sequence, dtype=torch.bool, device=query.device).triu(1)
    return scores.masked_fill(later, float("-inf"))


def _shares(query: Tensor, key: Tensor, lse: Tensor) -> Tensor:
    return (_scores(query, key) - lse.unsqueeze(-1)).exp()


def attend(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Output ``[B, H, S, D]`` and the log-sum-exp of the scaled scores ``[B, H, S]``."""
    lse = _scores(query, key).logsumexp(-1)
    return attend_given(query, key, value, lse), lse


def attend_given(query: Tensor, key: Tensor, value: Tensor, lse: Tensor) -> Tensor:
    """Output ``[B, H, S, D]``, given the log-sum-exp ``[B, H, S]`` of the scores."""
    group = query.shape[1] // value.shape[1]
    return (_shares(query, key, lse) @ _repeated(value, group)).to(query.dtype)


def take_slope(slope: Tensor, output: Tensor, total: Tensor | None, kept: Tensor) -> Tensor:
    """``rowsum(slope · output)`` of ``[B, H, S, D]`` each, added to ``total`` -> ``[B, H, S]``.

    The slope is copied to ``kept``, of its shape.
    """
    kept.copy_(slope)
    found = (_wide(slope) * _wide(output)).sum(-1)
    return found if total is None else total.add_(found)


def value_gradient(query: Tensor, key: Tensor, lse: Tensor, slope: Tensor) -> Tensor:
    """Gradient ``[B, kv heads, S, D]`` of the values, given that of the output, ``slope [B, H, S, D]``."""
    shares = _shares(query, key, lse)
    return _summed(shares.transpose(2, 3) @ _wide(slope), query.shape[1] // key.shape[1]).to(slope.dtype)


def score_gradients(
    query: Tensor, key: Tensor, lse: Tensor, total: Tensor, slopes: Tensor, values: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of query and key, shaped like them, for all layers of the region at once.

    ``slopes [B, H, S, layers, D]`` and ``values [B, kv heads, S, layers, D]`` are those of all layers, and
    ``total [B, H, S]`` is the sum of their row sums. With P the shares, DO and VV the layers side by side:
    dS = P · (DO VVᵀ - total), dQ = dS K / √D, dK = dSᵀ Q / √D.
    """
    group = query.shape[1] // key.shape[1]
    inner = _wide(slopes).flatten(3) @ _repeated(values, group).flatten(3).transpose(2, 3)
    d_scores = _shares(query, key, lse) * (inner - total.unsqueeze(-1)) * query.shape[-1] ** -0.5
    d_query = d_scores @ _repeated(key, group)
    d_key = _summed(d_scores.transpose(2, 3) @ _wide(query), group)
    return d_query.to(query.dtype), d_key.to(key.dtype)
