"""Causal self-attention with grouped queries and rotary positions, on one packed projection."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from flashtrain.kernels.rotary.op import rotary_qkv
from flashtrain.nn.attend import Heads, attend


class KeyValues(NamedTuple):
    """Final keys and values ``[B, kv heads, T, D]`` of the T tokens so far: a layer's KV cache."""

    key: Tensor
    value: Tensor


class Attention(nn.Module):
    """Grouped-query attention (arXiv 2305.13245).

    ``qkv`` is one weight ``[kv_heads · (group + 2) · head_dim, hidden]``: for each KV head its ``group``
    query heads, its key head, its value head. So any contiguous cut between KV heads is a whole set of
    heads, and a tensor-parallel shard needs no reordering. ``qkv_bias`` (Qwen2) is packed likewise.
    """

    def __init__(self, hidden: int, heads: int, kv_heads: int, head_dim: int, qkv_bias: bool = False) -> None:
        super().__init__()
        self.group, self.head_dim = heads // kv_heads, head_dim
        self.qkv = nn.Linear(hidden, kv_heads * (self.group + 2) * head_dim, bias=qkv_bias)
        self.out = nn.Linear(heads * head_dim, hidden, bias=False)

    def forward(self, x: Tensor, rotary: Tensor) -> Tensor:
        """``x [S, B, hidden]`` or ``[S·B, hidden]`` -> the same; ``rotary [2, S, head_dim]``."""
        return self._close(attend(self.project(x, rotary)))

    def extend(self, x: Tensor, rotary: Tensor, past: KeyValues | None) -> tuple[Tensor, KeyValues]:
        """``x [S, B, hidden]`` after the tokens of ``past`` -> output and the longer cache.

        ``rotary`` are the positions of x alone. In pieces or at once a sequence gives the same output.
        """
        query, key, value = self.project(x, rotary)
        if past is not None:
            key, value = torch.cat([past.key, key], dim=2), torch.cat([past.value, value], dim=2)
        return self._close(attend(Heads(query, key, value))), KeyValues(key, value)

    def project(self, x: Tensor, rotary: Tensor) -> Heads:
        """``x [S, B, hidden]`` or ``[S·B, hidden]`` -> its heads, rotated.

        How many heads there are is read off the projection, which may hold a share of them.
        """
        sequence = rotary.shape[1]
        packed = self.qkv(x)
        batch = packed.numel() // packed.shape[-1] // sequence
        kv_heads = packed.shape[-1] // ((self.group + 2) * self.head_dim)
        packed = packed.view(sequence, batch, packed.shape[-1])
        return Heads(*rotary_qkv(packed, rotary, kv_heads, self.group, 1, 1))

    def flops_per_token(self, sequence: int) -> float:
        """FLOPs of one token forward: projections, and ``2 S d`` for meeting half of the keys on average."""
        projections = 2.0 * (self.qkv.weight.numel() + self.out.weight.numel())
        return projections + 2.0 * sequence * self.out.weight.shape[1]

    def _close(self, mixed: Tensor) -> Tensor:
        batch, _, sequence, _ = mixed.shape
        return self.out(mixed.permute(2, 0, 1, 3).reshape(sequence, batch, -1))
