"""What the layers of a region share in one pass: two of queries, keys and values, and their gradients."""

from typing import Any, Literal, Protocol

import torch
from torch import Tensor
from torch.autograd import Function

from flashtrain.kernels.shared_attention.op import Pass
from flashtrain.nn.attend import Heads, attend, why_not
from flashtrain.nn.attention_kernels import cudnn

Share = Literal["QK", "KV"]


class Region(Protocol):
    """The source opens it, the layers behind join it in their order; one forward and backward pass."""

    def open(self, heads: Heads) -> Tensor:
        """The source's output ``[B, H, S, D]``."""

    def join(self, own: Tensor) -> Tensor:
        """Output ``[B, H, S, D]`` of a layer with values (or queries) of its own and the source's rest."""


class Deferred:
    """Queries and keys are shared; their gradients are formed once (``kernels.shared_attention.op``)."""

    def __init__(self, follow: bool) -> None:
        self._pass = Pass(follow)

    def open(self, heads: Heads) -> Tensor:
        return self._pass.open(*heads)

    def join(self, own: Tensor) -> Tensor:
        query = self._pass.query
        # Given the source's log-sum-exp a forward pass saves what cuDNN hides: there cuDNN is the faster one.
        # Its forward pass is deterministic.
        fast = query.is_cuda and why_not("cudnn", Heads(query, self._pass.key, own), False, False) is None
        return self._pass.join(own, cudnn if fast else None)


class LayerByLayer:
    """Any attention backend; each layer forms all its gradients, and those of the shared heads are summed.

    The sums are fp32 (fp64 for fp64), from the deepest layer to the source, and rounded once.
    """

    def __init__(self, share: Share, follow: bool) -> None:
        self.share, self.follow = share, follow
        self.sums: list[Tensor] = []

    def open(self, heads: Heads) -> Tensor:
        self.heads = Heads(*(part.detach() for part in heads))
        output: Tensor = _Source.apply(self, *heads) if torch.is_grad_enabled() else attend(heads)
        return output

    def lend(self, output: Tensor, heads: Heads) -> Tensor:
        """``output`` of the source, which does without the region: the layers behind join with ``heads``.

        The gradients of shared heads reach those of ``heads`` when that of the output does.
        """
        self.heads = Heads(*(part.detach() for part in heads))
        first = 0 if self.share == "QK" else 1
        lent: Tensor = _Lent.apply(self, output, *heads[first : first + 2])
        return lent

    def join(self, own: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            return attend(merged(self.share, own, self.heads))
        output: Tensor = _Sharing.apply(self, own)
        return output

    def add(self, gradients: tuple[Tensor, Tensor]) -> None:
        """Take in the gradients of the shared heads from one layer."""
        if self.sums:
            for total, gradient in zip(self.sums, gradients, strict=True):
                total += gradient
        else:
            wide = torch.promote_types(gradients[0].dtype, torch.float32)
            self.sums = [gradient.to(wide, copy=True) for gradient in gradients]


def merged(share: Share, own: Tensor, source: Heads) -> Heads:
    """The heads of a layer that has ``own`` values (or queries) and the rest of ``source``."""
    return Heads(source.query, source.key, own) if share == "QK" else Heads(own, source.key, source.value)


def region(share: Share, deferred: bool, follow: bool) -> Region:
    """A region for one pass. ``follow``: its layers add to the gradients of the shared heads."""
    return Deferred(follow) if deferred and torch.is_grad_enabled() else LayerByLayer(share, follow)


class _Source(Function):
    @staticmethod
    def forward(ctx: Any, region: LayerByLayer, *heads: Tensor) -> Tensor:
        ctx.region = region
        ctx.graph = _graph(Heads(*heads), (True, True, True))
        output: Tensor = ctx.graph[0].detach()
        return output

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor | None, ...]:
        gradients, region = _gradients(ctx, slope)
        if region.sums:
            first = 0 if region.share == "QK" else 1
            region.add((gradients[first], gradients[first + 1]))
            gradients[first : first + 2] = [
                total.to(own.dtype)
                for total, own in zip(region.sums, gradients[first : first + 2], strict=True)
            ]
            region.sums = []
        return (None, *gradients)


class _Lent(Function):
    """Nothing but an order: all layers behind have been through backward when the output's gradient comes."""

    @staticmethod
    def forward(ctx: Any, region: LayerByLayer, output: Tensor, *shared: Tensor) -> Tensor:
        ctx.region, ctx.dtypes = region, [part.dtype for part in shared]
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor | None, ...]:
        totals, ctx.region.sums = ctx.region.sums, []
        ctx.region = None
        return (None, slope, *(total.to(dtype) for total, dtype in zip(totals, ctx.dtypes, strict=True)))


class _Sharing(Function):
    @staticmethod
    def forward(ctx: Any, region: LayerByLayer, own: Tensor) -> Tensor:
        ctx.region = region
        shared = region.follow
        wanted = (shared, shared, True) if region.share == "QK" else (True, shared, shared)
        ctx.graph = _graph(merged(region.share, own, region.heads), wanted)
        output: Tensor = ctx.graph[0].detach()
        return output

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[None, Tensor]:
        gradients, region = _gradients(ctx, slope)
        if not region.follow:
            return None, gradients[0]
        if region.share == "QK":
            *shared, own = gradients
        else:
            own, *shared = gradients
        region.add((shared[0], shared[1]))
        return None, own


def _graph(heads: Heads, wanted: tuple[bool, ...]) -> tuple[Tensor, list[Tensor]]:
    """Attention of ``heads`` as a graph of its own: the output, and the leaves whose gradients are wanted."""
    with torch.enable_grad():
        leaves = [part.detach().requires_grad_(own) for part, own in zip(heads, wanted, strict=True)]
        return attend(Heads(*leaves)), [leaf for leaf in leaves if leaf.requires_grad]


def _gradients(ctx: Any, slope: Tensor) -> tuple[list[Tensor], LayerByLayer]:
    """Those of the leaves, and the region; both are let go, as nodes live as long as the loss does."""
    (output, leaves), region = ctx.graph, ctx.region
    ctx.graph = ctx.region = None
    return list(torch.autograd.grad(output, leaves, slope)), region
