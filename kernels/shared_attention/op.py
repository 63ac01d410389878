"""Attention of layers that share queries and keys: differentiable, with their gradients formed once.

Naively each of R + 1 layers has five products in its backward pass. But with P the same in all of them

    Σ_c dS_c = P · (Σ_c dO_c V_cᵀ - Σ_c rowsum(dO_c · O_c)),

so that each layer needs two (P and dV_c), and queries and keys R + 4 for all: 3R + 6 for 5R + 5. This is
exact, since queries and keys depend on the source's input alone, whose backward comes after that of every
layer behind it: autograd runs ``_Source.backward`` last, as its output feeds all later values.
"""

from collections.abc import Callable
from types import ModuleType
from typing import Any

from torch import Tensor
from torch.autograd import Function

from flashtrain.errors import UserError
from flashtrain.kernels.layout import in_words
from flashtrain.kernels.shared_attention import reference
from flashtrain.kernels.shared_attention.config import refusal

Forward = Callable[[Tensor, Tensor, Tensor], Tensor]


class Pass:
    """One forward and backward pass of a source and of the layers that share its queries and keys.

    ``follow``: the layers that share add to the gradients of query and key. Queries are ``[B, H, S, D]``,
    keys and values ``[B, kv heads, S, D]``. Backward passes leave dO_c and V_c here, side by side.
    """

    query: Tensor
    key: Tensor
    lse: Tensor

    def __init__(self, follow: bool = True) -> None:
        self.follow = follow
        self._layers = 1  # that will give to the gradients
        self._given: _Given | None = None

    def open(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """The source's output ``[B, H, S, D]``.

        Raises UserError on a GPU for heads that the kernels do not have.
        """
        self.query, self.key = query.detach(), key.detach()
        output: Tensor = _Source.apply(self, query, key, value)
        return output

    def join(self, value: Tensor, forward: Forward | None = None) -> Tensor:
        """The output ``[B, H, S, D]`` of a layer with values of its own, by ``forward`` if that is given."""
        self._layers += self.follow
        output: Tensor = _Sharing.apply(self, value, forward)
        return output

    def take(self, slope: Tensor, output: Tensor, value: Tensor) -> None:
        """What a layer gives to the gradients of query and key."""
        if self._given is None:
            self._given = _Given(slope, value, self._layers)
        self._given.add(slope, output, value)

    def close(self) -> tuple[Tensor, Tensor]:
        """The gradients of query and key, from all that layers gave."""
        given, self._given = self._given, None
        assert given is not None
        found: tuple[Tensor, Tensor] = _at(self.query).score_gradients(
            self.query, self.key, self.lse, given.total, *given.side_by_side()
        )
        return found


class _Given:
    """Slopes and values of up to ``layers`` layers side by side, and the sum of their row sums."""

    def __init__(self, slope: Tensor, value: Tensor, layers: int) -> None:
        self._slopes, self._values = (x.new_empty(*x.shape[:3], layers, x.shape[3]) for x in (slope, value))
        self._count = 0
        self.total: Tensor | None = None

    def add(self, slope: Tensor, output: Tensor, value: Tensor) -> None:
        """One more layer."""
        kept = self._values[:, :, :, self._count]
        wide = in_words(kept), in_words(value)
        kept, given = wide if wide[0].dtype == wide[1].dtype else (kept, value)
        kept.copy_(given)
        self.total = _at(slope).take_slope(slope, output, self.total, self._slopes[:, :, :, self._count])
        self._count += 1

    def side_by_side(self) -> tuple[Tensor, Tensor]:
        """``[B, H, S, layers, D]`` and ``[B, kv heads, S, layers, D]`` of the layers that were added."""
        return self._slopes[:, :, :, : self._count], self._values[:, :, :, : self._count]


def _at(query: Tensor) -> ModuleType:
    """The Triton kernels, or on a CPU the reference."""
    if not query.is_cuda:
        return reference
    reason = refusal(query.dtype, query.shape[3])
    if reason is not None:
        raise UserError(reason)
    from flashtrain.kernels.shared_attention import triton

    return triton


class _Source(Function):
    @staticmethod
    def forward(ctx: Any, region: Pass, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        output: Tensor
        output, region.lse = _at(query).attend(query, key, value)
        ctx.region = region
        ctx.save_for_backward(value, output)
        return output

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor | None, ...]:
        value, output = ctx.saved_tensors
        region: Pass = ctx.region
        ctx.region = None  # nodes outlive their backward pass, as long as the loss does
        region.take(slope, output, value)
        d_value = _at(slope).value_gradient(region.query, region.key, region.lse, slope)
        return None, *region.close(), d_value


class _Sharing(Function):
    @staticmethod
    def forward(ctx: Any, region: Pass, value: Tensor, other: Forward | None) -> Tensor:
        query, key = region.query, region.key
        output: Tensor
        output = _at(query).attend(query, key, value)[0] if other is None else other(query, key, value)
        ctx.region = region
        ctx.save_for_backward(value, output)
        return output

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[None, Tensor, None]:
        value, output = ctx.saved_tensors
        region: Pass = ctx.region
        ctx.region = None
        if region.follow:
            region.take(slope, output, value)
        return None, _at(slope).value_gradient(region.query, region.key, region.lse, slope), None
