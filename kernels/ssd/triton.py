"""The SSD recurrence on a GPU: a few kernels, with the states between chunks as the only large intermediate.

    decay      steps Δ and their running sums, head-major                               2 x [B, H, S]
    states     the state at every chunk border, carried in registers                    [B, S/Q, H, P, N]
    output     y, chunk by chunk

and backward, after ``decay`` and ``states`` again, the latter with the gradients of the states:

    inputs     dx, chunk by chunk
    group      dB and dC, summed over the heads of a group
    decay back ddt, dA and the gradient of the bias, from sums over paths that the two before have left

States at the borders are kept in x's dtype; carried states, sums and gradients of states in fp32. Every
sum has one order, so results are the same bits again.
"""

from functools import cache
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from flashtrain.kernels.layout import dense_like
from flashtrain.kernels.ssd.backward import inputs_gradient_kernel
from flashtrain.kernels.ssd.config import Backward, Forward, Scan, backward_config, forward_config
from flashtrain.kernels.ssd.decay import decay_backward_kernel, decay_kernel
from flashtrain.kernels.ssd.forward import output_kernel
from flashtrain.kernels.ssd.group import group_gradient_kernel
from flashtrain.kernels.ssd.states import both_states_kernel, states_kernel

_DECAY_HEADS = 16  # heads of a block of the decay kernels: 32 or 64 bytes of a token's steps


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


class _Shape:
    """Sizes and inputs that every kernel of one pass shares."""

    def __init__(self, x: Tensor, dt: Tensor, B: Tensor, C: Tensor, scan: Scan) -> None:
        self.batch, self.sequence, self.heads, self.width = x.shape
        self.groups, self.states = B.shape[2:]
        self.chunks = triton.cdiv(self.sequence, scan.chunk)
        self.padded = self.chunks * scan.chunk
        self.per_group = self.heads // self.groups
        self.scan, self.device = scan, x.device
        self.x, self.B, self.C = _rows(x), _rows(B), _rows(C)
        self.dt = dt if dt.stride(2) == 1 else dt.contiguous()
        self.precision = "ieee" if x.dtype == torch.float32 else "tf32"

    def share(self, heads: int) -> int:
        """Heads of a block: at most ``heads``, and a divisor of a group."""
        return next(n for n in range(heads, 0, -1) if self.per_group % n == 0)

    def empty(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=self.device)

    def decay(self, A: Tensor, dt_bias: Tensor | None) -> tuple[Tensor, Tensor]:
        """Δ and its running sums, ``[B, H, chunks · Q]``."""
        delta, total = (self.empty(self.batch, self.heads, self.padded) for _ in range(2))
        decay_kernel[(self.chunks, triton.cdiv(self.heads, _DECAY_HEADS), self.batch)](
            self.dt,
            dt_bias,
            A,
            delta,
            total,
            self.sequence,
            self.padded,
            self.heads,
            *self.dt.stride()[:2],
            Q=self.scan.chunk,
            BH=_DECAY_HEADS,
            SOFTPLUS=dt_bias is not None,
            num_warps=4,
        )
        return delta, total

    def columns(self, directions: int) -> int:
        """Columns of the state of a block of the scan: fewer where blocks would not fill the GPU."""
        columns = min(self.scan.columns, self.states)
        blocks = directions * self.batch * self.heads * (self.states // columns)
        few = blocks * 2 < 3 * _processors(self.device) and columns >= 64
        return columns // 2 if few else columns

    def borders(self) -> Tensor:
        """Memory for states at chunk borders."""
        size = (self.batch, self.chunks, self.heads, self.width, self.states)
        return torch.empty(size, dtype=self.x.dtype, device=self.device)

    def carry(self, delta: Tensor, total: Tensor, start: Tensor | None) -> tuple[Tensor, Tensor]:
        """States before each chunk ``[B, chunks, H, P, N]`` and at the end ``[B, H, P, N]``."""
        states, columns = self.borders(), self.columns(1)
        end = self.empty(self.batch, self.heads, self.width, self.states)
        states_kernel[(self.states // columns, self.heads, self.batch)](
            self.x,
            self.B,
            delta,
            total,
            start,
            states,
            end,
            self.sequence,
            self.chunks,
            self.heads,
            self.per_group,
            *self.x.stride()[:2],
            *self.B.stride()[:2],
            P=self.width,
            N=self.states,
            BN=columns,
            Q=self.scan.chunk,
            HAS_START=start is not None,
            PRECISION=self.precision,
            STAGES=self.scan.stages,
            num_warps=self.scan.warps,
        )
        return states, end

    def carry_both(
        self, dy: Tensor, delta: Tensor, total: Tensor, start: Tensor | None, d_end: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """States before and gradients of states after each chunk, and the gradient of the first state."""
        states, d_states, columns = self.borders(), self.borders(), self.columns(2)
        end, d_start = (self.empty(self.batch, self.heads, self.width, self.states) for _ in range(2))
        both_states_kernel[(2 * self.states // columns, self.heads, self.batch)](
            self.x,
            self.B,
            dy,
            self.C,
            delta,
            total,
            start,
            d_end,
            states,
            d_states,
            end,
            d_start,
            self.sequence,
            self.chunks,
            self.heads,
            self.per_group,
            *self.x.stride()[:2],
            *self.B.stride()[:2],
            *dy.stride()[:2],
            *self.C.stride()[:2],
            P=self.width,
            N=self.states,
            BN=columns,
            Q=self.scan.chunk,
            HAS_START=start is not None,
            HAS_D_END=d_end is not None,
            PRECISION=self.precision,
            STAGES=self.scan.stages,
            num_warps=self.scan.warps,
        )
        return states, d_states, d_start

    def group_gradient(
        self,
        x: Tensor,
        own: Tensor,
        other: Tensor,
        states: Tensor,
        d_states: Tensor,
        mixed: Tensor,
        steps: tuple[Tensor, Tensor],
        paths: tuple[Tensor, Tensor],
        of_b: bool,
        config: Backward,
    ) -> Tensor:
        """dB or dC ``[B, S, G, N]``, in the dtype of ``own``; with dC the ``paths`` over chunk borders."""
        out = torch.empty(own.shape, dtype=own.dtype, device=self.device)
        group_gradient_kernel[(self.chunks, self.groups, self.batch)](
            x,
            own,
            other,
            states,
            d_states,
            mixed,
            *steps,
            out,
            *paths,
            self.sequence,
            self.chunks,
            self.heads,
            self.groups,
            mixed.shape[2],
            *x.stride()[:2],
            *own.stride()[:2],
            *other.stride()[:2],
            P=self.width,
            N=self.states,
            Q=self.scan.chunk,
            OF_B=of_b,
            PRECISION=self.precision,
            STAGES=config.group_stages,
            num_warps=config.group_warps,
        )
        return out


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
    shape = _Shape(x, dt, B, C, config.scan)
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
) -> Gradients:
    """Gradients, given those of y ``[B, S, H, P]`` and of the final state ``[B, H, P, N]`` (None: zero).

    Nothing but the inputs is needed from the forward pass.
    """
    config = config or backward_config(x.dtype)
    shape = _Shape(x, dt, B, C, config.scan)
    dy, dx, heads = _rows(dy), dense_like(x), shape.share(config.heads)
    delta, total = shape.decay(A, dt_bias)
    start, d_end = (None if t is None else t.float().contiguous() for t in (initial_state, d_final))
    states, d_states, d_initial = shape.carry_both(dy, delta, total, start, d_end)
    shares = shape.heads // heads
    mixed = x.new_empty(shape.batch, shape.chunks, shares, config.scan.chunk, config.scan.chunk)
    at_read, before, at_write, within, d_out_x = (torch.empty_like(delta) for _ in range(5))
    through, dA, d_bias, dD = (shape.empty(shape.batch, shape.chunks, shape.heads) for _ in range(4))
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
    dB = shape.group_gradient(shape.x, shape.B, shape.C, *shared, of_b=True, config=config)
    dC = shape.group_gradient(dy, shape.C, shape.B, *shared, of_b=False, config=config)
    d_dt = dense_like(shape.dt)
    decay_backward_kernel[(shape.chunks, triton.cdiv(shape.heads, _DECAY_HEADS), shape.batch)](
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
        dA,
        d_bias,
        dD,
        shape.sequence,
        shape.padded,
        shape.heads,
        shape.chunks,
        *shape.dt.stride()[:2],
        *d_dt.stride()[:2],
        Q=config.scan.chunk,
        BH=_DECAY_HEADS,
        SOFTPLUS=dt_bias is not None,
        SKIP=D is not None,
        num_warps=4,
    )

    return Gradients(
        dx,
        d_dt,
        dA.sum((0, 1)).to(A.dtype),
        dB,
        dC,
        None if D is None else dD.sum((0, 1)).to(D.dtype),
        None if dt_bias is None else d_bias.sum((0, 1)).to(dt_bias.dtype),
        d_initial,
    )


def _rows(x: Tensor) -> Tensor:
    """``x [B, S, H, P]`` with H·P contiguous values a token; batch and sequence may have any stride."""
    packed = x.stride(3) == 1 and (x.shape[2] == 1 or x.stride(2) == x.shape[3])
    return x if packed else x.contiguous()


@cache
def _processors(device: torch.device) -> int:
    on_gpu = device.type == "cuda"  # not so in Triton's interpreter
    return torch.cuda.get_device_properties(device).multi_processor_count if on_gpu else 1
