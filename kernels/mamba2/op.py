"""What Mamba-2 has between its two projections, as one function: convolution, recurrence, gate and norm.

Their kernels and bits are those of ``causal_conv``, ``ssd`` and ``gated_norm``, called one after the other.
What one function saves is between them: a dozen views with a node each in autograd's graph, which cost the
host more than the kernels do, and two copies of all gradients, which are written here where the gradient of
the packed projection has its columns.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from flashtrain.errors import UserError
from flashtrain.kernels.causal_conv.op import MOST_TAPS
from flashtrain.kernels.operator import seen
from flashtrain.kernels.ssd.config import refusal


class Sizes(NamedTuple):
    """Of the heads, of a state, and of the norm over each of ``norm_groups`` parts."""

    heads: int
    head_dim: int
    states: int
    norm_groups: int
    epsilon: float


class Weights(NamedTuple):
    """``conv [C, W]``, ``conv_bias [C]``; rate A (negative), skip D and ``step_bias [H]``; ``norm [H·P]``."""

    conv: Tensor
    conv_bias: Tensor
    rate: Tensor
    skip: Tensor
    step_bias: Tensor
    norm: Tensor


def takes(projected: Tensor, weights: Weights, sizes: Sizes) -> bool:
    """Whether ``mix`` is for this: eager code on a GPU, of sizes that its kernels have."""
    taps = weights.conv.shape[1]
    return (
        projected.is_cuda
        and not torch.compiler.is_compiling()
        and not seen((projected, *weights))
        and taps <= min(MOST_TAPS, projected.shape[0] + 1)
        and refusal(projected.dtype, sizes.head_dim, sizes.states) is None
    )


def mix(
    projected: Tensor, tail: Tensor | None, state: Tensor | None, weights: Weights, sizes: Sizes
) -> tuple[Tensor, Tensor, Tensor]:
    """``(gated and normed y [S, B, H·P], new tail [B, W-1, C], new state [B, H, P, N])``.

    ``projected [S, B, H·P + C + H]`` has the columns of z, of x, B and C together, and of dt;
    ``tail [B, W-1, C]`` and ``state`` are those before the first token (None: zeros). All have gradients.
    Raises UserError for a tail or a state of another shape.
    """
    batch, (channels, taps) = projected.shape[1], weights.conv.shape
    for name, given, shape in (
        ("tail", tail, (batch, taps - 1, channels)),
        ("state", state, (batch, sizes.heads, sizes.head_dim, sizes.states)),
    ):
        if given is not None and given.shape != shape:
            raise UserError(f"the {name} is {list(given.shape)}; with this batch it must be {list(shape)}")
    found: tuple[Tensor, Tensor, Tensor] = _Mix.apply(
        projected, None if tail is None else tail.to(projected.dtype), state, *weights, sizes
    )
    return found


class _Mix(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, projected: Tensor, tail: Tensor | None, state: Tensor | None, *rest: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        from flashtrain.kernels.causal_conv import triton as conv
        from flashtrain.kernels.gated_norm import triton as norm
        from flashtrain.kernels.ssd import triton as ssd

        *own, sizes = rest
        weights = Weights(*own)
        z, inputs, dt = _split(projected, sizes)
        mixed = conv.forward(inputs, weights.conv, weights.conv_bias, tail)
        x, keys, queries = _heads(mixed, sizes)
        y, final = ssd.forward(x, dt, weights.rate, keys, queries, weights.skip, weights.step_bias, state)
        out = norm.forward(_tokens(y), z, weights.norm, sizes.norm_groups, sizes.epsilon)
        ctx.save_for_backward(projected, tail, state, *weights, mixed, y)
        ctx.sizes = sizes
        ctx.set_materialize_grads(False)
        taps = weights.conv.shape[1]
        return out, inputs[:, inputs.shape[1] - taps + 1 :].contiguous(), final

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(
        ctx: Any, d_out: Tensor | None, d_tail: Tensor | None, d_final: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        from flashtrain.kernels.causal_conv import triton as conv
        from flashtrain.kernels.gated_norm import triton as norm
        from flashtrain.kernels.ssd import triton as ssd

        projected, tail, state, *own, mixed, y = ctx.saved_tensors
        weights, sizes = Weights(*own), ctx.sizes
        z, inputs, dt = _split(projected, sizes)
        x, keys, queries = _heads(mixed, sizes)
        gradient = torch.empty_like(projected, memory_format=torch.contiguous_format)
        d_mixed = torch.empty_like(mixed)
        dz, d_inputs, d_dt = _split(gradient, sizes)
        if d_out is None:
            d_out = torch.zeros_like(_tokens(y))
        dy, _, d_norm = norm.backward(
            d_out, _tokens(y), z, weights.norm, sizes.norm_groups, sizes.epsilon, dz
        )
        dx, d_keys, d_queries = _heads(d_mixed, sizes)
        found = ssd.backward(
            dy.view(*dy.shape[:2], sizes.heads, sizes.head_dim).transpose(0, 1),
            d_final,
            x,
            dt,
            weights.rate,
            keys,
            queries,
            weights.skip,
            weights.step_bias,
            state,
            memory=ssd.Memory(dx, d_dt, d_keys, d_queries),
        )
        _, d_conv, d_conv_bias, d_earlier = conv.backward(
            d_mixed, inputs, weights.conv, weights.conv_bias, tail, d_inputs
        )
        if d_tail is not None:
            d_inputs[:, d_inputs.shape[1] - d_tail.shape[1] :] += d_tail
        d_state = None if state is None else found.initial_state.to(state.dtype)
        own_gradients = d_conv, d_conv_bias, found.A, found.D, found.dt_bias, d_norm
        return gradient, d_earlier, d_state, *own_gradients, None


def _split(packed: Tensor, sizes: Sizes) -> tuple[Tensor, Tensor, Tensor]:
    """z ``[S, B, H·P]``; x, B and C together ``[B, S, C]``, and dt ``[B, S, H]``."""
    inner = sizes.heads * sizes.head_dim
    parts = [inner, packed.shape[-1] - inner - sizes.heads, sizes.heads]
    z, inputs, dt = packed.split_with_sizes(parts, -1)
    return z, inputs.transpose(0, 1), dt.transpose(0, 1)


def _heads(mixed: Tensor, sizes: Sizes) -> tuple[Tensor, Tensor, Tensor]:
    """x ``[B, S, H, P]``, B and C ``[B, S, G, N]`` of ``mixed [B, S, C]``."""
    batch, sequence, channels = mixed.shape
    inner = sizes.heads * sizes.head_dim
    shared = (channels - inner) // 2
    x, keys, queries = mixed.split_with_sizes([inner, shared, shared], -1)
    by_group = batch, sequence, shared // sizes.states, sizes.states
    return x.view(batch, sequence, sizes.heads, sizes.head_dim), keys.view(by_group), queries.view(by_group)


def _tokens(y: Tensor) -> Tensor:
    """y ``[B, S, H, P]`` as ``[S, B, H·P]``."""
    return y.flatten(2).transpose(0, 1)
