"""Attention of layers that share queries and keys: differentiable, with their gradients formed once.

Naively each of R + 1 layers has five products in its backward pass. But with P the same in all of them

    Σ_c dS_c = P · (Σ_c dO_c V_cᵀ - Σ_c rowsum(dO_c · O_c)),

so that the layers that share need two (P and dV_c) and the source R + 5 for all: 3R + 5 for 5R + 5. This is
exact, since queries and keys depend on the source's input alone, whose backward comes after that of every
layer behind it: autograd runs ``_Source.backward`` last, as its output feeds all later values.
"""

from collections.abc import Callable
from types import ModuleType
from typing import Any

from torch import Tensor
from torch.autograd import Function

from flashtrain.errors import UserError
from flashtrain.kernels.shared_attention import reference
from flashtrain.kernels.shared_attention.config import refusal

Forward = Callable[[Tensor, Tensor, Tensor], Tensor]


class Pass:
    """One forward and backward pass of a source and of the layers that share its queries and keys.

    ``follow``: the layers that share add to the gradients of query and key. Queries are ``[B, H, S, D]``,
    keys and values ``[B, kv heads, S, D]``. Backward passes of sharing layers leave dO_c and V_c here.
    """

    query: Tensor
    key: Tensor
    lse: Tensor

    def __init__(self, follow: bool = True) -> None:
        self.follow = follow
        self.slopes: list[Tensor] = []
        self.values: list[Tensor] = []
        self.sums: Tensor | None = None

    def open(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """The source's output ``[B, H, S, D]``.

        Raises UserError on a GPU for heads that the kernels do not have.
        """
        self.query, self.key = query.detach(), key.detach()
        output: Tensor = _Source.apply(self, query, key, value)
        return output

    def join(self, value: Tensor, forward: Forward | None = None) -> Tensor:
        """The output ``[B, H, S, D]`` of a layer with values of its own.

        ``forward``: another attention of query, key and value; the kernel is spared the sums of its rows.
        """
        output: Tensor = _Sharing.apply(self, value, forward)
        return output


def _kernels(query: Tensor) -> ModuleType | None:
    """The Triton kernels, or None on a CPU."""
    if not query.is_cuda:
        return None
    reason = refusal(query.dtype, query.shape[3])
    if reason is not None:
        raise UserError(reason)
    from flashtrain.kernels.shared_attention import triton

    return triton


def _add_row_sums(slope: Tensor, output: Tensor, total: Tensor | None) -> Tensor:
    if (kernels := _kernels(slope)) is not None:
        found: Tensor = kernels.add_row_sums(slope, output, total)
        return found
    found = reference.row_sums(slope, output)
    return found if total is None else total.add_(found)


class _Source(Function):
    @staticmethod
    def forward(ctx: Any, region: Pass, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        output: Tensor
        output, lse = (_kernels(query) or reference).attend(query, key, value)
        region.lse = lse
        ctx.region = region
        ctx.save_for_backward(query, key, value, output, lse)
        return output

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, output, lse = ctx.saved_tensors
        region: Pass = ctx.region
        ctx.region = None  # nodes outlive their backward pass, as long as the loss does
        total = _add_row_sums(slope, output, region.sums)
        found = (_kernels(query) or reference).source_gradient(
            query, key, lse, total, slope, value, region.slopes, region.values
        )
        region.slopes, region.values, region.sums = [], [], None
        return (None, *found)


class _Sharing(Function):
    @staticmethod
    def forward(ctx: Any, region: Pass, value: Tensor, other: Forward | None) -> Tensor:
        query, key, lse = region.query, region.key, region.lse
        output: Tensor
        if other is None:
            output = (_kernels(query) or reference).attend_given(query, key, value, lse)
        else:
            output = other(query, key, value)
        ctx.region = region
        ctx.save_for_backward(query, key, lse, value, output)
        return output

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[None, Tensor, None]:
        query, key, lse, value, output = ctx.saved_tensors
        region: Pass = ctx.region
        ctx.region = None
        if region.follow:
            region.sums = _add_row_sums(slope, output, region.sums)
            region.slopes.append(slope)
            region.values.append(value)
        return None, (_kernels(query) or reference).value_gradient(query, key, lse, slope), None
