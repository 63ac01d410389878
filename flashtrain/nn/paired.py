"""Packed projections of the heads of a pairing, whole or any share of its pairs."""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from flashtrain.nn.pairing import Pairing


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
