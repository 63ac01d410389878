"""The Mamba-1 mixer (selective scan) in plain torch, for models that were published with it."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, pad, silu, softplus

from flashtrain.errors import UserError
from flashtrain.kernels.causal_conv.op import causal_conv
from flashtrain.nn.ssm import MixerState
from flashtrain.nn.weights import OwnWeights

_STEPS = (1e-3, 1e-1)  # Δ at the start, uniform in its logarithm (arXiv 2312.00752, section 3.6)


class Mamba1(OwnWeights):
    """Mamba (arXiv 2312.00752) with Jamba's RMSNorm on dt, B and C (arXiv 2403.19887); see ``scan``.

    A reference: right and differentiable on any device, but it keeps every token's states, so it is slow.
    ``inputs`` has the weights of x and z apart, which mamba_ssm has in this order as one; ``log_rate`` is a
    vector of ``inner · states`` numbers, so that weight decay leaves it alone. Each of the ``inner`` channels
    is a head; they meet in ``select``, whose output is that of all of them, and in ``out``.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """``rank`` of the step sizes' projection; None: a sixteenth of the width, rounded up."""

        states: int = 16
        expand: int = 2
        rank: int | None = None
        taps: int = 4

        def validate(self, name: str, hidden: int, tensor_degree: int) -> None:
            """Raise UserError, with ``name`` of this section, for sizes that do not fit together."""
            for size, value in vars(self).items():
                if value is not None and value < 1:
                    raise UserError(f"{name}.{size} is {value}; it must be at least 1")
            inner = self.expand * hidden
            if inner % tensor_degree:
                raise UserError(
                    f"{name} has {inner} channels; parallel.tensor {tensor_degree} must divide them"
                )

        def build(self, hidden: int, norm_epsilon: float) -> "Mamba1":
            """The mixer of a model of width ``hidden``."""
            rank = self.rank or -(-hidden // 16)
            return Mamba1(hidden, self.expand * hidden, self.states, rank, self.taps, norm_epsilon)

    def __init__(
        self, hidden: int, inner: int, states: int, rank: int, taps: int = 4, norm_epsilon: float = 1e-5
    ) -> None:
        super().__init__()
        self.inner, self.states, self.step_rank, self.taps = inner, states, rank, taps
        self.heads, self.groups = inner, 1
        self.inputs = nn.ParameterDict([(part, nn.Parameter(torch.empty(inner, hidden))) for part in "xz"])
        self.conv_weight = nn.Parameter(torch.empty(inner, taps))
        self.conv_bias = nn.Parameter(torch.empty(inner))
        self.select = nn.Linear(inner, rank + 2 * states, bias=False)
        self.step_norm = nn.RMSNorm(rank, eps=norm_epsilon)
        self.key_norm = nn.RMSNorm(states, eps=norm_epsilon)
        self.query_norm = nn.RMSNorm(states, eps=norm_epsilon)
        self.step_weight = nn.Parameter(torch.empty(inner, rank))
        self.step_bias = nn.Parameter(torch.empty(inner))
        self.log_rate = nn.Parameter(torch.empty(inner * states))
        self.skip = nn.Parameter(torch.empty(inner))
        self.out = nn.Linear(inner, hidden, bias=False)
        for weight in self.inputs.values():  # as that of nn.Linear
            nn.init.uniform_(weight, -(hidden**-0.5), hidden**-0.5)
        self.initialise()

    @torch.no_grad()
    def initialise(self, generator: torch.Generator | None = None) -> None:
        """Draw convolution and step sizes, set the rates; the projections are drawn by the model."""
        if self.log_rate.is_meta:
            return
        self.conv_weight.uniform_(-(self.taps**-0.5), self.taps**-0.5, generator=generator)
        self.conv_bias.zero_()
        self.step_weight.uniform_(-(self.step_rank**-0.5), self.step_rank**-0.5, generator=generator)
        step = self.step_bias.uniform_(*map(math.log, _STEPS), generator=generator).exp()
        self.step_bias.copy_(step + (-torch.expm1(-step)).log())  # softplus of it is the step
        self.log_rate.copy_(torch.arange(1.0, self.states + 1).log().repeat(self.inner))
        self.skip.fill_(1.0)

    def forward(self, x: Tensor, sequence: int | None = None) -> Tensor:
        """``x [S, B, hidden]`` -> the same; nothing came before."""
        return self.extend(x, None, sequence)[0]

    def extend(
        self, x: Tensor, state: MixerState | None, sequence: int | None = None
    ) -> tuple[Tensor, MixerState]:
        """``x [S, B, hidden]`` after the tokens that ``state`` stands for -> output and the new state.

        In pieces or at once a sequence gives the same, gradients included. The state is a ``MixerState`` with
        ``ssm [B, inner, states]``. ``sequence`` is S where x is ``[S·B, hidden]``.
        """
        projected = self._project(x)
        if sequence is not None:
            projected = projected.view(sequence, -1, projected.shape[-1])
        values, z = projected.transpose(0, 1).chunk(2, dim=-1)
        before = (None, None) if state is None else state
        values, tail = causal_conv(values, self._own("conv_weight"), self._own("conv_bias"), before[0])
        parts = self.select(values).split([self.step_rank, self.states, self.states], dim=-1)
        steps, keys, queries = self.step_norm(parts[0]), self.key_norm(parts[1]), self.query_norm(parts[2])
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        steps = softplus(linear(steps, self._own("step_weight")).to(wide) + self._own("step_bias").to(wide))
        rate = -self._own("log_rate").to(wide).exp().view(-1, self.states)
        y, ssm = scan(values.to(wide), steps, rate, keys.to(wide), queries.to(wide), before[1])
        y = (y + self._own("skip").to(wide) * values.to(wide)).to(z.dtype) * silu(z)
        return self.out(y.transpose(0, 1)), MixerState(tail, ssm)

    def packed(self) -> Tensor:
        """The weights of x, then of z, ``[2 · inner, hidden]``."""
        return self._once("inputs", lambda: torch.cat([self._own("inputs.x"), self._own("inputs.z")]))

    @staticmethod
    def rows_of() -> Mapping[str, str]:
        """What the rows of each parameter belong to; of ``select`` and ``out`` the columns."""
        own = ("conv_weight", "conv_bias", "step_weight", "step_bias", "log_rate", "skip")
        return dict.fromkeys(("inputs.x", "inputs.z", *own), "heads")

    def flops_per_token(self, sequence: int) -> float:
        """FLOPs of one token forward, with those of the scan, ``9 inner · states``, and the convolution."""
        weights = (
            *self.inputs.values(),
            self.select.weight,
            self.step_weight,
            self.out.weight,
            self.conv_weight,
        )
        return 2.0 * sum(weight.numel() for weight in weights) + 9.0 * self.inner * self.states

    # What follows, and forward, read sizes off the parameters, of which parallelism may hold a share.

    def _project(self, x: Tensor) -> Tensor:
        return linear(x, self.packed())


def scan(
    x: Tensor, steps: Tensor, rate: Tensor, keys: Tensor, queries: Tensor, state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """``(y [B, S, D], last h [B, D, N])``: ``h_t = exp(Δ_t A) h_{t-1} + Δ_t x_t B_t``, ``y_t = h_t·C_t``.

    x and steps Δ ``[B, S, D]``, rate A ``[D, N]`` (negative), keys B and queries C ``[B, S, N]``, state
    ``[B, D, N]`` (None: zeros), all of one dtype. About √S chunks run side by side from states of zero, token
    by token; then each adds what came before it. Keeps several ``[B, S, D, N]`` for the backward pass.
    """
    batch, sequence, width = x.shape
    chunk = max(1, math.isqrt(sequence))
    # Steps of size zero leave the state as it is.
    filler = (0, 0, 0, -sequence % chunk)
    x, steps, keys, queries = (pad(t, filler).unflatten(1, (-1, chunk)) for t in (x, steps, keys, queries))
    decay = steps.unsqueeze(-1) * rate  # [B, chunks, chunk, D, N], logarithms
    added = (steps * x).unsqueeze(-1) * keys.unsqueeze(-2)
    own = torch.zeros_like(added[:, :, 0])
    states = []
    for t in range(chunk):
        own = own * decay[:, :, t].exp() + added[:, :, t]
        states.append(own)
    since = decay.cumsum(2).exp()
    carried = x.new_zeros(batch, width, keys.shape[-1]) if state is None else state
    before = []
    for index in range(own.shape[1]):
        before.append(carried)
        carried = carried * since[:, index, -1] + own[:, index]
    whole = torch.stack(states, dim=2) + since * torch.stack(before, dim=1).unsqueeze(2)
    y = (whole * queries.unsqueeze(-2)).sum(-1)
    return y.flatten(1, 2)[:, :sequence], carried
