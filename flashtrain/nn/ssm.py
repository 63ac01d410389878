"""The Mamba-2 mixer: projections, causal convolution, SSD recurrence, gated norm."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from flashtrain.errors import UserError
from flashtrain.kernels.causal_conv import reference as conv_reference
from flashtrain.kernels.causal_conv.op import causal_conv
from flashtrain.kernels.gated_norm.op import gated_norm
from flashtrain.kernels.mamba2 import op as mamba2
from flashtrain.kernels.ssd import reference
from flashtrain.kernels.ssd.op import ssd
from flashtrain.nn.weights import OwnWeights

_RATES = (1.0, 16.0)  # -A at the start, uniform (arXiv 2405.21060, its published code)
_STEPS = (1e-3, 1e-1)  # Δ at the start, uniform in its logarithm

_PARTS = {"inputs": ("z", "x", "B", "C", "dt"), "conv_weight": ("x", "B", "C"), "conv_bias": ("x", "B", "C")}


class MixerState(NamedTuple):
    """All that a ``Mamba2`` remembers of earlier tokens: ``tail [B, taps-1, C]`` and ``ssm [B, H, P, N]``.

    Its size does not depend on how many tokens there were. ``tail`` may be a view of a longer tensor.
    """

    tail: Tensor
    ssm: Tensor


class Mamba2(OwnWeights):
    """Mamba-2 (arXiv 2405.21060): a mixer whose cost is linear in the sequence.

    ``inputs`` are the weights ``[rows, hidden]`` of z, x, B, C and dt: ``heads · head_dim`` rows (inner),
    the same, ``groups · states``, the same, and ``heads``. The convolution runs over x, B and C. Each is a
    parameter of its own, so that a contiguous cut of each between heads, or groups, is a whole set of them;
    ``packed`` has them one after the other, as Megatron and mamba_ssm do, and is what x is multiplied by.
    The norm is over each of ``norm_groups`` parts (default: ``groups``), so that a part needs nothing of the
    others.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """``expand · hidden / head_dim`` heads; ``norm_groups`` None: as many as ``groups``."""

        head_dim: int = 64
        states: int = 128
        groups: int = 1
        norm_groups: int | None = None
        expand: int = 2
        taps: int = 4

        def validate(self, name: str, hidden: int, tensor_degree: int) -> None:
            """Raise UserError, with ``name`` of this section, for sizes that do not fit together."""
            for size, value in vars(self).items():
                if value is not None and value < 1:
                    raise UserError(f"{name}.{size} is {value}; it must be at least 1")
            heads, rest = divmod(self.expand * hidden, self.head_dim)
            if rest:
                raise UserError(
                    f"{name}.head_dim is {self.head_dim}; it must divide {name}.expand x model.hidden, "
                    f"{self.expand * hidden}"
                )
            norms = self.norm_groups or self.groups
            for size, by in (("groups", self.groups), ("norm_groups", norms), ("tensor", tensor_degree)):
                if heads % by:
                    where = "parallel" if size == "tensor" else name
                    raise UserError(f"{name} has {heads} heads; {where}.{size} {by} must divide them")
            if norms % tensor_degree:
                raise UserError(
                    f"{name} norms over {norms} groups; parallel.tensor {tensor_degree} must divide them: "
                    f"set {name}.norm_groups"
                )
            if self.groups % tensor_degree and tensor_degree % self.groups:
                raise UserError(
                    f"{name}.groups is {self.groups}; it must divide parallel.tensor {tensor_degree}, or be "
                    "divided by it"
                )

        def build(self, hidden: int, norm_epsilon: float) -> "Mamba2":
            """The mixer of a model of width ``hidden``."""
            return Mamba2(
                hidden,
                self.expand * hidden // self.head_dim,
                self.head_dim,
                self.states,
                groups=self.groups,
                norm_groups=self.norm_groups,
                taps=self.taps,
                norm_epsilon=norm_epsilon,
            )

    # Whether all that is between the projections may run as one function: not where it is cut between ranks.
    in_one = True

    def __init__(
        self,
        hidden: int,
        heads: int,
        head_dim: int,
        states: int,
        *,
        groups: int = 1,
        norm_groups: int | None = None,
        taps: int = 4,
        norm_epsilon: float = 1e-5,
        generator: torch.Generator | None = None,
    ) -> None:
        norm_groups = norm_groups or groups
        if min(hidden, heads, head_dim, states, groups, taps) < 1 or heads % groups or heads % norm_groups:
            raise UserError(
                f"Mamba2 of {heads} heads, {groups} groups, {norm_groups} of the norm, {taps} taps: sizes "
                "must be at least 1, and groups must divide heads"
            )
        super().__init__()
        self.heads, self.head_dim, self.states, self.groups = heads, head_dim, states, groups
        self.inner, self.taps, self.norm_epsilon = heads * head_dim, taps, norm_epsilon
        self.heads_per_norm = heads // norm_groups
        rows = {"z": self.inner, "x": self.inner, "B": groups * states, "C": groups * states, "dt": heads}
        self.inputs = _parameters({part: (rows[part], hidden) for part in _PARTS["inputs"]})
        self.conv_weight = _parameters({part: (rows[part], taps) for part in _PARTS["conv_weight"]})
        self.conv_bias = _parameters({part: (rows[part],) for part in _PARTS["conv_bias"]})
        self.log_rate = nn.Parameter(torch.empty(heads))
        self.step_bias = nn.Parameter(torch.empty(heads))
        self.skip = nn.Parameter(torch.empty(heads))
        self.norm_weight = nn.Parameter(torch.empty(self.inner))
        self.out = nn.Linear(self.inner, hidden, bias=False)
        for weight in self.inputs.values():  # as that of nn.Linear
            nn.init.uniform_(weight, -(hidden**-0.5), hidden**-0.5, generator=generator)
        self.initialise(generator)

    @torch.no_grad()
    def initialise(self, generator: torch.Generator | None = None) -> None:
        """Draw convolution, rates and step sizes; the projections are left to the model."""
        if self.log_rate.is_meta:
            return
        for weight in self.conv_weight.values():
            weight.uniform_(-(self.taps**-0.5), self.taps**-0.5, generator=generator)
        for bias in self.conv_bias.values():
            bias.zero_()
        self.log_rate.uniform_(*_RATES, generator=generator).log_()
        step = self.step_bias.uniform_(*map(math.log, _STEPS), generator=generator).exp()
        self.step_bias.copy_(step + (-torch.expm1(-step)).log())  # softplus of it is the step
        self.skip.fill_(1.0)
        self.norm_weight.fill_(1.0)

    def forward(self, x: Tensor, sequence: int | None = None) -> Tensor:
        """``x [S, B, hidden]`` -> the same; nothing came before. See ``extend`` for ``sequence``."""
        return self.extend(x, None, sequence)[0]

    def extend(
        self, x: Tensor, state: MixerState | None, sequence: int | None = None
    ) -> tuple[Tensor, MixerState]:
        """``x [S, B, hidden]`` after the tokens that ``state`` stands for -> output and the new state.

        In pieces or at once a sequence gives the same, gradients included: they flow through the state.
        ``sequence`` is S where x is ``[S·B, hidden]`` or a shard of its rows.
        """
        projected = self._project(x)
        if sequence is not None:
            projected = projected.view(sequence, -1, projected.shape[-1])
        tail, ssm = (None, None) if state is None else state
        if self.in_one and mamba2.takes(projected, weights := self._weights(), sizes := self._sizes()):
            normed, *now = mamba2.mix(projected, tail, ssm, weights, sizes)
            return self.out(normed), MixerState(*now)
        z, mixed, dt = self._split(projected)
        mixed, new_tail = self._convolve(mixed.transpose(0, 1), tail)
        values, keys, queries = self._heads(mixed)
        y, ssm = self._recur(values, dt.transpose(0, 1), keys, queries, ssm)
        return self._close(y.flatten(2).transpose(0, 1), z), MixerState(new_tail, ssm)

    def step(self, x: Tensor, state: MixerState) -> tuple[Tensor, MixerState]:
        """One token ``x [B, hidden]`` -> ``(output [B, hidden], new state)``, by the recurrence itself."""
        z, mixed, dt = self._split(self._project(x))
        mixed = mixed.unsqueeze(1)
        tail = torch.cat([state.tail.to(mixed.dtype), mixed], dim=1)[:, 1:]
        weight, bias = self._joined("conv_weight"), self._joined("conv_bias")
        mixed = conv_reference.causal_conv(mixed, weight, bias, state.tail)
        values, keys, queries = (part.squeeze(1) for part in self._heads(mixed))
        skip, step_bias = self._own("skip"), self._own("step_bias")
        y, ssm = reference.step(values, dt, self._rate(), keys, queries, state.ssm, skip, step_bias)
        return self._close(y.flatten(1), z), MixerState(tail, ssm)

    def empty_state(self, batch: int) -> MixerState:
        """The state before the first token: zeros, ``tail [B, taps-1, C]`` and ``ssm [B, H, P, N]``."""
        bias, heads = self._joined("conv_bias"), self._own("skip").shape[0]
        wide = torch.float64 if bias.dtype == torch.float64 else torch.float32
        tail = torch.zeros(batch, self.taps - 1, bias.shape[0], dtype=bias.dtype, device=bias.device)
        size = (batch, heads, self.head_dim, self.states)
        return MixerState(tail, torch.zeros(size, dtype=wide, device=bias.device))

    def packed(self) -> Tensor:
        """The weights of z, x, B, C and dt in this order, ``[2·inner + 2·groups·states + heads, hidden]``."""
        return self._joined("inputs")

    @staticmethod
    def rows_of() -> Mapping[str, str]:
        """What the rows of each parameter belong to: ``heads`` or ``groups``; of ``out`` the columns."""
        rows = dict.fromkeys(("log_rate", "step_bias", "skip", "norm_weight"), "heads")
        for name, parts in _PARTS.items():
            rows |= {f"{name}.{part}": "groups" if part in "BC" else "heads" for part in parts}
        return rows

    def flops_per_token(self, sequence: int, chunk: int = 128) -> float:
        """FLOPs of one token forward: projections, and the recurrence in chunks of Q = ``chunk`` tokens.

        ``2 Q N G + 2 Q inner + 4 N inner`` for the recurrence: products within a chunk are counted whole,
        not the causal half. Convolution, gate and norm are left out, as for attention. A sequence shorter
        than a chunk is one of its own length.
        """
        chunk = min(chunk, sequence)
        weights = [*self.inputs.values(), self.out.weight]
        within = 2.0 * chunk * (self.states * self.groups + self.inner)
        return 2.0 * sum(w.numel() for w in weights) + within + 4.0 * self.states * self.inner

    def bytes_per_token(self, chunk: int = 128, itemsize: int = 2) -> float:
        """Fewest bytes between memory and the processor for one token forward, beside the projections.

        Their output is read and the gated output written once, ``itemsize`` bytes a value; a state in fp32
        is written and read once a chunk.
        """
        values = sum(weight.shape[0] for weight in self.inputs.values()) + self.inner
        return float(values * itemsize) + 2 * 4 * self.inner * self.states / chunk

    # What follows reads sizes off the parameters, of which parallelism may hold a share.

    def _joined(self, name: str) -> Tensor:
        # One copy of the weight a pass, for one product instead of five.
        return self._once(name, lambda: torch.cat([self._own(f"{name}.{part}") for part in _PARTS[name]]))

    def _project(self, x: Tensor) -> Tensor:
        return linear(x, self.packed())

    def _weights(self) -> mamba2.Weights:
        own = (self._own(name) for name in ("skip", "step_bias", "norm_weight"))
        return mamba2.Weights(self._joined("conv_weight"), self._joined("conv_bias"), self._rate(), *own)

    def _sizes(self) -> mamba2.Sizes:
        heads = self._own("skip").shape[0]
        groups = heads // self.heads_per_norm
        return mamba2.Sizes(heads, self.head_dim, self.states, groups, self.norm_epsilon)

    def _convolve(self, mixed: Tensor, tail: Tensor | None) -> tuple[Tensor, Tensor]:
        """x, B and C ``[B, S, C]`` after the ``tail`` of those before -> the same, and the new tail."""
        return causal_conv(mixed, self._joined("conv_weight"), self._joined("conv_bias"), tail)

    def _recur(
        self, values: Tensor, dt: Tensor, keys: Tensor, queries: Tensor, state: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """y ``[B, S, H, P]`` and the new state, of ``dt [B, S, H]`` before softplus; see ``ssd``."""
        skip, step_bias = self._own("skip"), self._own("step_bias")
        return ssd(values, dt, self._rate(), keys, queries, skip, dt_bias=step_bias, initial_state=state)

    def _decays(self, dt: Tensor) -> Tensor:
        """Logarithm ``[B, S, H]`` of what each token leaves of the state before it, in fp32 or fp64."""
        return reference.step_sizes(dt, self._own("step_bias")) * self._rate()

    def _rate(self) -> Tensor:
        def rate() -> Tensor:
            log = self._own("log_rate")
            return -log.to(torch.promote_types(log.dtype, torch.float32)).exp()

        return self._once("rate", rate)

    def _split(self, packed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        heads = self._own("skip").shape[0]
        inner = heads * self.head_dim
        z, mixed, dt = packed.split([inner, packed.shape[-1] - inner - heads, heads], dim=-1)
        return z, mixed, dt

    def _heads(self, mixed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x ``[B, S, H, P]``, B and C ``[B, S, G, N]`` out of the convolution's output."""
        inner = self._own("norm_weight").shape[0]
        shared = (mixed.shape[-1] - inner) // 2
        values, keys, queries = mixed.split([inner, shared, shared], dim=-1)
        keys, queries = (part.unflatten(-1, (-1, self.states)) for part in (keys, queries))
        return values.unflatten(-1, (-1, self.head_dim)), keys, queries

    def _close(self, y: Tensor, z: Tensor) -> Tensor:
        weight = self._own("norm_weight")
        groups = weight.shape[0] // (self.heads_per_norm * self.head_dim)
        return self.out(gated_norm(y, z, weight, groups, self.norm_epsilon))


def _parameters(shapes: Mapping[str, tuple[int, ...]]) -> nn.ParameterDict:
    # Of pairs, since it would sort the keys of a mapping.
    return nn.ParameterDict([(name, nn.Parameter(torch.empty(shape))) for name, shape in shapes.items()])
