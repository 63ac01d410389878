"""A Llama-style decoder: RMSNorm, grouped-query attention with rotary positions, SwiGLU; or a hybrid."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from flashtrain.errors import UserError
from flashtrain.nn.attend import Documents
from flashtrain.nn.attention import Attention
from flashtrain.nn.block import Block
from flashtrain.nn.embedding import Embedding
from flashtrain.nn.flops import forward_flops
from flashtrain.nn.flowhn import FlowHN
from flashtrain.nn.hybrid import ParallelHeads, Pattern, Sublayers
from flashtrain.nn.loss import Head
from flashtrain.nn.mamba1 import Mamba1
from flashtrain.nn.mlp import PACKING, SwiGLU
from flashtrain.nn.norm import RMSNorm
from flashtrain.nn.pairing import Order, Pairing
from flashtrain.nn.rotary import Llama3Scaling, no_positions, rotary_table
from flashtrain.nn.shared_attention import SwitchableAttention, make_switchable, switch
from flashtrain.nn.sharing import Sharing

# Projections that write to the residual stream.
_WRITING = tuple(
    f"{name}.weight" for name in ("attention.out", "ssm.out", "mlp.down", "join", "fuse", "final")
)


class Past(NamedTuple):
    """What a decoder remembers of the ``tokens`` so far: what each layer's ``extend`` gave."""

    tokens: int
    layers: list[Any]


class Decoder(nn.Module):
    """Decoder-only transformer (Llama, arXiv 2302.13971).

    Activations are ``[sequence, batch, hidden]``. Parameters are drawn from ``generator`` alone, in
    order of construction, so every rank that is given the same seed holds the same model.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """``mlp_width`` is a multiple of 64; ``kv_heads`` divides ``heads``, and ``heads`` ``hidden``.

        ``tied_embeddings``: the output projection is the embedding's table. ``pairing``: which query head
        meets which KV head, by name or as a list (see ``Pairing.named``), in place of ``kv_heads``.
        ``layout``: blocks of attention and SSM mixers; None: each is attention, then an MLP.
        ``sharing``: layers that may take over queries and keys, or keys and values, of others; weights at the
        start are those without it.
        """

        vocabulary: int = 256
        hidden: int = 256
        layers: int = 4
        heads: int = 8
        kv_heads: int = 4
        mlp_width: int = 704
        rope_theta: float = 10_000.0
        rope_scaling: Llama3Scaling | None = None
        norm_epsilon: float = 1e-5
        qkv_bias: bool = False
        tied_embeddings: bool = False
        pairing: str | None = None
        pair_order: Order = "j_major"
        layout: Pattern.Config | ParallelHeads.Config | FlowHN.Config | None = None
        sharing: Sharing | None = None

        @property
        def head_dim(self) -> int:
            """Width of one attention head."""
            return self.hidden // self.heads

        def pairs(self) -> Pairing | None:
            """The pairing, if there is one. Raises UserError for one that is not known or does not fit."""
            if self.pairing is None:
                return None
            try:
                return Pairing.named(self.pairing, self.heads, self.pair_order)
            except UserError as error:
                raise UserError(f"model.{error}") from None

        def validate(self, tensor_degree: int = 1) -> None:
            """Raise UserError for sizes that do not fit together, or do not divide by ``tensor_degree``."""
            for name in ("vocabulary", "hidden", "layers", "heads", "kv_heads", "mlp_width"):
                if not 1 <= (value := getattr(self, name)) < 2**31:
                    raise UserError(f"model.{name} is {value}; it must be at least 1 and below 2**31")
            _must_divide("model.hidden", self.hidden, "model.heads", self.heads)
            if self.pairs() is None:
                _must_divide("model.heads", self.heads, "model.kv_heads", self.kv_heads)
            _must_divide("model.mlp_width", self.mlp_width, "the packing of gate and up rows,", PACKING)
            if self.head_dim % 2:
                raise UserError(
                    f"model.hidden / model.heads is {self.head_dim}; rotary positions need it even"
                )
            self._validate_positions()
            if self.layout is not None:
                self.layout.validate("model.layout", self.hidden, self.layers, tensor_degree)
            if self.sharing is not None:
                for name in ("pairing", "layout"):
                    if getattr(self, name) is not None:
                        raise UserError(f"layers with model.{name} cannot share: leave out model.sharing")
                self.sharing.validate(self.layers)
            for name, parts in (
                ("model.kv_heads", self.kv_heads) if self.pairing is None else ("model.heads", self.heads),
                ("model.vocabulary", self.vocabulary),
                (f"model.mlp_width / {PACKING}", self.mlp_width // PACKING),
            ):
                _must_divide(name, parts, "parallel.tensor", tensor_degree)

        def validate_branches(self, ranks: int) -> None:
            """Raise UserError if attention and SSM of each block cannot be on one of ``ranks`` ranks each."""
            layout = self.layout
            if not isinstance(layout, ParallelHeads.Config | FlowHN.Config):
                kind = "None" if layout is None else "Pattern.Config"
                raise UserError(
                    f"parallel.branches is {ranks}, but blocks of model.layout {kind} have no attention and "
                    "SSM side by side: choose FlowHN.Config or ParallelHeads.Config"
                )
            # What both branches need is cut over the ranks, MLPs of a branch are not.
            _must_divide("model.vocabulary", self.vocabulary, "parallel.branches", ranks)
            if isinstance(layout, ParallelHeads.Config) or layout.ffn == "shared":
                width = self.mlp_width // PACKING
                _must_divide(f"model.mlp_width / {PACKING}", width, "parallel.branches", ranks)

        def validate_context(self, ranks: int, sequence: int) -> None:
            """Raise UserError if ``sequence`` tokens cannot be in segments on ``ranks`` ranks."""
            refused, ssm = f"parallel.context is {ranks}, but", getattr(self.layout, "ssm", None)
            if self.sharing is not None:
                raise UserError(
                    f"{refused} layers that share heads need whole sequences: leave out model.sharing"
                )
            if isinstance(self.layout, FlowHN.Config) and self.layout.strategy != "none":
                raise UserError(
                    f"{refused} windows of FlowHN are of whole sequences: set model.layout.strategy none"
                )
            if isinstance(ssm, Mamba1.Config):
                raise UserError(
                    f"{refused} Mamba-1 passes no states between ranks: choose Mamba2.Config as "
                    "model.layout.ssm.class"
                )
            if ssm is not None and sequence // ranks < ssm.taps - 1:
                raise UserError(
                    f"{refused} a segment of {sequence // ranks} tokens is shorter than the {ssm.taps - 1} "
                    "before a token that model.layout.ssm.taps reach: set a longer train.sequence"
                )

        def _validate_positions(self) -> None:
            """Raise UserError for a base or a scaling that gives no frequencies."""
            scaling = self.rope_scaling
            above_zero = {"rope_theta": self.rope_theta, "norm_epsilon": self.norm_epsilon}
            if scaling is not None:
                above_zero |= {f"rope_scaling.{name}": value for name, value in vars(scaling).items()}
            for name, value in above_zero.items():
                if not value > 0:
                    raise UserError(f"model.{name} is {value}; it must be above 0")
            if scaling is not None and not scaling.low_freq_factor < scaling.high_freq_factor:
                raise UserError(
                    f"model.rope_scaling.low_freq_factor is {scaling.low_freq_factor}; it must be below "
                    f"high_freq_factor {scaling.high_freq_factor}"
                )

    def __init__(self, config: Config, generator: torch.Generator | None = None) -> None:
        config.validate()
        super().__init__()
        self.config = config
        self.embedding = self._embedding()
        self.layers = nn.ModuleList(self._block(index) for index in range(config.layers))
        self.norm = self._norm()
        self.head = self._head()
        if config.tied_embeddings:
            self.head.weight = self.embedding.weight
        self._draw_part("", self, generator)
        for mixer in _drawing_themselves(self):
            mixer.initialise(generator)
        if config.sharing is not None:
            make_switchable(self._mixers(), config.sharing)
            for name, parameter in self.named_parameters():
                if name.endswith("attention.cache.weight"):
                    self._draw(name, parameter, generator)

    def drawn(self, generator: torch.Generator) -> Iterator[tuple[str, Tensor]]:
        """Name and value of each parameter that ``Decoder(self.config, generator)`` has, to the bit.

        Its own, which may be on any mesh, are left alone; tied ones come once. A block at a time is in
        memory. Those with an SSM, whose rates are drawn after all else, stay until the end, and so does the
        whole of a model whose layers may share.
        """
        config = self.config
        if config.sharing is not None:
            yield from Decoder(config, generator).named_parameters()
            return
        parts: list[tuple[str, Callable[[], nn.Module]]] = [("embedding", self._embedding)]
        parts += [(f"layers.{index}", partial(self._block, index)) for index in range(config.layers)]
        parts += [("norm", self._norm), *([] if config.tied_embeddings else [("head", self._head)])]
        waiting = []
        for name, make in parts:
            part = make()
            self._draw_part(f"{name}.", part, generator)
            if _drawing_themselves(part):
                waiting.append((name, part))
            else:
                yield from part.named_parameters(prefix=name)
        for _, part in waiting:
            for mixer in _drawing_themselves(part):
                mixer.initialise(generator)
        for name, part in waiting:
            yield from part.named_parameters(prefix=name)

    def _draw_part(self, prefix: str, part: nn.Module, generator: torch.Generator | None) -> None:
        for name, parameter in part.named_parameters():
            if parameter.dim() == 2:
                self._draw(prefix + name, parameter, generator)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def _draw(self, name: str, weight: nn.Parameter, generator: torch.Generator | None) -> None:
        # N(0, 2 / (5 hidden)) (arXiv 1910.05895, section 2.2), which fits wide and narrow models; the two
        # projections that write to the residual stream are divided by sqrt(2 L), as in GPT-2, so that its
        # variance does not grow with depth.
        if not weight.is_meta:
            scale = (2 * self.config.layers) ** -0.5 if name.endswith(_WRITING) else 1.0
            nn.init.normal_(weight, std=(2 / (5 * self.config.hidden)) ** 0.5 * scale, generator=generator)

    def _embedding(self) -> Embedding:
        return Embedding(self.config.vocabulary, self.config.hidden)

    def _norm(self) -> RMSNorm:
        return RMSNorm(self.config.hidden, self.config.norm_epsilon)

    def _head(self) -> Head:
        return Head(self.config.hidden, self.config.vocabulary)

    def _block(self, index: int) -> nn.Module:
        config = self.config
        if config.layout is not None:
            of = Sublayers(config.hidden, config.norm_epsilon, self._attention, self._mlp)
            return config.layout.block(index, of)
        return Block(self._attention(), self._mlp(), config.hidden, config.norm_epsilon)

    def _attention(self) -> Attention:
        config = self.config
        return Attention(
            config.hidden, config.heads, config.kv_heads, config.head_dim, config.qkv_bias, config.pairs()
        )

    def _mlp(self) -> SwiGLU:
        return SwiGLU(self.config.hidden, self.config.mlp_width)

    def _mixers(self) -> list[nn.Module]:
        return [getattr(layer, "attention", layer) for layer in self.layers]

    def share(self, count: int) -> None:
        """Let the last ``count`` of ``config.sharing``'s targets share from now on, and the others not.

        Weights stay. Raises UserError if the model was not made to share, or has fewer targets.
        """
        if self.config.sharing is None:
            raise UserError("layers of this model cannot share: it was made without model.sharing")
        switch(self._mixers(), self.config.sharing, count)

    def shared_means(self, before: int, count: int) -> dict[str, tuple[str, ...]]:
        """Parameters to set when ``count`` layers share after ``before``, by ``config.sharing``.

        Each to the mean of those named for it, which have its shape and are sharded alike; see ``Sharing``.
        """
        sharing, mixers = self.config.sharing, self._mixers()
        found: dict[str, tuple[str, ...]] = {}
        for source, group in (sharing.means(len(mixers), before, count) if sharing else {}).items():
            own = mixers[source]
            assert isinstance(own, SwitchableAttention)
            name = own.names[0]
            begins = name if own.cache is None else "cache"
            for kind, _ in own.get_submodule(name).named_parameters():
                found[f"layers.{source}.attention.{begins}.{kind}"] = tuple(
                    f"layers.{layer}.attention.{name}.{kind}" for layer in group
                )
        return found

    def forward(
        self, tokens: Tensor, targets: Tensor | None = None, documents: Documents | None = None
    ) -> Tensor:
        """``tokens [S, B]`` -> logits ``[S, B, V]``, or with ``targets [S, B]`` the mean loss in nats.

        With ``documents`` tokens attend to their own document alone. Positions go on through a sequence:
        rotary attention depends on their differences, so a document's output is that of it alone.
        """
        rotary = self._rotary(tokens)
        x = self.embedding(tokens)
        given = (rotary,) if documents is None else (rotary, documents)
        for layer in self.layers:
            x = layer(x, *given)
        logits_or_loss: Tensor = self.head(self.norm(x), targets)
        return logits_or_loss

    def extend(self, tokens: Tensor, past: Past | None = None) -> tuple[Tensor, Past]:
        """``tokens [S, B]`` that follow those of ``past`` -> their logits ``[S, B, V]``, and the new past."""
        before = 0 if past is None else past.tokens
        rotary = self._rotary(tokens, before)
        x, states = self.embedding(tokens), []
        for index, layer in enumerate(self.layers):
            before_it = None if past is None else past.layers[index]
            x, state = layer.extend(x, rotary, before_it)  # type: ignore[operator]
            states.append(state)
        return self.head(self.norm(x)), Past(before + tokens.shape[0], states)

    def _rotary(self, tokens: Tensor, before: int = 0) -> Tensor:
        config = self.config
        if config.layout is not None and not config.layout.positions:
            return no_positions(tokens.shape[0], config.head_dim, tokens.device)
        return rotary_table(
            tokens.shape[0], config.head_dim, config.rope_theta, tokens.device, config.rope_scaling, before
        )

    def flops_per_token(self, sequence: int) -> float:
        """FLOPs of training on one token, forward and backward, in sequences of ``sequence`` tokens.

        Recomputed activations do not count.
        """
        return 3.0 * sum(forward_flops(child, sequence) for child in self.children())

    def parameter_count(self, embedding: bool = True) -> int:
        """Parameters in all, or without the input embedding, of the whole model on any rank.

        A table that is the output projection too counts once, and counts in either case.
        """
        own = sum(p.numel() for p in self.parameters())
        return own if embedding or self.config.tied_embeddings else own - self.embedding.weight.numel()


def _drawing_themselves(part: nn.Module) -> list[Any]:
    """The SSMs in ``part``, which draw their rates and step sizes."""
    return [module for module in part.modules() if callable(getattr(module, "initialise", None))]


def _must_divide(name: str, value: int, by_name: str, by: int) -> None:
    if value % by:
        raise UserError(f"{name} is {value}; {by_name} {by} must divide it")
