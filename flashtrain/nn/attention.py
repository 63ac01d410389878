"""Causal self-attention with grouped queries and rotary positions, on one packed projection."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention


@dataclass(frozen=True, kw_only=True)
class Llama3Scaling:
    """Rotary positions for a longer context, as in Llama 3.1 (arXiv 2407.21783); the defaults are its own.

    A pair that turns less than ``low_freq_factor`` times in ``original_max_position_embeddings`` tokens
    turns ``factor`` times slower; one that turns more than ``high_freq_factor`` times stays; between the
    two the frequency is interpolated.
    """

    factor: float = 8.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192

    def scale(self, frequency: Tensor) -> Tensor:
        """``frequency [head_dim / 2]`` in radians per token -> the same, scaled."""
        turns = self.original_max_position_embeddings * frequency / (2 * math.pi)
        kept = (turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
        kept = kept.clamp(0.0, 1.0)
        return frequency * (kept + (1.0 - kept) / self.factor)


def rotary_table(
    sequence: int,
    head_dim: int,
    theta: float,
    device: torch.device | None = None,
    scaling: Llama3Scaling | None = None,
) -> Tensor:
    """Cosine and sine ``[2, sequence, head_dim]`` for ``rotate``, fp32 (RoFormer, arXiv 2104.09864).

    The two halves of a head hold the pairs' first and second elements, as in Llama checkpoints on
    Hugging Face.
    """
    frequency = theta ** (-torch.arange(0, head_dim, 2, dtype=torch.float64, device=device) / head_dim)
    if scaling is not None:
        frequency = scaling.scale(frequency)
    angle = torch.arange(sequence, dtype=torch.float64, device=device)[:, None] * frequency
    angle = torch.cat([angle, angle], dim=-1)
    return torch.stack([angle.cos(), angle.sin()]).float()


def rotate(x: Tensor, table: Tensor) -> Tensor:
    """Rotate ``x [..., sequence, head_dim]`` by the positions of ``table [2, sequence, head_dim]``."""
    cosine, sine = table.to(x.dtype)
    first, second = x.chunk(2, dim=-1)
    return x * cosine + torch.cat([-second, first], dim=-1) * sine


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
        """``x [S, B, hidden]`` or ``[S·B, hidden]`` -> the same; ``rotary [2, S, head_dim]``.

        How many heads there are is read off the projection, which may hold a share of them.
        """
        sequence = rotary.shape[1]
        packed = self.qkv(x)
        batch = packed.numel() // packed.shape[-1] // sequence
        packed = packed.view(sequence, batch, -1, self.group + 2, self.head_dim).permute(1, 2, 3, 0, 4)
        query = rotate(packed[:, :, : self.group].flatten(1, 2), rotary)
        key = rotate(packed[:, :, self.group], rotary)
        value = packed[:, :, self.group + 1]
        if self.group > 1:
            key, value = (kv.repeat_interleave(self.group, dim=1) for kv in (key, value))
        mixed = scaled_dot_product_attention(query, key, value, is_causal=True)
        return self.out(mixed.permute(2, 0, 1, 3).reshape(sequence, batch, -1))
