"""Attention whose queries and keys, or keys and values, may be those of an earlier layer.

QK is EPAS (arXiv 2601.19089). KV is our reconstruction of ECHO-LLaMA (arXiv 2505.17331), of which neither
code nor tables are public; by its map it is also CLA (arXiv 2405.12981) or like YOCO (arXiv 2405.05254).
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

# torch.compiler.disable imports the compiler, half of what a run's start takes, for runs that never compile.
from torch._compile import _disable_dynamo

from flashtrain.errors import UserError
from flashtrain.kernels.rotary.op import rotary_qkv
from flashtrain.kernels.weight_gradient import Packing
from flashtrain.nn.attend import Documents, Heads, attend
from flashtrain.nn.attention import Attention, KeyValues
from flashtrain.nn.linear import product
from flashtrain.nn.region import LayerByLayer, Region, merged, region
from flashtrain.nn.sharing import Sharing


class PackedLinear(nn.Linear):
    """A linear layer that is computed with another one in one product, as if they were one layer.

    It can be left out of a step; with data parallelism it is gathered only where it is called.
    """

    def forward(self, x: Tensor, other: nn.Linear, packing: Packing) -> Tensor:  # type: ignore[override]
        """``x [..., hidden]`` -> ``[..., rows]``, by what ``packing`` makes of both layers' weights."""
        bias = None if self.bias is None else packing.join(self.bias, other.bias)
        weights = self.weight, other.weight
        return product(x, packing.join(*weights), bias, packing.gradient(*weights))


class Handover:
    """Heads on their way from sources to the layers that share them; blocks in between know nothing of it."""

    def __init__(self, config: Sharing) -> None:
        self.config = config
        self.regions: dict[int, Region] = {}
        self.heads: dict[int, Heads] = {}


class SourceAttention(Attention):
    """Attention that hands its heads over to later layers, if ``switch`` says so. Parameters as before."""

    handover: Handover
    layer: int
    source: int  # the layer whose heads are used; may be this one
    # ``forward`` asks for two answers and not for numbers of layers, so that code that is compiled for one
    # layer serves all that are like it.
    shares: bool
    hands_over: bool
    is_last: bool  # of those that use the source's heads
    noted: list[Region] | None  # where to note the region that a forward pass uses
    again: list[Region] | None  # the one that it used, while it runs again
    cache: nn.Linear | None  # what makes the heads for the others where they are not its own

    def become(self, handover: Handover, layer: int) -> None:
        """Set up after the class of a plain ``Attention`` was changed to this one."""
        self.handover, self.layer = handover, layer
        self.source, self.shares, self.hands_over, self.is_last = layer, False, False, False
        self.noted = self.again = None
        self.cache = None

    def forward(self, x: Tensor, rotary: Tensor, documents: Documents | None = None) -> Tensor:
        """See ``Attention.forward``. Raises UserError for ``documents``: shared heads know none."""
        if documents is not None:
            raise UserError("train.document_mask is true, but layers of model.sharing know no documents")
        if not self.hands_over:
            return super().forward(x, rotary)
        heads = self.project(x, rotary)
        if self.cache is None:
            return self._close(self._open(heads))
        return self._close(self._lend(attend(heads), heads.query, *self._cached(x, rotary)))

    @_disable_dynamo
    def _open(self, heads: Heads) -> Tensor:
        config = self.handover.config
        opened = region(config.share, config.defers(heads), config.grad_to_source)
        self._hand_over(opened)
        return opened.open(heads)

    @_disable_dynamo
    def _lend(self, output: Tensor, *heads: Tensor) -> Tensor:
        opened = LayerByLayer(self.handover.config.share, follow=True)
        self._hand_over(opened)
        return opened.lend(output, Heads(*heads))

    def _hand_over(self, opened: Region) -> None:
        if self.again is None:  # else the layers behind have joined the first one
            self.handover.regions[self.layer] = opened

    def passes(self) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        """What a block enters around a forward pass, and around the same one when it runs again.

        That is for activations that are computed again in the backward pass: a layer that shares joins the
        region that it joined before, whose heads are kept, and a source opens one that nobody joins.
        """
        used: list[Region] = []
        return self._noting(used), self._running_again(used)

    @contextmanager
    def _noting(self, used: list[Region]) -> Iterator[None]:
        self.noted = used
        try:
            yield
        finally:
            self.noted = None

    @contextmanager
    def _running_again(self, used: list[Region]) -> Iterator[None]:
        self.again = used
        try:
            yield
        finally:
            self.again = None

    def _cached(self, x: Tensor, rotary: Tensor) -> KeyValues:
        """Keys, rotated, and values ``[B, kv heads, S, D]`` of ``cache``."""
        assert self.cache is not None
        sequence = rotary.shape[1]
        flat: Tensor = self.cache(x)
        packed = flat.view(sequence, -1, flat.shape[-1])
        key, _, value = rotary_qkv(packed, rotary, flat.shape[-1] // (2 * self.head_dim), 1, 0, 1)
        return KeyValues(key, value)

    def extend(self, x: Tensor, rotary: Tensor, past: Any) -> tuple[Tensor, Any]:
        """See ``Attention.extend``. With ``cache`` it remembers a pair, its own and what cache gave."""
        if not self.hands_over:
            return super().extend(x, rotary, past)
        heads = self.project(x, rotary)
        own, lent = (past, None) if self.cache is None else past or (None, None)
        now = _longer(own, KeyValues(heads.key, heads.value))
        heads = Heads(heads.query, *now)
        if self.cache is None:
            self.handover.heads[self.layer] = heads
            return self._close(attend(heads)), now
        lent = _longer(lent, self._cached(x, rotary))
        self.handover.heads[self.layer] = Heads(heads.query, *lent)
        return self._close(attend(heads)), (now, lent)


def _longer(past: KeyValues | None, new: KeyValues) -> KeyValues:
    if past is None:
        return new
    return KeyValues(torch.cat([past.key, new.key], dim=2), torch.cat([past.value, new.value], dim=2))


class SwitchableAttention(SourceAttention):
    """Attention that may use an earlier layer's heads, with the projections apart that it then does without.

    QK: ``qk`` and ``v``; KV: ``kv`` and ``q``. The first of each is then not used, and its rows are, for each
    KV head, those of ``Attention.qkv`` in the same order. Both together are one product with the weight of
    ``qkv``, formed for it, so that a layer that computes its own heads is the plain one to the bit.
    """

    names: tuple[str, str]  # of the projection that is not used when sharing, and of the other one

    def become(self, handover: Handover, layer: int) -> None:
        """See ``SourceAttention.become``; cuts the packed projection in two."""
        super().become(handover, layer)
        packed, out = (self._modules.pop(name) for name in ("qkv", "out"))  # both, for the parameters' order
        assert isinstance(packed, nn.Linear)
        self.names = ("qk", "v") if handover.config.share == "QK" else ("kv", "q")
        biases = None if packed.bias is None else self.pieces(packed.bias.detach())
        for name, weight in self.pieces(packed.weight.detach()).items():
            kind = PackedLinear if name == self.names[0] else nn.Linear
            made = kind(packed.in_features, len(weight), bias=biases is not None, device="meta")
            made.weight = nn.Parameter(weight.clone())
            if biases is not None:
                made.bias = nn.Parameter(biases[name].clone())
            self.add_module(name, made)
        self.add_module("out", out)

    def add_cache(self) -> None:
        """Give it a ``cache`` as large as its own ``kv``, without values yet."""
        own = self.get_submodule("kv")
        assert isinstance(own, nn.Linear)
        made = nn.Linear(own.in_features, own.out_features, bias=own.bias is not None, device="meta")
        made.weight = nn.Parameter(torch.empty_like(own.weight))
        if own.bias is not None:
            made.bias = nn.Parameter(torch.zeros_like(own.bias))
        del self.cache  # the plain attribute
        self.cache = made

    def pieces(self, packed: Tensor) -> dict[str, Tensor]:
        """Rows ``[kv heads · (group + 2) · head_dim, ...]`` of ``qkv`` -> those of each own projection."""
        apart = packed.unflatten(0, (-1, self.group + 2, self.head_dim))
        first, second = self.names if self.names[0] == "qk" else reversed(self.names)
        cut = self._slots(first)
        return {first: apart[:, :cut].flatten(0, 2), second: apart[:, cut:].flatten(0, 2)}

    def qkv(self, x: Tensor) -> Tensor:  # type: ignore[override]
        """``x [..., hidden]`` -> the packed heads of all three, in one product."""
        unused, kept = (self.get_submodule(name) for name in self.names)
        packed: Tensor = unused(x, kept, Packing(self._pack, self._cut))
        return packed

    def _pack(self, unused: Tensor, kept: Tensor) -> Tensor:
        """Rows of both projections, or of a share of their heads, as ``qkv`` has them."""
        apart = [
            rows.unflatten(0, (-1, self._slots(name), self.head_dim))
            for name, rows in zip(self.names, (unused, kept), strict=True)
        ]
        if self.names[1] == "q":
            apart.reverse()
        return torch.cat(apart, dim=1).flatten(0, 2)

    def _cut(self, packed: Tensor) -> list[Tensor]:
        pieces = self.pieces(packed)
        return [pieces[name] for name in self.names]

    def _slots(self, name: str) -> int:
        """Heads of a projection for each KV head."""
        return {"q": self.group, "qk": self.group + 1, "v": 1, "kv": 2}[name]

    def forward(self, x: Tensor, rotary: Tensor, documents: Documents | None = None) -> Tensor:
        """See ``SourceAttention.forward``."""
        if not self.shares or documents is not None:
            return super().forward(x, rotary, documents)
        return self._close(self._join(self._own(x, rotary)))

    @_disable_dynamo
    def _join(self, own: Tensor) -> Tensor:
        if self.again is not None:
            return self.again[0].join(own)
        regions = self.handover.regions
        opened = regions.pop(self.source) if self.is_last else regions[self.source]
        if self.noted is not None:
            self.noted.append(opened)
        return opened.join(own)

    def extend(self, x: Tensor, rotary: Tensor, past: Any) -> tuple[Tensor, Any]:
        """See ``Attention.extend``. What is the source's in the cache is the source's own memory."""
        if not self.shares:
            return super().extend(x, rotary, past)
        handed, share = self.handover.heads, self.handover.config.share
        theirs = handed.pop(self.source) if self.is_last else handed[self.source]
        own = self._own(x, rotary)
        if share == "QK" and past is not None:
            own = torch.cat([past.value, own], dim=2)
        heads = merged(share, own, theirs)
        return self._close(attend(heads)), KeyValues(heads.key, heads.value)

    def _own(self, x: Tensor, rotary: Tensor) -> Tensor:
        """The heads ``[B, heads, S, D]`` that a sharing layer computes: values, or queries, rotated."""
        sequence, name = rotary.shape[1], self.names[1]
        flat: Tensor = self.get_submodule(name)(x)
        batch, heads = flat.numel() // flat.shape[-1] // sequence, flat.shape[-1] // self.head_dim
        if name == "q":
            return rotary_qkv(flat.view(sequence, batch, -1), rotary, heads, 1, 0, 0)[0]
        return flat.view(sequence, batch, heads, self.head_dim).permute(1, 2, 0, 3)

    def flops_per_token(self, sequence: int) -> float:
        """See ``Attention.flops_per_token``; a projection that is not used has none."""
        lent = ["cache"] if self.hands_over and self.cache is not None else []
        used = [*self.names[self.shares :], *lent, "out"]
        weights = [self.get_parameter(f"{name}.weight") for name in used]
        return 2.0 * sum(w.numel() for w in weights) + 2.0 * sequence * weights[-1].shape[1]


def make_switchable(attentions: Sequence[nn.Module], config: Sharing) -> None:
    """Let ``attentions``, one of each layer in order, share as ``config`` says; all targets do at first.

    Changes classes and parameters in place; a ``fresh`` cache has no values yet. Raises UserError for a layer
    whose mixer is no ``Attention``.
    """
    layers, handover = len(attentions), Handover(config)
    targets = config.targets_of(layers)
    sources = {source for count in range(len(targets) + 1) for source in config.sources(layers, count)}
    # Those that targets take from in the end; others that hand over before are targets themselves.
    last = {source for layer, source in enumerate(config.sources(layers, len(targets))) if source != layer}
    apart = {*targets, *last} if config.sources_apart else set(targets)
    for layer, attention in enumerate(attentions):
        kind = SwitchableAttention if layer in apart else SourceAttention if layer in sources else None
        if kind is None:
            continue
        if type(attention) is not Attention:
            raise UserError(f"layer {layer} cannot share: its mixer is a {type(attention).__name__}")
        attention.__class__ = kind
        cast(SourceAttention, attention).become(handover, layer)
        if layer in last and config.kv_origin == "fresh":
            cast(SwitchableAttention, attention).add_cache()
    switch(attentions, config, len(targets))


def switch(attentions: Sequence[nn.Module], config: Sharing, count: int) -> None:
    """Let the last ``count`` targets share, and the others compute their own heads."""
    sources, whole = config.sources(len(attentions), count), len(config.targets_of(len(attentions)))
    if config.kv_origin == "fresh" and count not in (0, whole):
        raise UserError(f"{count} layers cannot share: with kv_origin fresh all {whole} do, or none")
    for layer, attention in enumerate(attentions):
        if isinstance(attention, SourceAttention):
            users = [user for user, source in enumerate(sources) if source == sources[layer]]
            attention.source, attention.shares = sources[layer], sources[layer] != layer
            attention.hands_over = users[0] == layer and len(users) > 1
            attention.is_last = users[-1] == layer
            attention.handover.regions.clear()
            attention.handover.heads.clear()
