"""The SSD recurrence as one differentiable function: Triton kernels on a GPU, plain torch on a CPU."""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import silu

from flashtrain.errors import UserError
from flashtrain.kernels.layout import dense_like
from flashtrain.kernels.operator import operator
from flashtrain.kernels.ssd import reference
from flashtrain.kernels.ssd.config import refusal


def ssd(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    initial_state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """``(y [B, S, H, P] in x's dtype, final state [B, H, P, N])`` of Mamba-2 (arXiv 2405.21060).

    x ``[B, S, H, P]``, dt ``[B, S, H]``, A ``[H]`` (negative), B and C ``[B, S, G, N]``, D ``[H]``, initial
    state ``[B, H, P, N]`` (None: zeros); any strides. With ``dt_bias [H]`` the step is
    ``softplus(dt + dt_bias)``, without it ``dt`` itself. With ``z`` of x's shape y is multiplied by
    ``silu(z)``. All of them, and both outputs, have gradients, so a sequence may be run in pieces: the final
    state of one is the initial state of the next. States are fp32 (fp64 for fp64 inputs).

    Raises UserError for shapes that do not fit together, and on a GPU for sizes the kernels do not have.
    """
    _check(x, dt, A, B, C, D, z, dt_bias, initial_state)
    if x.is_cuda:
        reason = refusal(x.dtype, x.shape[3], B.shape[3])
        if reason is not None:
            raise UserError(reason)
        y, final = ssd_kernels(x, dt, A, B, C, D, dt_bias, initial_state)
    else:
        y, final = reference.chunked(x, dt, A, B, C, D, dt_bias, initial_state)
    return (y if z is None else y * silu(z)), final


@operator("flashtrain::ssd")
def ssd_kernels(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    dt_bias: Tensor | None,
    initial_state: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """``ssd`` by the Triton kernels: ``(y [B, S, H, P], final state [B, H, P, N])``."""
    from flashtrain.kernels.ssd import triton

    return triton.forward(x, dt, A, B, C, D, dt_bias, initial_state)


@ssd_kernels.register_fake
def _(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return dense_like(x), _state_like(x, B)


@operator("flashtrain::ssd_backward")
def ssd_backward_kernels(
    dy: Tensor,
    d_final: Tensor | None,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    dt_bias: Tensor | None,
    initial_state: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, dt, A, B, C, D ``[H]``, dt_bias ``[H]``, state; empty where there is no input."""
    from flashtrain.kernels.ssd import triton

    found = triton.backward(dy, d_final, x, dt, A, B, C, D, dt_bias, initial_state)
    nothing = (A.new_empty(0) for _ in range(2))
    return (
        *found[:5],
        next(nothing) if found.D is None else found.D,
        next(nothing) if found.dt_bias is None else found.dt_bias,
        found.initial_state,
    )


@ssd_backward_kernels.register_fake
def _(
    dy: Tensor,
    d_final: Tensor | None,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    dt_bias: Tensor | None,
    initial_state: Tensor | None,
) -> tuple[Tensor, ...]:
    dense = torch.contiguous_format
    d_dt = dense_like(dt if dt.stride(2) == 1 else dt.contiguous())
    optional = (A.new_empty(0) if t is None else torch.empty_like(t) for t in (D, dt_bias))
    keys, queries = (torch.empty_like(t, memory_format=dense) for t in (B, C))
    return dense_like(x), d_dt, torch.empty_like(A), keys, queries, *optional, _state_like(x, B)


def _state_like(x: Tensor, B: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], x.shape[2], x.shape[3], B.shape[3], dtype=torch.float32)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs)
    ctx.set_materialize_grads(False)


def _backward(context: Any, dy: Tensor | None, d_final: Tensor | None) -> tuple[Tensor | None, ...]:
    inputs = context.saved_tensors
    if dy is None:
        dy = torch.zeros_like(inputs[0])
    found = ssd_backward_kernels(dy, d_final, *inputs)
    pairs = zip(found, inputs, strict=True)
    return tuple(None if given is None else gradient.to(given.dtype) for gradient, given in pairs)


ssd_kernels.register_autograd(_backward, setup_context=_setup)


def _check(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    initial_state: Tensor | None,
) -> None:
    if x.dim() != 4 or B.dim() != 4:
        raise UserError(f"x {list(x.shape)} must be [B, S, H, P], B {list(B.shape)} must be [B, S, G, N]")
    batch, sequence, heads, width = x.shape
    groups, states = B.shape[2:]
    if not sequence or heads % max(groups, 1):
        raise UserError(
            f"x {list(x.shape)} needs at least one token, and {groups} groups must divide its heads"
        )
    for name, tensor, shape in (
        ("dt", dt, (batch, sequence, heads)),
        ("A", A, (heads,)),
        ("B", B, (batch, sequence, groups, states)),
        ("C", C, (batch, sequence, groups, states)),
        ("D", D, (heads,)),
        ("z", z, tuple(x.shape)),
        ("dt_bias", dt_bias, (heads,)),
        ("initial_state", initial_state, (batch, heads, width, states)),
    ):
        if tensor is not None and tuple(tensor.shape) != shape:
            raise UserError(
                f"{name} is {list(tensor.shape)}; with x {list(x.shape)} it must be {list(shape)}"
            )
    if not x.dtype == B.dtype == C.dtype:
        raise UserError(f"x, B and C must share one dtype, not {x.dtype}, {B.dtype} and {C.dtype}")
