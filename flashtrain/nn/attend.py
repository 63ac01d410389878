"""Causal attention over heads that are projected and rotated already."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention


class Heads(NamedTuple):
    """What attention takes: ``query [B, H, S, D]``, ``key`` and ``value [B, kv heads, T, D]``, T >= S.

    Positions are in query and key already. The S queries are those of the last S of the T tokens.
    """

    query: Tensor
    key: Tensor
    value: Tensor


def attend(heads: Heads) -> Tensor:
    """Causal attention ``[B, H, S, D]``; query head h meets KV head ``h // (H / kv heads)``."""
    query, key, value = heads
    group, new, all_tokens = query.shape[1] // key.shape[1], query.shape[2], key.shape[2]
    if group > 1:
        key, value = (kv.repeat_interleave(group, dim=1) for kv in (key, value))
    if new in (1, all_tokens):
        return scaled_dot_product_attention(query, key, value, is_causal=new > 1)
    earlier = torch.ones(new, all_tokens, dtype=torch.bool, device=query.device).tril(all_tokens - new)
    return scaled_dot_product_attention(query, key, value, attn_mask=earlier)
