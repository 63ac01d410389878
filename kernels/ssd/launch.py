"""What the passes forward and backward share: sizes, inputs as the kernels take them, launches."""

import torch
from torch import Tensor

from flashtrain.kernels.sizes import cdiv, processors
from flashtrain.kernels.ssd.config import Backward, Scan
from flashtrain.kernels.ssd.decay import decay_kernel
from flashtrain.kernels.ssd.group import group_gradient_kernel
from flashtrain.kernels.ssd.states import both_states_kernel, states_kernel

DECAY_HEADS = 16  # heads of a block of the decay kernels: 32 or 64 bytes of a token's steps


class Pass:
    """Sizes and inputs that every kernel of one pass shares."""

    def __init__(self, x: Tensor, dt: Tensor, B: Tensor, C: Tensor, scan: Scan) -> None:
        self.batch, self.sequence, self.heads, self.width = x.shape
        self.groups, self.states = B.shape[2:]
        self.chunks = cdiv(self.sequence, scan.chunk)
        self.padded = self.chunks * scan.chunk
        self.per_group = self.heads // self.groups
        self.scan, self.device = scan, x.device
        self.x, self.B, self.C = rows_of(x), rows_of(B), rows_of(C)
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
        decay_kernel[(self.chunks, cdiv(self.heads, DECAY_HEADS), self.batch)](
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
            BH=DECAY_HEADS,
            SOFTPLUS=dt_bias is not None,
            num_warps=4,
        )
        return delta, total

    def columns(self, directions: int) -> int:
        """Columns of the state of a block of the scan: fewer where blocks would not fill the GPU."""
        columns = min(self.scan.columns, self.states)
        blocks = directions * self.batch * self.heads * (self.states // columns)
        few = blocks * 2 < 3 * processors(self.device) and columns >= 64
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
        out: Tensor,
        of_b: bool,
        config: Backward,
    ) -> None:
        """dB or dC ``[B, S, G, N]`` into ``out``; with dC the ``paths`` over chunk borders."""
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
            *out.stride()[:2],
            P=self.width,
            N=self.states,
            Q=self.scan.chunk,
            OF_B=of_b,
            PRECISION=self.precision,
            STAGES=config.group_stages,
            num_warps=config.group_warps,
        )


def rows_of(x: Tensor) -> Tensor:
    """``x [B, S, H, P]`` with H·P contiguous values a token; batch and sequence may have any stride."""
    packed = x.stride(3) == 1 and (x.shape[2] == 1 or x.stride(2) == x.shape[3])
    return x if packed else x.contiguous()
