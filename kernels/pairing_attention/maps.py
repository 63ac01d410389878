"""Which heads make pairs, as the kernels read it."""

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor


class Maps(NamedTuple):
    """Heads of each pair (int32), and of each KV head its pairs, for the backward pass (int64).

    ``visits``: offsets ``[n_kv + 1]``, then a word for each pair by KV head: from the lowest 16 bits on the
    pair, its query head, which of this head's pairs it is, and of how many. ``idle``: query heads without.
    ``shared``: whether a query head is of several pairs.
    """

    query_of: Tensor
    key_of: Tensor
    visits: Tensor
    idle: tuple[int, ...]
    shared: bool


@lru_cache(maxsize=64)
def maps_of(
    n_q: int, n_kv: int, query_of: tuple[int, ...], key_of: tuple[int, ...], device: torch.device
) -> Maps:
    """The maps of these pairs of ``n_q`` query heads and ``n_kv`` KV heads on ``device``."""
    by_key = sorted(range(len(key_of)), key=lambda pair: (key_of[pair], pair))
    offsets = [sum(head < own for head in key_of) for own in range(n_kv + 1)]
    words, seen = [], [0] * n_q
    for pair in by_key:
        head = query_of[pair]
        words.append(pair | head << 16 | seen[head] << 32 | query_of.count(head) << 48)
        seen[head] += 1
    # One word more, which a KV head without pairs reads.
    visits = torch.tensor([*offsets, *words, 0], dtype=torch.int64, device=device)
    queries, keys = (torch.tensor(line, dtype=torch.int32, device=device) for line in (query_of, key_of))
    idle = tuple(head for head in range(n_q) if not seen[head])
    return Maps(queries, keys, visits, idle, shared=max(seen) > 1)
