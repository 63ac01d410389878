"""Blocks of attention and SSM mixers: one after the other, or side by side. See ``flowhn`` for a third way.

A layout makes the blocks of a decoder out of ``Sublayers``. Each block is ``block(x, rotary)``, has
``extend`` for decoding, and counts its own FLOPs.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from flashtrain.errors import UserError
from flashtrain.nn.attention import Attention
from flashtrain.nn.mamba1 import Mamba1
from flashtrain.nn.mlp import SwiGLU
from flashtrain.nn.norm import RMSNorm
from flashtrain.nn.ssm import Mamba2

SSMConfig = Mamba2.Config | Mamba1.Config
LETTERS = {"M": "ssm", "*": "attention", "-": "mlp"}


class Sublayers(NamedTuple):
    """What a model of width ``hidden`` makes its blocks of."""

    hidden: int
    norm_epsilon: float
    attention: Callable[[], Attention]
    mlp: Callable[[], SwiGLU]

    def norm(self) -> RMSNorm:
        """A norm over the model's width."""
        return RMSNorm(self.hidden, self.norm_epsilon)

    def ssm(self, config: SSMConfig) -> Mamba2 | Mamba1:
        """An SSM mixer."""
        return config.build(self.hidden, self.norm_epsilon)


class Layer(nn.Module):
    """``x + mixer(norm(x))``. The mixer is a child named ``attention``, ``ssm`` or ``mlp``, its ``kind``."""

    def __init__(self, kind: str, mixer: nn.Module, norm: RMSNorm) -> None:
        super().__init__()
        self.norm, self.kind = norm, kind
        self.add_module(kind, mixer)

    def forward(self, x: Tensor, rotary: Tensor) -> Tensor:
        """``x [S, B, hidden]`` or a shard of its rows -> the same; ``rotary [2, S, head_dim]``."""
        return self.extend(x, rotary, None)[0]

    def extend(self, x: Tensor, rotary: Tensor, past: Any) -> tuple[Tensor, Any]:
        """``x [S, B, hidden]`` after the tokens of ``past`` -> the same, and what later tokens need."""
        mixed, now = self.mixed(self.norm(x), rotary, past)
        return x + mixed, now

    def mixed(self, normed: Tensor, rotary: Tensor, past: Any) -> tuple[Tensor, Any]:
        """What the mixer alone gives for normed tokens, and what later tokens need."""
        return mix(self.kind, getattr(self, self.kind), normed, rotary, past)


def mix(kind: str, mixer: Any, x: Tensor, rotary: Tensor, past: Any) -> tuple[Tensor, Any]:
    """Output of a mixer and what it remembers, whatever ``kind`` it is of."""
    match kind:
        case "attention":
            return mixer.extend(x, rotary, past)
        case "ssm":
            return mixer.extend(x, past, rotary.shape[1])
    return mixer(x), None


class Pattern:
    """One mixer a block, in the order of a pattern, as in Nemotron-H (arXiv 2504.03624)."""

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """``pattern`` has a letter a block, as Megatron's: M is an SSM, * attention, - an MLP.

        It is repeated until there are ``model.layers`` of them; spaces do not count. ``positions``: whether
        attention has rotary positions.
        """

        pattern: str = "M-M-M*M-"
        ssm: Mamba2.Config | Mamba1.Config = field(default_factory=Mamba2.Config)
        positions: bool = True

        def validate(self, name: str, hidden: int, layers: int, tensor_degree: int) -> None:
            """Raise UserError for a pattern that is none, or sizes that do not fit together."""
            kinds = self.pattern.replace(" ", "")
            for letter in kinds:
                if letter not in LETTERS:
                    known = ", ".join(f"{key} ({kind})" for key, kind in LETTERS.items())
                    raise UserError(f"{name}.pattern has {letter!r}; its letters are {known}")
            if not kinds or layers % len(kinds):
                raise UserError(
                    f"{name}.pattern has {len(kinds)} letters; they must divide model.layers {layers}"
                )
            self.ssm.validate(f"{name}.ssm", hidden, tensor_degree)

        def block(self, index: int, of: Sublayers) -> nn.Module:
            """Block ``index`` of a model."""
            kinds = self.pattern.replace(" ", "")
            kind = LETTERS[kinds[index % len(kinds)]]
            match kind:
                case "attention":
                    return Layer(kind, of.attention(), of.norm())
                case "ssm":
                    return Layer(kind, of.ssm(self.ssm), of.norm())
            return Layer(kind, of.mlp(), of.norm())


class Piece(NamedTuple):
    """T ``tokens`` of a sequence, and what ``branch``, ssm or attention, does: ``compute(x [T, B, H])``."""

    tokens: int
    branch: str
    compute: Callable[[Tensor], Tensor]


class Beside(nn.Module):
    """Has branches computed on the same tokens."""

    def forward(self, x: Tensor, pieces: Sequence[Piece]) -> list[Tensor]:
        """``x [S, B, H]`` or a shard of its rows -> what each of ``pieces`` gives for all of it, in order."""
        return [piece.compute(x) for piece in pieces]


class ParallelHeads(nn.Module):
    """Attention and SSM read the same normed tokens (Falcon-H1, arXiv 2507.22448), then comes an MLP.

    ``x + a · attention(n) + s · ssm(n)`` with fixed multipliers and ``n = norm(x)``, or with ``concat``
    ``x + join([s · ssm(n), a · attention(n)])`` with one more projection; then ``x + mlp(mlp_norm(x))``.
    Falcon-H1 itself concatenates before one output projection, which is the sum of the two.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """``positions``: whether attention has rotary positions."""

        ssm: Mamba2.Config | Mamba1.Config = field(default_factory=Mamba2.Config)
        attention_multiplier: float = 1.0
        ssm_multiplier: float = 1.0
        join: Literal["add", "concat"] = "add"
        positions: bool = True

        def validate(self, name: str, hidden: int, layers: int, tensor_degree: int) -> None:
            """Raise UserError for sizes that do not fit together."""
            self.ssm.validate(f"{name}.ssm", hidden, tensor_degree)

        def block(self, index: int, of: Sublayers) -> nn.Module:
            """Block ``index`` of a model."""
            return ParallelHeads(self, of)

    def __init__(self, config: Config, of: Sublayers) -> None:
        super().__init__()
        self.scales = config.ssm_multiplier, config.attention_multiplier
        self.norm = of.norm()
        self.attention, self.ssm = of.attention(), of.ssm(config.ssm)
        self.beside = Beside()
        concat = config.join == "concat"
        self.join = nn.Linear(2 * of.hidden, of.hidden, bias=False) if concat else None
        self.mlp_norm, self.mlp = of.norm(), of.mlp()

    def forward(self, x: Tensor, rotary: Tensor) -> Tensor:
        """``x [S, B, hidden]`` or a shard of its rows -> the same; ``rotary [2, S, head_dim]``."""
        return self.extend(x, rotary, None)[0]

    def extend(self, x: Tensor, rotary: Tensor, past: Any) -> tuple[Tensor, Any]:
        """``x [S, B, hidden]`` after the tokens of ``past`` -> the same, and what later tokens need."""
        normed = self.norm(x)
        states = dict(zip(("ssm", "attention"), past or (None, None), strict=True))

        def compute(kind: str, of_normed: Tensor) -> Tensor:
            mixed, states[kind] = mix(kind, self.get_submodule(kind), of_normed, rotary, states[kind])
            return mixed

        pieces = [Piece(rotary.shape[1], kind, partial(compute, kind)) for kind in states]
        ssm, attention = self.beside(normed, pieces)
        ssm, attention = self.scales[0] * ssm, self.scales[1] * attention
        joined = ssm + attention if self.join is None else self.join(torch.cat([ssm, attention], dim=-1))
        normed, x = self.mlp_norm(joined, x)
        return x + self.mlp(normed), tuple(states.values())
