"""Layers of a decoder: mixers and feed-forward layers around the residual stream."""

from typing import Any

from torch import Tensor, nn

from flashtrain.nn.attend import Documents
from flashtrain.nn.attention import Attention, KeyValues
from flashtrain.nn.mlp import SwiGLU
from flashtrain.nn.norm import RMSNorm


class Block(nn.Module):
    """``x + attention(norm(x))``, then ``x + mlp(norm(x))``."""

    def __init__(self, attention: Attention, mlp: SwiGLU, hidden: int, norm_epsilon: float) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(hidden, norm_epsilon)
        self.attention = attention
        self.mlp_norm = RMSNorm(hidden, norm_epsilon)
        self.mlp = mlp

    def forward(self, x: Tensor, rotary: Tensor, documents: Documents | None = None) -> Tensor:
        """``x [S, B, hidden]`` or a shard of its rows -> the same; ``rotary [2, S, head_dim]``."""
        normed, x = self.mlp_norm(self.attention(self.attention_norm(x), rotary, documents), x)
        return x + self.mlp(normed)

    def extend(self, x: Tensor, rotary: Tensor, past: KeyValues | None) -> tuple[Tensor, Any]:
        """``x [S, B, hidden]`` after the tokens of ``past`` -> the same, and what later tokens need."""
        mixed, now = self.attention.extend(self.attention_norm(x), rotary, past)
        normed, x = self.mlp_norm(mixed, x)
        return x + self.mlp(normed), now
