"""Which query head meets which KV head: pairings (GQKVA, arXiv 2311.03426)."""

import re
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from flashtrain.errors import UserError

Order = Literal["j_major", "i_major"]

_NAMES = "mha, mqa, mkva, gqa-G, gkva-G, gqkva-A.B, or pairs such as '0:0 1:0 0:1 1:1'"


@dataclass(frozen=True)
class Pairing:
    """``pairs[p] = (i, j)``: head p of the output is query head i attending to keys and values of KV head j.

    There are ``n_q`` query heads and ``n_kv`` KV heads; ``len(pairs)`` heads come out. Raises UserError for
    a head that does not exist, a head without a pair, and a pair that occurs twice.
    """

    n_q: int
    n_kv: int
    pairs: tuple[tuple[int, int], ...]

    def __post_init__(self) -> None:
        for kind, place, count in (("query", 0, self.n_q), ("KV", 1, self.n_kv)):
            used = {pair[place] for pair in self.pairs}
            if outside := sorted(used - set(range(count))):
                raise UserError(f"pairing: {kind} head {outside[0]} is not among the {count} there are")
            if unused := sorted(set(range(count)) - used):
                raise UserError(f"pairing: {kind} head {unused[0]} of {count} is in no pair; leave it out")
        if len(set(self.pairs)) < len(self.pairs):
            twice = next(pair for pair in self.pairs if self.pairs.count(pair) > 1)
            raise UserError(f"pairing: the pair {twice[0]}:{twice[1]} occurs twice")

    @classmethod
    def named(cls, name: str, heads: int, order: Order = "j_major") -> "Pairing":
        """The pairing of ``heads`` pairs that is called ``name``, or whose pairs it lists as ``i:j``.

        ``mha``, ``mqa``, ``mkva`` (one query head), ``gqa-G`` (G KV heads), ``gkva-G`` (G query heads), and
        ``gqkva-A.B``: every one of A query heads with every one of B KV heads, A · B = heads; its pairs run
        over the query heads first (``j_major``) or over the KV heads first (``i_major``). Raises UserError
        for another name and for numbers that do not fit.
        """
        if re.fullmatch(r"\d+:\d+([ ,]+\d+:\d+)*", name):
            pairs = tuple((int(i), int(j)) for i, j in re.findall(r"(\d+):(\d+)", name))
            if len(pairs) != heads:
                raise UserError(f"pairing: {len(pairs)} pairs are listed for {heads} heads")
            return cls(max(i for i, _ in pairs) + 1, max(j for _, j in pairs) + 1, pairs)
        kind, queries, keys = _sizes(name, heads)
        if kind == "gqkva":
            if queries * keys != heads:
                raise UserError(f"pairing {name}: {queries} x {keys} pairs are not the {heads} heads")
            if order == "j_major":
                return cls(queries, keys, tuple((p % queries, p // queries) for p in range(heads)))
            return cls(queries, keys, tuple((p // keys, p % keys) for p in range(heads)))
        for count in (queries, keys):
            if not count or heads % count:
                raise UserError(f"pairing {name}: {count} groups do not divide {heads} heads")
        by_query, by_key = heads // queries, heads // keys
        return cls(queries, keys, tuple((p // by_query, p // by_key) for p in range(heads)))

    @property
    def heads(self) -> int:
        """How many heads come out."""
        return len(self.pairs)

    @cached_property
    def query_of(self) -> tuple[int, ...]:
        """The query head of each pair."""
        return tuple(i for i, _ in self.pairs)

    @cached_property
    def key_of(self) -> tuple[int, ...]:
        """The KV head of each pair."""
        return tuple(j for _, j in self.pairs)

    @cached_property
    def groups_keys(self) -> bool:
        """Whether pair p has KV head ``p // (heads / n_kv)``, as grouped queries have."""
        return self.heads % self.n_kv == 0 and self.key_of == tuple(
            p // (self.heads // self.n_kv) for p in range(self.heads)
        )

    @cached_property
    def is_grouped(self) -> bool:
        """Whether it is multi-head, grouped-query or multi-query attention: query head p is pair p's."""
        return self.groups_keys and self.query_of == tuple(range(self.heads))

    def share(self, part: int, parts: int) -> "Share":
        """Pairs ``[part · n, (part + 1) · n)`` of ``parts`` equal shares, and the heads that they need.

        Raises UserError if there are no equal shares.
        """
        if self.heads % parts:
            raise UserError(f"pairing: {self.heads} pairs do not divide by {parts} ranks")
        count = self.heads // parts
        pairs = self.pairs[part * count : (part + 1) * count]
        queries, keys = (tuple(sorted({pair[place] for pair in pairs})) for place in (0, 1))
        own = tuple((queries.index(i), keys.index(j)) for i, j in pairs)
        return Share(queries, keys, Pairing(len(queries), len(keys), own))


@dataclass(frozen=True)
class Share:
    """The heads of the whole that a share needs, in order, and its pairs in numbers of those."""

    queries: tuple[int, ...]
    keys: tuple[int, ...]
    pairing: Pairing


def _sizes(name: str, heads: int) -> tuple[str, int, int]:
    """Kind, query heads and KV heads of a named pairing."""
    match = re.fullmatch(r"(mha|mqa|mkva)|(gqa|gkva)-(\d+)|(gqkva)-(\d+)\.(\d+)", name.lower())
    if match is None:
        raise UserError(f"pairing {name!r} is not known; there are {_NAMES}")
    single, grouped, groups, full, queries, keys = match.groups()
    if full:
        return full, int(queries), int(keys)
    if grouped:
        return (grouped, heads, int(groups)) if grouped == "gqa" else (grouped, int(groups), heads)
    return single, 1 if single == "mkva" else heads, 1 if single == "mqa" else heads
