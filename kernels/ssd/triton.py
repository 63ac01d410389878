"""The SSD recurrence on a GPU: a few kernels, with the states between chunks as the only large intermediate.

    decay      steps Δ and their running sums, head-major                               2 x [B, H, S]
    states     the state at every chunk border, carried in registers                    [B, S/Q, H, P, N]
    output     y, chunk by chunk

and backward, after ``decay`` and ``states`` again, the latter with the gradients of the states:

    inputs     dx, chunk by chunk
    group      dB and dC, summed over the heads of a group
    decay back ddt, dA and the gradients of D and the bias, from sums over paths that the two before have left

States at the borders are kept in x's dtype; carried states, sums and gradients of states in fp32. Every
sum has one order, so results are the same bits again.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from flashtrain.kernels.column_sums import column_sums
from flashtrain.kernels.layout import dense_like
from flashtrain.kernels.sizes import cdiv
from flashtrain.kernels.ssd.backward import inputs_gradient_kernel
from flashtrain.kernels.ssd.config import Backward, Forward, backward_config, forward_config
from flashtrain.kernels.ssd.decay import decay_backward_kernel
from flashtrain.kernels.ssd.forward import output_kernel
from flashtrain.kernels.ssd.launch import DECAY_HEADS, Pass, rows_of


class Memory(NamedTuple):
    """Where gradients go: each has dense tokens, as ``rows_of`` says, and batch and time of any stride."""

    x: Tensor
    dt: Tensor
    B: Tensor
    C: Tensor


class Gradients(NamedTuple):
    """Gradients of the inputs of ``forward``; those of inputs that were not given are None."""

    x: Tensor
    dt: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor | None
    dt_bias: Tensor | None
    initial_state: Tensor


def forward(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    dt_bias: Tensor | None = None,
    initial_state: Tensor | None = None,
    config: Forward | None = None,
) -> tuple[Tensor, Tensor]:
    """``(y [B, S, H, P], final state [B, H, P, N] in fp32)``; see ``reference.recurrence`` for the rest."""
    config = config or forward_config(x.dtype)
    shape = Pass(x, dt, B, C, config.scan)
    y = dense_like(x)
    delta, total = shape.decay(A, dt_bias)
    start = None if initial_state is None else initial_state.float().contiguous()
    states, final = shape.carry(delta, total, start)
    heads = shape.share(config.heads)
    output_kernel[(shape.chunks, shape.heads // heads, shape.batch)](
        shape.x,
        shape.B,
        shape.C,
        delta,
        total,
        states,
        D,
        y,
        shape.sequence,
        shape.chunks,
        shape.heads,
        shape.groups,
        *shape.x.stride()[:2],
        *shape.B.stride()[:2],
        *shape.C.stride()[:2],
        *y.stride()[:2],
        P=shape.width,
        N=shape.states,
        Q=config.scan.chunk,
        HEADS=heads,
        SKIP=D is not None,
        PRECISION=shape.precision,
        STAGES=config.stages,
        num_warps=config.warps,
    )
    return y, final


def backward(
    dy: Tensor,
    d_final: Tensor | None,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    dt_bias: Tensor | None = None,
    initial_state: Tensor | None = None,
    config: Backward | None = None,
    memory: Memory | None = None,
) -> Gradients:
    """Gradients, given those of y ``[B, S, H, P]`` and of the final state ``[B, H, P, N]`` (None: zero).

    Nothing but the inputs is needed from the forward pass. Gradients go to ``memory``, or to tensors of
    their own.
    """
    config = config or backward_config(x.dtype)
    shape = Pass(x, dt, B, C, config.scan)
    dy, heads = rows_of(dy), shape.share(config.heads)
    dx, d_dt, dB, dC = memory or (
        dense_like(x),
        dense_like(shape.dt),
        *(torch.empty_like(t, memory_format=torch.contiguous_format) for t in (B, C)),
    )
    delta, total = shape.decay(A, dt_bias)
    start, d_end = (None if t is None else t.float().contiguous() for t in (initial_state, d_final))
    states, d_states, d_initial = shape.carry_both(dy, delta, total, start, d_end)
    shares = shape.heads // heads
    mixed = x.new_empty(shape.batch, shape.chunks, shares, config.scan.chunk, config.scan.chunk)
    at_read, before, at_write, within, d_out_x = delta.new_empty(5, *delta.shape).unbind()
    through = shape.empty(shape.batch, shape.chunks, shape.heads)
    sums = shape.empty(shape.batch, shape.chunks, 3, shape.heads)
    inputs_gradient_kernel[(shape.chunks, shares, shape.batch)](
        shape.x,
        shape.B,
        shape.C,
        dy,
        delta,
        total,
        d_states,
        D,
        dx,
        mixed,
        at_read,
        at_write,
        within,
        d_out_x,
        shape.sequence,
        shape.chunks,
        shape.heads,
        shape.groups,
        *shape.x.stride()[:2],
        *shape.B.stride()[:2],
        *shape.C.stride()[:2],
        *dy.stride()[:2],
        *dx.stride()[:2],
        P=shape.width,
        N=shape.states,
        Q=config.scan.chunk,
        HEADS=heads,
        SKIP=D is not None,
        PRECISION=shape.precision,
        STAGES=config.stages,
        num_warps=config.warps,
    )
    shared = (states, d_states, mixed, (delta, total), (before, through))
    shape.group_gradient(shape.x, shape.B, shape.C, *shared, out=dB, of_b=True, config=config)
    shape.group_gradient(dy, shape.C, shape.B, *shared, out=dC, of_b=False, config=config)
    decay_backward_kernel[(shape.chunks, cdiv(shape.heads, DECAY_HEADS), shape.batch)](
        shape.dt,
        dt_bias,
        A,
        delta,
        at_read,
        before,
        at_write,
        within,
        through,
        d_out_x,
        d_dt,
        sums,
        shape.sequence,
        shape.padded,
        shape.heads,
        shape.chunks,
        *shape.dt.stride()[:2],
        *d_dt.stride()[:2],
        Q=config.scan.chunk,
        BH=DECAY_HEADS,
        SOFTPLUS=dt_bias is not None,
        SKIP=D is not None,
        num_warps=4,
    )
    dA, d_bias, dD = (torch.empty_like(A if t is None else t) for t in (A, dt_bias, D))
    column_sums(sums, dA, d_bias, dD)
    return Gradients(
        dx, d_dt, dA, dB, dC, None if D is None else dD, None if dt_bias is None else d_bias, d_initial
    )
