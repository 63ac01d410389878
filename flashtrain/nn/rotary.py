"""Rotary positions (RoFormer, arXiv 2104.09864)."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from flashtrain.kernels.rotary.reference import rotate

__all__ = ["Llama3Scaling", "rotary_table", "rotate"]


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
    first: int = 0,
) -> Tensor:
    """Cosine and sine ``[2, sequence, head_dim]`` for ``rotate``, fp32, of positions from ``first`` on.

    The two halves of a head hold the pairs' first and second elements, as in Llama checkpoints on
    Hugging Face.
    """
    frequency = theta ** (-torch.arange(0, head_dim, 2, dtype=torch.float64, device=device) / head_dim)
    if scaling is not None:
        frequency = scaling.scale(frequency)
    position = torch.arange(first, first + sequence, dtype=torch.float64, device=device)
    angle = position[:, None] * frequency
    angle = torch.cat([angle, angle], dim=-1)
    return torch.stack([angle.cos(), angle.sin()]).float()


def no_positions(sequence: int, head_dim: int, device: torch.device | None = None) -> Tensor:
    """A table ``[2, sequence, head_dim]`` that turns nothing: attention knows order by its mask alone."""
    shape = (sequence, head_dim)
    return torch.stack([torch.ones(shape, device=device), torch.zeros(shape, device=device)])
