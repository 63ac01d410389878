"""Overlapped products as torch.library ops: all-gather + product, product + reduce-scatter.

For W ranks of ``group`` with M rows in all (rank c holds the rows ``tensor_split`` gives it, M/W below):

    all_gather_matmul        y [M, N/W]       = AG(x_shard [M/W, K]) · w_shard [N/W, K]ᵀ
      its backward           dx_shard [M/W, K] = RS(dy · w_shard)             column_gradients: the gather
                             dw_shard [N/W, K] = dyᵀ · AG(x_shard)            under dx, the scatter under dw
    matmul_reduce_scatter    y_shard [M/W, N] = RS(x [M, K/W] · w_shard [N, K/W]ᵀ)
      its backward           dx [M, K/W]      = AG(dy_shard) · w_shard        row_gradients: the gather
                             dw_shard [N, K/W] = AG(dy_shard)ᵀ · x            of dx serves dw as well

In which way a product is computed is chosen once for its shapes (``products``).

Partials are rounded once to the dtype of the operands, added in rank order in fp32 and rounded once
more, so in fp32, bf16 and fp16 the bits depend on nothing but shapes, dtype and W: not on the
transport, the number of sub-chunks, arrival or timing. (``Settings.kind = "ring"`` adds along the ring
in the operands' dtype.)

Every op takes the process group by name, for torch.compile; ``site`` names the product in reports and
errors. ``rows`` is M where M is not W times the local rows.
"""

from contextlib import AbstractContextManager, nullcontext
from functools import partial

import torch
from torch import Tensor
from torch.autograd import profiler
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import Parameter
from torch.utils._python_dispatch import _get_current_dispatch_mode

from flashtrain.comm import gradients
from flashtrain.comm.collectives import TAGS, all_gather, gathered_rows, own_rows, reduce_scatter
from flashtrain.comm.products import gather_way, scatter_way
from flashtrain.kernels.weight_gradient import WeightGradient


def all_gather_matmul(
    x_shard: Tensor,
    w_shard: Tensor,
    group: str,
    site: str = "",
    rows: int | None = None,
    keep_gather: bool = False,
    return_gather: bool = True,
    main: WeightGradient | None = None,
) -> tuple[Tensor, Tensor]:
    """``y [M, N/W] = AG(x_shard [M/W, K]) · w_shard [N/W, K]ᵀ``; returns ``(y, x_full [M, K])``.

    The own chunk is multiplied first, the others as they arrive. The weight gradient gathers
    ``x_shard`` again, or with ``keep_gather`` keeps ``x_full``. Without ``return_gather`` x_full is
    ``[0, K]``, unless it is kept; a transport that lends its memory then saves a copy. The weight gradient is
    added to ``main`` where there is one, except in compiled code, where autograd has it. Raises UserError for
    operands that do not multiply or a shard that does not fit ``rows``, TransportError if a peer fails.
    """
    arguments = (x_shard, w_shard, group, site, rows, keep_gather, return_gather)
    if _accumulates(main, x_shard, w_shard):
        return _AccumulatingGather.apply(*arguments, main)
    if _watched(x_shard, w_shard):
        return _registered_gather(*arguments)
    if torch.is_grad_enabled() and (x_shard.requires_grad or w_shard.requires_grad):
        return _GatherFunction.apply(*arguments)
    return _all_gather_matmul(*arguments)


def matmul_reduce_scatter(
    x: Tensor, w_shard: Tensor, group: str, site: str = "", main: WeightGradient | None = None
) -> Tensor:
    """``y_shard [M/W, N] = RS(x [M, K/W] · w_shard [N, K/W]ᵀ)``.

    The partial of each other rank's rows is sent as soon as it is computed; the own rows come last. ``main``
    is that of ``all_gather_matmul``. Raises UserError for operands that do not multiply, TransportError if a
    peer fails.
    """
    if _accumulates(main, x, w_shard):
        return _AccumulatingScatter.apply(x, w_shard, group, site, main)
    if _watched(x, w_shard):
        return _registered_scatter(x, w_shard, group, site)
    if torch.is_grad_enabled() and (x.requires_grad or w_shard.requires_grad):
        return _ScatterFunction.apply(x, w_shard, group, site)
    return _matmul_reduce_scatter(x, w_shard, group, site)


def _watched(*operands: Tensor) -> bool:
    """Whether anything but autograd wants to see the operator: compilers, profilers, modes, subclasses.

    The dispatcher costs as much host time as all of a small product's launches together.
    """
    return traced(*operands) or profiler._is_profiler_enabled or _get_current_dispatch_mode() is not None


def traced(*operands: Tensor) -> bool:
    """Whether something that is no execution goes over the operator."""
    return (
        torch.compiler.is_compiling()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or any(type(operand) not in (Tensor, Parameter) or operand.is_meta for operand in operands)
    )


def _accumulates(main: WeightGradient | None, x: Tensor, w: Tensor) -> bool:
    """Whether the weight's gradient is to be added to ``main``: bits must not depend on who watches."""
    return main is not None and torch.is_grad_enabled() and w.requires_grad and not traced(x, w)


def _all_gather_matmul(
    x_shard: Tensor,
    w_shard: Tensor,
    group: str,
    site: str,
    rows: int | None,
    keep_gather: bool,
    return_gather: bool,
) -> tuple[Tensor, Tensor]:
    way = gather_way(x_shard, w_shard, group, rows, site)
    if not (keep_gather or return_gather):
        return way(x_shard, w_shard, site), x_shard.new_empty(0, x_shard.shape[1])
    kept: list[Tensor] = []
    y = way(x_shard, w_shard, site, lambda x_full, own: kept.append(x_full if own else x_full.clone()))
    return y, kept[0]


def _matmul_reduce_scatter(x: Tensor, w_shard: Tensor, group: str, site: str) -> Tensor:
    return scatter_way(x, w_shard, group, site)(x, w_shard, site)


@torch.library.custom_op("flashtrain::all_gather_matmul", mutates_args=(), tags=TAGS)
def _registered_gather(
    x_shard: Tensor,
    w_shard: Tensor,
    group: str,
    site: str = "",
    rows: int | None = None,
    keep_gather: bool = False,
    return_gather: bool = True,
) -> tuple[Tensor, Tensor]:
    return _all_gather_matmul(x_shard, w_shard, group, site, rows, keep_gather, return_gather)


@torch.library.custom_op("flashtrain::matmul_reduce_scatter", mutates_args=(), tags=TAGS)
def _registered_scatter(x: Tensor, w_shard: Tensor, group: str, site: str = "") -> Tensor:
    return _matmul_reduce_scatter(x, w_shard, group, site)


def column_gradients(
    dy: Tensor, x: Tensor, w_shard: Tensor, group: str, site: str = "", gathered: bool = False
) -> tuple[Tensor, Tensor]:
    """Gradients of ``all_gather_matmul``: ``dx_shard [M/W, K] = RS(dy · w)`` and ``dw [N, K] = dyᵀ · AG(x)``.

    ``dy [M, N]``, ``w_shard [N, K]``; ``x`` is ``x_shard [M/W, K]``, or x_full where it was ``gathered``. The
    gather runs under the product for dx, its scatter under the product for dw. Raises UserError if the
    shard does not fit M, TransportError if a peer fails.
    """
    compute = _registered_column if _watched(dy, x, w_shard) else _column
    return compute(dy, x, w_shard, group, site, gathered)


def column_gradients_into(
    dw: WeightGradient,
    dy: Tensor,
    x: Tensor,
    w_shard: Tensor,
    group: str,
    site: str = "",
    gathered: bool = False,
    settled: bool = False,
) -> Tensor:
    """``column_gradients`` whose weight gradient is added to ``dw``: ``dx_shard [M/W, K]``. No operator.

    ``settled``: x was an operand of an earlier operation of ``group``, and nothing has written to it since.
    """
    multiply = partial(dw.add_product, dy.t())
    with _recorded("flashtrain::column_gradients"):
        return gradients.column(dy, x, w_shard, group, site, gathered, multiply, settled)


def _recorded(name: str) -> AbstractContextManager[object]:
    """A name in profiler traces for what goes past the dispatcher; nothing, and no time, without one."""
    return profiler.record_function(name) if profiler._is_profiler_enabled else nullcontext()


def row_gradients(
    dy_shard: Tensor, x: Tensor, w_shard: Tensor, group: str, site: str = ""
) -> tuple[Tensor, Tensor]:
    """Gradients of ``matmul_reduce_scatter``: ``dx = AG(dy_shard) · w`` and ``dw = AG(dy_shard)ᵀ · x``.

    ``dy_shard [M/W, N]``, ``x [M, K]``, ``w_shard [N, K]``; gathered once for both. Raises UserError if the
    shard does not fit M, TransportError if a peer fails.
    """
    compute = _registered_row if _watched(dy_shard, x, w_shard) else _row
    return compute(dy_shard, x, w_shard, group, site)


def _column(
    dy: Tensor, x: Tensor, w_shard: Tensor, group: str, site: str, gathered: bool
) -> tuple[Tensor, Tensor]:
    dw = w_shard.new_empty(w_shard.shape)
    multiply = partial(torch.mm, dy.t(), out=dw)
    return gradients.column(dy, x, w_shard, group, site, gathered, multiply), dw


def _row(dy_shard: Tensor, x: Tensor, w_shard: Tensor, group: str, site: str) -> tuple[Tensor, Tensor]:
    dw = torch.empty_like(w_shard)

    def multiply(dy: Tensor) -> None:
        torch.mm(dy.t(), x, out=dw)

    return gradients.row(dy_shard, x.shape[0], w_shard, group, site, multiply), dw


@torch.library.custom_op("flashtrain::column_gradients", mutates_args=(), tags=TAGS)
def _registered_column(
    dy: Tensor, x: Tensor, w_shard: Tensor, group: str, site: str = "", gathered: bool = False
) -> tuple[Tensor, Tensor]:
    return _column(dy, x, w_shard, group, site, gathered)


@torch.library.custom_op("flashtrain::row_gradients", mutates_args=(), tags=TAGS)
def _registered_row(
    dy_shard: Tensor, x: Tensor, w_shard: Tensor, group: str, site: str = ""
) -> tuple[Tensor, Tensor]:
    return _row(dy_shard, x, w_shard, group, site)


# Fakes: what torch.compile, meta tensors and opcheck see. Shapes are those of the real ops.


@_registered_gather.register_fake
def _(
    x_shard: Tensor,
    w_shard: Tensor,
    group: str,
    site: str = "",
    rows: int | None = None,
    keep_gather: bool = False,
    return_gather: bool = True,
) -> tuple[Tensor, Tensor]:
    gathered = gathered_rows(x_shard, group, rows)
    kept = gathered if keep_gather or return_gather else 0
    return x_shard.new_empty(gathered, w_shard.shape[0]), x_shard.new_empty(kept, x_shard.shape[1])


@_registered_scatter.register_fake
def _(x: Tensor, w_shard: Tensor, group: str, site: str = "") -> Tensor:
    return x.new_empty(own_rows(x, group), w_shard.shape[0])


@_registered_column.register_fake
def _(
    dy: Tensor, x: Tensor, w_shard: Tensor, group: str, site: str = "", gathered: bool = False
) -> tuple[Tensor, Tensor]:
    own = own_rows(dy, group)
    return dy.new_empty(own, w_shard.shape[1]), w_shard.new_empty(w_shard.shape)


@_registered_row.register_fake
def _(dy_shard: Tensor, x: Tensor, w_shard: Tensor, group: str, site: str = "") -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), w_shard.new_empty(w_shard.shape)


# Gradients. Each op's backward is the op of the other kind.


def _all_gather_matmul_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    x_shard, w_shard, ctx.group, ctx.site, _, ctx.keep_gather, return_gather, *main = inputs
    ctx.main = main[0] if main else None
    ctx.returns_gather = ctx.keep_gather or return_gather
    ctx.save_for_backward(output[1] if ctx.keep_gather else x_shard, w_shard)
    if ctx.main is not None:
        ctx.x_memory = StorageWeakRef(x_shard.untyped_storage())
    ctx.set_materialize_grads(False)


def _all_gather_matmul_backward(ctx, dy: Tensor | None, dx_full: Tensor | None):  # type: ignore[no-untyped-def]
    x, w_shard = ctx.saved_tensors
    wants_dx, wants_dw = ctx.needs_input_grad[:2]
    dx_shard = dw_shard = None
    if dy is not None:
        dy = dy.contiguous()
        if wants_dx and wants_dw and ctx.main is not None:
            # What was computed again, or brought back from elsewhere, lies in other memory.
            same = StorageWeakRef(x.untyped_storage()) == ctx.x_memory
            dx_shard = column_gradients_into(
                ctx.main, dy, x, w_shard, ctx.group, ctx.site, ctx.keep_gather, same
            )
        elif wants_dx and wants_dw:
            dx_shard, dw_shard = column_gradients(dy, x, w_shard, ctx.group, ctx.site, ctx.keep_gather)
        elif wants_dx:
            dx_shard = matmul_reduce_scatter(dy, w_shard.t(), ctx.group, ctx.site)
        elif wants_dw:
            x_full = x if ctx.keep_gather else all_gather(x, ctx.group, ctx.site, dy.shape[0])
            if ctx.main is None:
                dw_shard = torch.mm(dy.t(), x_full)
            else:
                ctx.main.add_product(dy.t(), x_full)
    if dx_full is not None and ctx.returns_gather and ctx.needs_input_grad[0]:
        more = reduce_scatter(dx_full.contiguous(), ctx.group, ctx.site)
        dx_shard = more if dx_shard is None else dx_shard + more
    return dx_shard, dw_shard, None, None, None, None, None, *([None] if ctx.main is not None else [])


def _matmul_reduce_scatter_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    x, w_shard, ctx.group, ctx.site, *main = inputs
    ctx.main = main[0] if main else None
    ctx.save_for_backward(x, w_shard)


def _matmul_reduce_scatter_backward(ctx, dy_shard: Tensor):  # type: ignore[no-untyped-def]
    x, w_shard = ctx.saved_tensors
    dy_shard = dy_shard.contiguous()
    if ctx.main is not None:
        main = ctx.main
        with _recorded("flashtrain::row_gradients"):
            dx = gradients.row(
                dy_shard, x.shape[0], w_shard, ctx.group, ctx.site, lambda dy: main.add_product(dy.t(), x)
            )
        return dx, None, None, None, None
    if ctx.needs_input_grad[1]:
        return *row_gradients(dy_shard, x, w_shard, ctx.group, ctx.site), None, None
    dx, _ = all_gather_matmul(dy_shard, w_shard.t(), ctx.group, ctx.site, x.shape[0], return_gather=False)
    return dx, None, None, None


_registered_gather.register_autograd(_all_gather_matmul_backward, setup_context=_all_gather_matmul_context)
_registered_scatter.register_autograd(
    _matmul_reduce_scatter_backward, setup_context=_matmul_reduce_scatter_context
)


class _GatherFunction(torch.autograd.Function):
    forward = staticmethod(_all_gather_matmul)
    setup_context = staticmethod(_all_gather_matmul_context)
    backward = staticmethod(_all_gather_matmul_backward)


class _ScatterFunction(torch.autograd.Function):
    forward = staticmethod(_matmul_reduce_scatter)
    setup_context = staticmethod(_matmul_reduce_scatter_context)
    backward = staticmethod(_matmul_reduce_scatter_backward)


class _AccumulatingGather(_GatherFunction):
    @staticmethod
    def forward(*arguments):  # type: ignore[no-untyped-def]
        *plain, _ = arguments
        return (_registered_gather if _watched(*plain[:2]) else _all_gather_matmul)(*plain)


class _AccumulatingScatter(_ScatterFunction):
    @staticmethod
    def forward(*arguments):  # type: ignore[no-untyped-def]
        *plain, _ = arguments
        return (_registered_scatter if _watched(*plain[:2]) else _matmul_reduce_scatter)(*plain)
