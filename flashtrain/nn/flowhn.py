"""FlowHN (arXiv 2505.19472): attention and SSM side by side, each on its own part of the tokens."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, NamedTuple, cast

import torch
from torch import Tensor, nn

from flashtrain.errors import UserError
from flashtrain.nn.flops import forward_flops
from flashtrain.nn.hybrid import Beside, Layer, Piece, Sublayers
from flashtrain.nn.mamba1 import Mamba1
from flashtrain.nn.ssm import Mamba2
from flashtrain.nn.weights import OwnWeights
from flashtrain.nn.windows import Strategy, Windows, balanced_share


class FlowPast(NamedTuple):
    """What a block remembers: how many tokens there were, and the state of each branch."""

    tokens: int
    attention: Any = None
    ssm: Any = None


class Routing(nn.Module):
    """Cuts a sequence into pieces, has each computed, and puts them together in order."""

    def forward(self, x: Tensor, pieces: Sequence[Piece]) -> Tensor:
        """``x [S, B, H]`` -> the same; ``pieces`` are of consecutive tokens, S in all."""
        parts = x.split([piece.tokens for piece in pieces])
        return torch.cat([piece.compute(part) for part, piece in zip(parts, pieces, strict=True)])


class FlowHN(nn.Module):
    """``y = x + fuse([ssm(x), attention(x)])``, then ``y + final(norm(y))``; a branch norms its own tokens.

    With strategy ``none`` both branches see all tokens and are joined by features, ``fuse`` is from twice
    the width. With the others attention sees one window (``Windows``) and the SSM the rest, as up to two
    pieces of which the second starts with the state and the convolution's tail of the first: what it would
    give on the two as one sequence, without a copy of them. They are joined by position.

    ``ffn``: ``branch`` makes each branch a whole layer with its own MLP and two inner residuals, as the
    authors' code; ``none`` has mixers alone, as their figure; ``shared`` has an MLP in the place of
    ``final``. There are no biases.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """``f`` is attention's share of the tokens; auto: both branches cost the same FLOPs.

        The code that was published with the paper has ``f`` 0.59, ``align`` 1 and Mamba-1. ``align`` is in
        tokens: attention's tile and the SSM's chunk. ``length``: windows are those of sequences of this many
        tokens, which ones may not exceed; None: of the length that a sequence has. Tokens come one by one
        only with a ``length``, or with ``none``. ``positions``: whether attention has rotary positions.
        """

        strategy: Strategy = "circulating"
        f: float | Literal["auto"] = "auto"
        ffn: Literal["branch", "none", "shared"] = "branch"
        ssm: Mamba2.Config | Mamba1.Config = field(default_factory=Mamba2.Config)
        fa_side: Literal["first", "last"] = "first"
        fac_windows: Literal["even", "disjoint"] = "even"
        align: int = 128
        length: int | None = None
        positions: bool = False

        def validate(self, name: str, hidden: int, layers: int, tensor_degree: int) -> None:
            """Raise UserError for sizes that do not fit together."""
            if self.f != "auto" and not 0 <= self.f <= 1:
                raise UserError(f"{name}.f is {self.f}; it must be auto, or from 0 to 1")
            if self.align < 1:
                raise UserError(f"{name}.align is {self.align}; it must be at least 1")
            if self.length is not None and (self.length < 1 or self.length % self.align):
                raise UserError(
                    f"{name}.length is {self.length}; it must be a multiple of {name}.align {self.align}"
                )
            self.ssm.validate(f"{name}.ssm", hidden, tensor_degree)

        def block(self, index: int, of: Sublayers) -> nn.Module:
            """Block ``index`` of a model."""
            return FlowHN(self, index, of)

    def __init__(self, config: Config, index: int, of: Sublayers) -> None:
        super().__init__()
        self.config, self.index = config, index
        self.windows = Windows(
            strategy=config.strategy, side=config.fa_side, steps=config.fac_windows, align=config.align
        )
        self._shares: dict[int, float] = {}
        whole_layers = config.ffn == "branch"

        def branch(kind: str, mixer: nn.Module) -> nn.ModuleList:
            layers = [Layer(kind, mixer, of.norm())]
            return nn.ModuleList(layers + ([Layer("mlp", of.mlp(), of.norm())] if whole_layers else []))

        self.ssm_branch = branch("ssm", of.ssm(config.ssm))
        self.attention_branch = branch("attention", of.attention())
        both = config.strategy == "none"
        if both:
            self.beside = Beside()
        else:
            self.routing = Routing()
        width = of.hidden * (2 if both else 1)
        self.fuse = nn.Linear(width, of.hidden, bias=False)
        self.norm = of.norm()
        if config.ffn == "shared":
            self.mlp = of.mlp()
        else:
            self.final = nn.Linear(of.hidden, of.hidden, bias=False)

    def window(self, tokens: int) -> tuple[int, int]:
        """``(a0, a1)``: of ``tokens`` in all, attention has a0 to a1-1. Raises UserError; see ``Windows``."""
        return self.windows.window(self.index, tokens, self._share(tokens))

    def forward(self, x: Tensor, rotary: Tensor) -> Tensor:
        """``x [S, B, hidden]`` or a shard of its rows -> the same; ``rotary [2, S, head_dim]``."""
        return self._compute(x, rotary, FlowPast(0))[0]

    def extend(self, x: Tensor, rotary: Tensor, past: FlowPast | None) -> tuple[Tensor, FlowPast]:
        """``x [S, B, hidden]`` after the tokens of ``past`` -> the same, and what later tokens need.

        Raises UserError where the windows depend on how many tokens will come.
        """
        if self.config.length is None and self.config.strategy != "none":
            raise UserError(
                "FlowHN's windows depend on the length of the sequence, so it cannot decode token by token: "
                "set model.layout.length"
            )
        return self._compute(x, rotary, past or FlowPast(0))

    def flops_per_token(self, sequence: int) -> float:
        """FLOPs of one token forward, on average over a sequence: a branch counts by its share of them."""
        both = sequence if self.config.strategy == "none" else 0
        first, last = self.window(self.config.length or sequence)
        first, last = min(first, sequence), min(last, sequence)
        total = 0.0
        for branch, tokens in (
            (self.attention_branch, last - first),
            (self.ssm_branch, both or sequence - (last - first)),
        ):
            total += tokens / sequence * forward_flops(branch, max(tokens, 1))
        rest = (self.fuse, self.norm, self.mlp if self.config.ffn == "shared" else self.final)
        return total + sum(forward_flops(module, sequence) for module in rest)

    def _share(self, tokens: int) -> float:
        if self.config.f != "auto":
            return self.config.f
        if tokens not in self._shares:
            attention, ssm = (
                partial(forward_flops, branch) for branch in (self.attention_branch, self.ssm_branch)
            )
            self._shares[tokens] = balanced_share(attention, ssm, tokens)
        return self._shares[tokens]

    def _compute(self, x: Tensor, rotary: Tensor, past: FlowPast) -> tuple[Tensor, FlowPast]:
        now = _Branches(self.ssm_branch, self.attention_branch, past)
        count = rotary.shape[1]
        if self.config.strategy == "none":
            pieces = [Piece(count, kind, partial(now.compute, kind, rotary)) for kind in ("ssm", "attention")]
            mixed = torch.cat(self.beside(x, pieces), dim=-1)
        else:
            pieces = self._pieces(now, rotary, past.tokens, count)
            # The SSM's pieces share what it makes of its weights.
            with cast(OwnWeights, self.ssm_branch[0].get_submodule("ssm")).one_pass():
                mixed = self.routing(x, pieces)
        normed, y = self.norm(self.fuse(mixed), x)
        last = self.mlp if self.config.ffn == "shared" else self.final
        return y + last(normed), FlowPast(past.tokens + count, **now.states)

    def _pieces(self, now: "_Branches", rotary: Tensor, first: int, count: int) -> list[Piece]:
        """What is before the window, in it, and after it, of ``count`` tokens from ``first`` on."""
        length = self.config.length or count
        end = first + count
        if end > length:
            raise UserError(f"a sequence of {end} tokens is longer than model.layout.length {length}")
        before, after = (min(max(edge, first), end) for edge in self.window(length))
        edges = ((first, before, "ssm"), (before, after, "attention"), (after, end, "ssm"))
        return [
            Piece(stop - start, kind, partial(now.compute, kind, rotary[:, start - first : stop - first]))
            for start, stop, kind in edges
            if stop > start
        ]


class _Branches:
    """The two branches in one pass, each with the state that it has reached."""

    def __init__(self, ssm: nn.ModuleList, attention: nn.ModuleList, past: FlowPast) -> None:
        self._layers = {"ssm": ssm, "attention": attention}
        self.states = {"ssm": past.ssm, "attention": past.attention}

    def compute(self, kind: str, rotary: Tensor, x: Tensor) -> Tensor:
        y, self.states[kind] = _through(self._layers[kind], x, rotary, self.states[kind])
        return y


def _through(branch: nn.ModuleList, x: Tensor, rotary: Tensor, past: Any) -> tuple[Tensor, Any]:
    """What a mixer gives for its tokens, normed; with an MLP, both layers with their residuals."""
    first, *rest = (cast(Layer, layer) for layer in branch)
    mixed, now = first.mixed(first.norm(x), rotary, past)
    for mlp in rest:
        normed, x = mlp.norm(mixed, x)
        mixed = x + mlp.mixed(normed, rotary, None)[0]
    return mixed, now
