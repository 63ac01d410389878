"""Context parallelism of Mamba-2: each rank has a segment of the sequence, and states pass between them.

The recurrence is affine in the state before a segment, so a rank computes its segment as if nothing came
before it, and its summary: the state that it ends in (from zeros), and by how much it lets an earlier state
decay. The summaries are gathered, every rank folds those before it in order into the state it starts from,
and adds what that state gives to its outputs. What is exchanged does not depend on the length. Segments are
contiguous, in rank order, and need not be equally long.

    before_r = Σ_{q<r} exp(a_{q+1} + ... + a_{r-1}) · S_q       a_q = Σ_t Δ_t A,  S_q: state from zeros
    y_t      = y_t (from zeros) + exp(Σ_{u<=t} Δ_u A) · before_r · C_t

All in fp32 (fp64 for fp64). The backward pass is the mirror image: the gather's gradient is a reduce-scatter
that adds, in rank order, what the later segments have to say of a summary.
"""

from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor.parallel import ParallelStyle

from flashtrain.comm import collectives, groups
from flashtrain.errors import UserError


def tail_before(x: Tensor, count: int, group: str, site: str = "") -> Tensor:
    """The last ``count`` tokens ``[B, count, C]`` of the segment before this rank's ``x [B, S, C]``.

    Zeros on the first rank. Differentiable. Raises UserError for a segment shorter than that.
    """
    if x.shape[1] < count:
        raise UserError(
            f"a segment of {x.shape[1]} tokens on one rank is shorter than the convolution's {count} before "
            "a token: use longer sequences or fewer ranks"
        )
    own = x[:, x.shape[1] - count :]
    tails = collectives.all_gather(own.unsqueeze(0).contiguous(), group, site)
    rank = groups.resolve(group).rank()
    # The sum of none, not a constant: all ranks must take part in the gather's backward pass.
    return tails[max(rank - 1, 0) : rank].sum(0)


def state_before(final: Tensor, decay: Tensor, group: str, site: str = "") -> Tensor:
    """The state ``[B, H, P, N]`` in which this rank's segment starts, in fp32 or fp64.

    ``final`` of that shape is where the segment ends if it starts from zeros; ``decay [B, H]`` is the
    logarithm of what is left of an earlier state after it. Differentiable.
    """
    batch, heads, width, states = final.shape
    summary = torch.cat([final.flatten(2), decay.unsqueeze(-1).to(final.dtype)], dim=-1)
    gathered = collectives.all_gather(summary.unsqueeze(0).contiguous(), group, site)
    earlier_ones = gathered[: groups.resolve(group).rank()]
    # Zeros, but as a sum of none: all ranks must take part in the gather's backward pass.
    before = earlier_ones[:0, ..., :-1].sum(0).view_as(final)
    for earlier in earlier_ones:
        state, log = earlier.split([width * states, 1], dim=-1)
        before = before * log.unsqueeze(-1).exp() + state.view(batch, heads, width, states)
    return before


if TYPE_CHECKING:

    class _Mixer(nn.Module):
        """What the mixer below this class provides."""

        def _decays(self, dt: Tensor) -> Tensor: ...
        def _convolve(self, mixed: Tensor, tail: Tensor | None) -> tuple[Tensor, Tensor]: ...
        def _recur(
            self, values: Tensor, dt: Tensor, keys: Tensor, queries: Tensor, state: Tensor | None
        ) -> tuple[Tensor, Tensor]: ...
else:
    _Mixer = object


class StatePassingMixer(_Mixer):
    """A Mamba-2 mixer on a segment of the sequence; goes before the mixer's class (``StatePassing``)."""

    context: str
    context_site: str = ""
    taps: int
    in_one = False

    def _convolve(self, mixed: Tensor, tail: Tensor | None) -> tuple[Tensor, Tensor]:
        if tail is not None:
            raise UserError("a mixer that passes states between ranks starts at the sequence's first token")
        return super()._convolve(mixed, tail_before(mixed, self.taps - 1, self.context, self.context_site))

    def _recur(
        self, values: Tensor, dt: Tensor, keys: Tensor, queries: Tensor, state: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        y, final = super()._recur(values, dt, keys, queries, None)
        logs = self._decays(dt).cumsum(1)
        before = state_before(final, logs[:, -1], self.context, self.context_site)
        queries = queries.to(final.dtype)
        by_group = before.unflatten(1, (queries.shape[2], -1))
        carried = torch.einsum("bsgn,bghpn->bsghp", queries, by_group).flatten(2, 3)
        y = (y.to(final.dtype) + logs.exp().unsqueeze(-1) * carried).to(y.dtype)
        return y, final + logs[:, -1].exp()[..., None, None] * before


class StatePassing(ParallelStyle):
    """Have a Mamba-2 mixer compute this rank's segment ``[S_r, B, hidden]`` of a sequence over the mesh.

    Every rank must hold the same parameters; their gradients are those of the rank's own tokens and have to
    be summed. The state that ``extend`` returns is that after the segment.
    """

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        kind: Any = type(module)
        if not all(hasattr(kind, name) for name in ("_convolve", "_recur", "rows_of")):
            raise UserError(f"StatePassing applies to Mamba2, not to {kind.__name__}")
        if device_mesh.size() > 1:
            module.__class__ = type(f"StatePassing{kind.__name__}", (StatePassingMixer, kind), {})
            cast(StatePassingMixer, module).context = device_mesh.get_group().group_name
        return module
