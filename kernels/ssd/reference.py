"""The SSD recurrence of Mamba-2 (arXiv 2405.21060) in plain torch: step by step, and by chunks.

For each sequence and head, with step size Δ_t > 0, rate A < 0 and a state ``[P, N]``:

    state_t = exp(Δ_t A) · state_{t-1} + Δ_t x_t ⊗ B_t
    y_t     = state_t C_t + D x_t

Shapes: x ``[B, S, H, P]``, dt ``[B, S, H]``, A and D ``[H]``, B and C ``[B, S, G, N]``, states
``[B, H, P, N]``; head h reads group h // (H/G) of B and C. All is computed in fp32, or in fp64 where the
inputs are fp64.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad, softplus


def step_sizes(dt: Tensor, dt_bias: Tensor | None) -> Tensor:
    """Δ ``[..., H]`` in fp32 or fp64: ``softplus(dt + dt_bias)``, or ``dt`` itself without a bias."""
    dt = dt.to(_wide(dt))
    return dt if dt_bias is None else softplus(dt + dt_bias.to(dt.dtype))


def recurrence(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    dt_bias: Tensor | None = None,
    initial_state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """``(y [B, S, H, P] in x's dtype, final state [B, H, P, N])``, token by token: the oracle of tests."""
    batch, sequence, heads, width = x.shape
    state = initial_state
    if state is None:
        state = torch.zeros(batch, heads, width, B.shape[3], dtype=_wide(x), device=x.device)
    outputs = []
    for t in range(sequence):
        y, state = step(x[:, t], dt[:, t], A, B[:, t], C[:, t], state, D, dt_bias)
        outputs.append(y)
    return torch.stack(outputs, dim=1), state


def step(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    state: Tensor,
    D: Tensor | None = None,
    dt_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """One token: x ``[B, H, P]``, dt ``[B, H]``, B and C ``[B, G, N]`` -> ``(y [B, H, P], new state)``."""
    wide, per_group = _wide(x), x.shape[1] // B.shape[1]
    delta, inputs, rate = step_sizes(dt, dt_bias).to(wide), x.to(wide), A.to(wide)
    keys, queries = (m.to(wide).repeat_interleave(per_group, dim=1) for m in (B, C))
    update = torch.einsum("bhp,bhn->bhpn", inputs * delta.unsqueeze(-1), keys)
    state = state.to(wide) * (delta * rate).exp()[..., None, None] + update
    y = torch.einsum("bhpn,bhn->bhp", state, queries)
    if D is not None:
        y = y + D.to(wide)[:, None] * inputs
    return y.to(x.dtype), state


def chunked(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    dt_bias: Tensor | None = None,
    initial_state: Tensor | None = None,
    chunk: int = 64,
) -> tuple[Tensor, Tensor]:
    """``recurrence`` as matrix products over chunks (section 6 of the paper); differentiable.

    Keeps ``[B, S/chunk, H, chunk, chunk]`` for the backward pass.
    """
    batch, sequence, heads, width = x.shape
    wide, groups, states = _wide(x), B.shape[2], B.shape[3]
    # Steps of size zero leave the state as it is, so the filler of a ragged last chunk has no effect.
    filler = -sequence % chunk
    delta = pad(step_sizes(dt, dt_bias).to(wide), (0, 0, 0, filler))
    inputs, keys, queries = (pad(m.to(wide), (0, 0, 0, 0, 0, filler)) for m in (x, B, C))

    def split(m: Tensor) -> Tensor:
        """``[B, S, H or G, ...]`` -> ``[B, chunks, G, H/G or 1, chunk, ...]``."""
        m = m.unflatten(2, (groups, -1)).unflatten(1, (-1, chunk))
        return m.movedim(2, 4)

    delta, inputs, keys, queries = split(delta), split(inputs), split(keys), split(queries)
    decay = (delta * A.to(wide).view(groups, -1, 1)).cumsum(-1)  # log of the decay since the chunk's start
    stepped = inputs * delta.unsqueeze(-1)
    causal = torch.ones(chunk, chunk, dtype=torch.bool, device=x.device).tril()
    between = (decay.unsqueeze(-1) - decay.unsqueeze(-2)).masked_fill(~causal, float("-inf")).exp()
    y = (queries @ keys.mT * between) @ stepped

    last = decay[..., -1:]
    added = (stepped * (last - decay).exp().unsqueeze(-1)).mT @ keys
    if initial_state is None:
        state = torch.zeros(batch, heads, width, states, dtype=wide, device=x.device)
    else:
        state = initial_state.to(wide)
    state = state.unflatten(1, (groups, -1))
    before = []
    for index in range(added.shape[1]):
        before.append(state)
        state = state * last[:, index].exp().unsqueeze(-1) + added[:, index]
    y = y + (queries @ torch.stack(before, dim=1).mT) * decay.exp().unsqueeze(-1)

    y = y.movedim(4, 2).flatten(1, 2).flatten(2, 3)[:, :sequence]
    if D is not None:
        y = y + D.to(wide)[:, None] * x.to(wide)
    return y.to(x.dtype), state.flatten(1, 2)


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32
