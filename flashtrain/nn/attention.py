"""Causal self-attention with grouped queries and rotary positions, on one packed projection."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from flashtrain.errors import UserError
from flashtrain.kernels.rotary.op import rotary_qkv
from flashtrain.nn.attend import Documents, Heads, attend
from flashtrain.nn.paired import GroupedProjection, PairedProjection
from flashtrain.nn.paired_attention import attend_pairs
from flashtrain.nn.pairing import Pairing


class KeyValues(NamedTuple):
    """Final keys and values ``[B, kv heads, T, D]`` of the T tokens so far: a layer's KV cache."""

    key: Tensor
    value: Tensor


class Attention(nn.Module):
    """Grouped-query attention (arXiv 2305.13245), or any pairing of query and KV heads (arXiv 2311.03426).

    ``qkv`` is one weight ``[kv_heads · (group + 2) · head_dim, hidden]``: for each KV head its ``group``
    query heads, its key head, its value head. So any contiguous cut between KV heads is a whole set of
    heads, and a tensor-parallel shard needs no reordering. ``qkv_bias`` (Qwen2) is packed likewise.

    ``pairing`` replaces ``kv_heads``. Where it groups queries nothing else changes; else ``qkv`` is a
    ``PairedProjection``. Positions are in the n_q + n_kv heads before they are paired, which equals after.
    """

    def __init__(
        self,
        hidden: int,
        heads: int,
        kv_heads: int,
        head_dim: int,
        qkv_bias: bool = False,
        pairing: Pairing | None = None,
    ) -> None:
        super().__init__()
        kv_heads = kv_heads if pairing is None else pairing.n_kv
        self.group, self.head_dim = heads // kv_heads, head_dim
        self.qkv: nn.Linear | PairedProjection | GroupedProjection
        if pairing is None:
            self.qkv = nn.Linear(hidden, kv_heads * (self.group + 2) * head_dim, bias=qkv_bias)
        else:
            kind = GroupedProjection if pairing.is_grouped else PairedProjection
            self.qkv = kind(hidden, pairing, head_dim, qkv_bias)
        self.out = nn.Linear(heads * head_dim, hidden, bias=False)

    @property
    def pairing(self) -> Pairing | None:
        """Which heads of what ``project`` gives meet; None where grouped queries meet their KV heads."""
        return None if getattr(self.qkv, "by_unit", True) else self.qkv.pairing  # type: ignore[return-value]

    def forward(self, x: Tensor, rotary: Tensor, documents: Documents | None = None) -> Tensor:
        """``x [S, B, hidden]`` or ``[S·B, hidden]`` -> the same; ``rotary [2, S, head_dim]``."""
        return self._close(self._attend(self.project(x, rotary), documents))

    def extend(self, x: Tensor, rotary: Tensor, past: KeyValues | None) -> tuple[Tensor, KeyValues]:
        """``x [S, B, hidden]`` after the tokens of ``past`` -> output and the longer cache.

        ``rotary`` are the positions of x alone. In pieces or at once a sequence gives the same output.
        """
        query, key, value = self.project(x, rotary)
        if past is not None:
            key, value = torch.cat([past.key, key], dim=2), torch.cat([past.value, value], dim=2)
        return self._close(self._attend(Heads(query, key, value))), KeyValues(key, value)

    def project(self, x: Tensor, rotary: Tensor) -> Heads:
        """``x [S, B, hidden]`` or ``[S·B, hidden]`` -> its heads, rotated.

        How many heads there are is read off the projection, which may hold a share of them.
        """
        sequence = rotary.shape[1]
        packed = self.qkv(x)
        batch = packed.numel() // packed.shape[-1] // sequence
        pairing = self.pairing
        queries, keys = (self.group, 1) if pairing is None else (pairing.n_q, pairing.n_kv)  # of a unit
        units = packed.shape[-1] // ((queries + 2 * keys) * self.head_dim)
        packed = packed.view(sequence, batch, packed.shape[-1])
        return Heads(*rotary_qkv(packed, rotary, units, queries, keys, keys))

    def flops_per_token(self, sequence: int) -> float:
        """FLOPs of one token forward: projections, and ``2 S d`` for meeting half of the keys on average."""
        inputs = sum(parameter.numel() for parameter in self.qkv.parameters() if parameter.dim() > 1)
        projections = 2.0 * (inputs + self.out.weight.numel())
        return projections + 2.0 * sequence * self.out.weight.shape[1]

    def _attend(self, heads: Heads, documents: Documents | None = None) -> Tensor:
        pairing = self.pairing
        if pairing is None:
            return attend(heads, documents)
        if documents is not None:
            raise UserError("train.document_mask is true, but the pairs of model.pairing know no documents")
        return attend_pairs(heads, pairing)

    def _close(self, mixed: Tensor) -> Tensor:
        batch, _, sequence, _ = mixed.shape
        return self.out(mixed.permute(2, 0, 1, 3).reshape(sequence, batch, -1))
