"""The Mamba-2 mixer: projections, causal convolution, SSD recurrence, gated norm."""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from flashtrain.errors import UserError
from flashtrain.kernels.causal_conv import reference as conv_reference
from flashtrain.kernels.causal_conv.op import causal_conv
from flashtrain.kernels.gated_norm.op import gated_norm
from flashtrain.kernels.ssd import reference
from flashtrain.kernels.ssd.op import ssd

_RATES = (1.0, 16.0)  # -A at the start, uniform (arXiv 2405.21060, its published code)
_STEPS = (1e-3, 1e-1)  # Δ at the start, uniform in its logarithm


class MixerState(NamedTuple):
    """All that a ``Mamba2`` remembers of earlier tokens: ``tail [B, taps-1, C]`` and ``ssm [B, H, P, N]``.

    Its size does not depend on how many tokens there were. ``tail`` may be a view of a longer tensor.
    """

    tail: Tensor
    ssm: Tensor


class Mamba2(nn.Module):
    """Mamba-2 (arXiv 2405.21060): a mixer whose cost is linear in the sequence.

    ``inputs`` is one weight ``[2·inner + 2·groups·states + heads, hidden]`` with rows of z, x, B, C and dt in
    this order, as Megatron and mamba_ssm have it; inner is ``heads · head_dim``. The convolution runs over
    x, B and C. The norm is over each of ``groups`` parts, so that a part needs nothing of the others.
    """

    def __init__(
        self,
        hidden: int,
        heads: int,
        head_dim: int,
        states: int,
        *,
        groups: int = 1,
        taps: int = 4,
        norm_epsilon: float = 1e-5,
        generator: torch.Generator | None = None,
    ) -> None:
        if min(hidden, heads, head_dim, states, groups, taps) < 1 or heads % groups:
            raise UserError(
                f"Mamba2 of {heads} heads, {groups} groups, {taps} taps: sizes must be at least 1, and "
                "groups must divide heads"
            )
        super().__init__()
        self.heads, self.head_dim, self.states, self.groups = heads, head_dim, states, groups
        self.inner, self.taps, self.norm_epsilon = heads * head_dim, taps, norm_epsilon
        self.mixed = self.inner + 2 * groups * states
        self.inputs = nn.Linear(hidden, self.inner + self.mixed + heads, bias=False)
        self.conv_weight = nn.Parameter(torch.empty(self.mixed, taps))
        self.conv_bias = nn.Parameter(torch.empty(self.mixed))
        self.log_rate = nn.Parameter(torch.empty(heads))
        self.step_bias = nn.Parameter(torch.empty(heads))
        self.skip = nn.Parameter(torch.empty(heads))
        self.norm_weight = nn.Parameter(torch.empty(self.inner))
        self.out = nn.Linear(self.inner, hidden, bias=False)
        self.initialise(generator)

    @torch.no_grad()
    def initialise(self, generator: torch.Generator | None = None) -> None:
        """Draw convolution, rates and step sizes; the two projections are left to the model."""
        if self.log_rate.is_meta:
            return
        self.conv_weight.uniform_(-(self.taps**-0.5), self.taps**-0.5, generator=generator)
        self.conv_bias.zero_()
        self.log_rate.uniform_(*_RATES, generator=generator).log_()
        step = self.step_bias.uniform_(*map(math.log, _STEPS), generator=generator).exp()
        self.step_bias.copy_(step + (-torch.expm1(-step)).log())  # softplus of it is the step
        self.skip.fill_(1.0)
        self.norm_weight.fill_(1.0)

    def forward(self, x: Tensor) -> Tensor:
        """``x [S, B, hidden]`` -> the same; nothing came before."""
        return self.extend(x, None)[0]

    def extend(self, x: Tensor, state: MixerState | None) -> tuple[Tensor, MixerState]:
        """``x [S, B, hidden]`` after the tokens that ``state`` stands for -> output and the new state.

        In pieces or at once a sequence gives the same, gradients included: they flow through the state.
        """
        z, mixed, dt = self._split(self.inputs(x))
        mixed, tail = causal_conv(
            mixed.transpose(0, 1), self.conv_weight, self.conv_bias, None if state is None else state.tail
        )
        values, keys, queries = self._heads(mixed)
        y, ssm = ssd(
            values,
            dt.transpose(0, 1),
            self._rate(),
            keys,
            queries,
            self.skip,
            dt_bias=self.step_bias,
            initial_state=None if state is None else state.ssm,
        )
        return self._close(y.flatten(2).transpose(0, 1), z), MixerState(tail, ssm)

    def step(self, x: Tensor, state: MixerState) -> tuple[Tensor, MixerState]:
        """One token ``x [B, hidden]`` -> ``(output [B, hidden], new state)``, by the recurrence itself."""
        z, mixed, dt = self._split(self.inputs(x))
        mixed = mixed.unsqueeze(1)
        tail = torch.cat([state.tail.to(mixed.dtype), mixed], dim=1)[:, 1:]
        mixed = conv_reference.causal_conv(mixed, self.conv_weight, self.conv_bias, state.tail)
        values, keys, queries = (part.squeeze(1) for part in self._heads(mixed))
        y, ssm = reference.step(values, dt, self._rate(), keys, queries, state.ssm, self.skip, self.step_bias)
        return self._close(y.flatten(1), z), MixerState(tail, ssm)

    def empty_state(self, batch: int) -> MixerState:
        """The state before the first token: zeros, ``tail [B, taps-1, C]`` and ``ssm [B, H, P, N]``."""
        weight = self.inputs.weight
        wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
        tail = torch.zeros(batch, self.taps - 1, self.mixed, dtype=weight.dtype, device=weight.device)
        size = (batch, self.heads, self.head_dim, self.states)
        return MixerState(tail, torch.zeros(size, dtype=wide, device=weight.device))

    def flops_per_token(self, sequence: int, chunk: int = 128) -> float:
        """FLOPs of one token forward: projections, and the recurrence in chunks of Q = ``chunk`` tokens.

        ``2 Q N G + 2 Q inner + 4 N inner`` for the recurrence: products within a chunk are counted whole,
        not the causal half. Convolution, gate and norm are left out, as for attention. A sequence shorter
        than a chunk is one of its own length.
        """
        chunk = min(chunk, sequence)
        projections = 2.0 * (self.inputs.weight.numel() + self.out.weight.numel())
        within = 2.0 * chunk * (self.states * self.groups + self.inner)
        return projections + within + 4.0 * self.states * self.inner

    def bytes_per_token(self, chunk: int = 128, itemsize: int = 2) -> float:
        """Fewest bytes between memory and the processor for one token forward, beside the projections.

        Their output is read and the gated output written once, ``itemsize`` bytes a value; a state in fp32
        is written and read once a chunk.
        """
        values = self.inputs.weight.shape[0] + self.inner
        return float(values * itemsize) + 2 * 4 * self.inner * self.states / chunk

    def _rate(self) -> Tensor:
        return -self.log_rate.to(torch.promote_types(self.log_rate.dtype, torch.float32)).exp()

    def _split(self, packed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        z, mixed, dt = packed.split([self.inner, self.mixed, self.heads], dim=-1)
        return z, mixed, dt

    def _heads(self, mixed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x ``[B, S, H, P]``, B and C ``[B, S, G, N]`` out of the convolution's output."""
        shared = self.groups * self.states
        values, keys, queries = mixed.split([self.inner, shared, shared], dim=-1)
        keys, queries = (part.unflatten(-1, (self.groups, self.states)) for part in (keys, queries))
        return values.unflatten(-1, (self.heads, self.head_dim)), keys, queries

    def _close(self, y: Tensor, z: Tensor) -> Tensor:
        return self.out(gated_norm(y, z, self.norm_weight, self.groups, self.norm_epsilon))
