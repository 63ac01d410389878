"""Attention over pairs of heads: packed projections that hold any share of them, and the product itself."""

from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, scaled_dot_product_attention

from flashtrain.kernels.pairing_attention.config import refusal
from flashtrain.kernels.pairing_attention.op import pairing_attention
from flashtrain.nn.attend import Heads, attend, settings
from flashtrain.nn.pairing import Pairing

Method = Literal["kernel", "expand"]

# A few new tokens leave the kernel's tiles empty, and their queries cost nothing to copy.
_FEWEST_ROWS = 16


class Part(NamedTuple):
    """What a share of a projection computes: rows ``(parameter, start, stop)`` in order, and for which pairs.

    ``by_unit``: KV head by KV head its queries, key and value; else all queries, all keys, all values.
    """

    rows: tuple[tuple[str, int, int], ...]
    pairing: Pairing
    by_unit: bool


class PairedProjection(nn.Module):
    """``x [..., hidden]`` -> queries, keys, values of all heads ``[..., (n_q + 2 n_kv) · head_dim]``.

    One product, of three weights: pairs are split among tensor-parallel ranks in order, so that of some
    heads each rank needs its own and of others several need the same. ``pairing`` and ``by_unit`` say what
    comes out; a rank that holds a share sets them to its own.
    """

    def __init__(self, hidden: int, pairing: Pairing, head_dim: int, bias: bool) -> None:
        super().__init__()
        self.whole = self.pairing = pairing
        self.head_dim, self.by_unit = head_dim, False
        self.in_features, self.out_features = hidden, (pairing.n_q + 2 * pairing.n_kv) * head_dim
        parts = [nn.Linear(hidden, n * head_dim, bias) for n in (pairing.n_q, pairing.n_kv, pairing.n_kv)]
        self.query_weight, self.key_weight, self.value_weight = (part.weight for part in parts)
        self.query_bias, self.key_bias, self.value_bias = (part.bias for part in parts)

    def forward(self, x: Tensor) -> Tensor:
        weight = torch.cat((self.query_weight, self.key_weight, self.value_weight))
        biases = (self.query_bias, self.key_bias, self.value_bias)
        return linear(x, weight, None if self.query_bias is None else torch.cat(biases))

    def share(self, part: int, parts: int) -> Part:
        """What one of ``parts`` equal shares of the pairs needs. Raises UserError if they do not divide."""
        share = self.whole.share(part, parts)
        rows = [
            *self._rows("query_weight", share.queries),
            *self._rows("key_weight", share.keys),
            *self._rows("value_weight", share.keys),
        ]
        return Part(_joined(rows), share.pairing, False)

    def _rows(self, name: str, heads: tuple[int, ...]) -> list[tuple[str, int, int]]:
        return [(name, head * self.head_dim, (head + 1) * self.head_dim) for head in heads]


class GroupedProjection(nn.Linear):
    """The packed projection of a pairing with grouped queries: one weight, KV head by KV head.

    Where shares cut through a group several ranks need its key and value, and a share of this weight is no
    block of it: then every rank holds all of it.
    """

    def __init__(self, hidden: int, pairing: Pairing, head_dim: int, bias: bool) -> None:
        super().__init__(hidden, (pairing.n_q + 2 * pairing.n_kv) * head_dim, bias=bias)
        self.whole = self.pairing = pairing
        self.head_dim, self.by_unit = head_dim, True

    def share(self, part: int, parts: int) -> Part:
        """What one of ``parts`` equal shares of the pairs needs. Raises UserError if they do not divide."""
        share = self.whole.share(part, parts)
        group = self.whole.heads // self.whole.n_kv
        unit = (group + 2) * self.head_dim
        if self.whole.n_kv % parts == 0:
            rows = self.out_features // parts
            return Part((("weight", part * rows, (part + 1) * rows),), share.pairing, True)
        starts = [head // group * unit + head % group * self.head_dim for head in share.queries]
        starts += [head * unit + group * self.head_dim for head in share.keys]
        starts += [head * unit + (group + 1) * self.head_dim for head in share.keys]
        return Part(_joined([("weight", at, at + self.head_dim) for at in starts]), share.pairing, False)


def _joined(rows: list[tuple[str, int, int]]) -> tuple[tuple[str, int, int], ...]:
    """Neighbouring rows as one run."""
    runs = rows[:1]
    for name, start, stop in rows[1:]:
        if runs[-1][0] == name and runs[-1][2] == start:
            runs[-1] = (name, runs[-1][1], stop)
        else:
            runs.append((name, start, stop))
    return tuple(runs)


def attend_pairs(heads: Heads, pairing: Pairing, causal: bool = True, method: Method | None = None) -> Tensor:
    """Attention ``[B, pairs, S, D]`` of query ``[B, n_q, S, D]`` and keys, values ``[B, n_kv, T, D]``.

    ``expand`` copies heads where several pairs use them and calls ``attend``; ``kernel`` (GPU) never does.
    By default the kernel runs for what it takes, unless gradients may be in any order: then torch's backward
    pass is the faster one, copies included (benchmarks/pairing.py). Raises UserError for ``kernel`` on heads
    that it does not take.
    """
    query, key, value = heads
    if method is None:
        fits = query.is_cuda and query.shape[2] >= _FEWEST_ROWS and settings().deterministic
        method = "kernel" if fits and refusal(query.dtype, query.shape[3]) is None else "expand"
    if method == "kernel":
        return pairing_attention(query, key, value, pairing.query_of, pairing.key_of, causal)[0]
    query = _copied(query, pairing.query_of)
    if not (causal and pairing.groups_keys):  # which attend does by itself
        key, value = (_copied(kv, pairing.key_of) for kv in (key, value))
    return attend(Heads(query, key, value)) if causal else scaled_dot_product_attention(query, key, value)


def _copied(x: Tensor, wanted: tuple[int, ...]) -> Tensor:
    """Heads ``wanted`` of ``x [B, n, S, D]``; their gradients are added in one order, on any device."""
    count = x.shape[1]
    times = len(wanted) // count
    if wanted == tuple(range(count)):
        return x
    if wanted == tuple(range(count)) * times:
        return x.unsqueeze(1).expand(-1, times, -1, -1, -1).flatten(1, 2)
    if wanted == tuple(p // times for p in range(len(wanted))):
        return x.unsqueeze(2).expand(-1, -1, times, -1, -1).flatten(1, 2)
    each = x.unbind(1)
    return torch.stack([each[head] for head in wanted], dim=1)
