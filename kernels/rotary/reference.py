"""Rotary positions (RoFormer, arXiv 2104.09864) on a packed projection, in plain torch; differentiable."""

import torch
from torch import Tensor


def rotate(x: Tensor, table: Tensor) -> Tensor:
    """Rotate ``x [..., sequence, head_dim]`` by the positions of ``table [2, sequence, head_dim]``.

    Computed in fp32 (fp64 for fp64) and rounded once to x's dtype.
    """
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    cosine, sine = table.to(wide)
    turning = x.to(wide)
    first, second = turning.chunk(2, dim=-1)
    return (turning * cosine + torch.cat([-second, first], dim=-1) * sine).to(x.dtype)


def rotary_qkv(
    packed: Tensor, table: Tensor, units: int, queries: int, keys: int, values: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Heads of ``packed [S, B, units · (queries + keys + values) · D]``, query and key heads rotated.

    -> query ``[B, units · queries, S, D]``, key and value likewise. The value may be a view of packed.
    """
    sequence, batch, _ = packed.shape
    heads = packed.view(sequence, batch, units, queries + keys + values, -1).permute(1, 2, 3, 0, 4)
    query, key, value = (part.flatten(1, 2) for part in heads.split([queries, keys, values], dim=2))
    return rotate(query, table), rotate(key, table), value
