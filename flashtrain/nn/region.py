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
        # Given the source's log-sum-exp a forward pass saves what cuDNN hides: there that is the faster one.
        # It is deterministic.
        fast = query.is_cuda and why_not("cudnn", Heads(query, self._pass.key, own), False, False) is None
        return self._pass.join(own, cudnn if fast else None)


class LayerByLayer:
    """Any attention backend; each layer forms all its gradients, and those of the shared heads are summed.

    The sums are fp32 (fp64 for fp64), from the deepest layer to the source, and rounded once.
    """

    shared: tuple[Tensor, Tensor]

    def __init__(self, share: Share, follow: bool) -> None:
        self.share, self.follow = share, follow
        self.sums: list[Tensor] = []

    def open(self, heads: Heads) -> Tensor:
        own, *shared = _apart(self.share, heads)
        self.shared = shared[0].detach(), shared[1].detach()
        return attend(_together(self.share, own, *_Total.apply(self, *shared)))

    def lend(self, output: Tensor, heads: Heads) -> Tensor:
        """``output`` of the source, which does without the region: the layers behind join with ``heads``.

        The gradients of shared heads reach those of ``heads`` when that of the output does.
        """
        _, *shared = _apart(self.share, heads)
        self.shared = shared[0].detach(), shared[1].detach()
        lent: Tensor = _Lent.apply(self, output, *shared)
        return lent

    def join(self, own: Tensor) -> Tensor:
        parts = own, *self.shared
        return attend(_together(self.share, *(_Followed.apply(self, *parts) if self.follow else parts)))

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
    return _together(share, own, *_apart(share, source)[1:])


def _apart(share: Share, heads: Heads) -> tuple[Tensor, Tensor, Tensor]:
    """What each layer has of its own, and the two that are shared."""
    query, key, value = heads
    return (value, query, key) if share == "QK" else (query, key, value)


def _together(share: Share, own: Tensor, first: Tensor, second: Tensor) -> Heads:
    return Heads(first, second, own) if share == "QK" else Heads(own, first, second)


def region(share: Share, deferred: bool, follow: bool) -> Region:
    """A region for one pass. ``follow``: its layers add to the gradients of the shared heads."""
    return Deferred(follow) if deferred and torch.is_grad_enabled() else LayerByLayer(share, follow)


class _Total(Function):
    """The shared heads on their way to the source's own attention, whose gradient comes last."""

    @staticmethod
    def forward(ctx: Any, region: LayerByLayer, *shared: Tensor) -> tuple[Tensor, ...]:
        ctx.region = region
        return tuple(part.view_as(part) for part in shared)

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor | None, ...]:
        region: LayerByLayer = ctx.region
        ctx.region = None  # nodes live as long as the loss does
        if not region.sums:
            return (None, *slopes)
        region.add((slopes[0], slopes[1]))
        totals, region.sums = region.sums, []
        return (None, *(total.to(own.dtype) for total, own in zip(totals, slopes, strict=True)))


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


class _Followed(Function):
    """What a layer that shares attends with: the gradients of all but its own part go to the region.

    They are there before those of earlier layers, which come by way of its own part.
    """

    @staticmethod
    def forward(ctx: Any, region: LayerByLayer, *parts: Tensor) -> tuple[Tensor, ...]:
        ctx.region = region
        return tuple(part.view_as(part) for part in parts)

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor | None, ...]:
        own, first, second = slopes
        ctx.region.add((first, second))
        ctx.region = None
        return None, own, None, None
