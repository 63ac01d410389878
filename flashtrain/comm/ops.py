"""Overlapped products as torch.library ops: all-gather + product, product + reduce-scatter.

For W ranks of ``group`` with M rows in all (rank c holds the rows ``tensor_split`` gives it, M/W below):

    all_gather_matmul        y [M, N/W]       = AG(x_shard [M/W, K]) · w_shard [N/W, K]ᵀ
      its backward           dx_shard [M/W, K] = RS(dy · w_shard)             matmul_reduce_scatter
                             dw_shard [N/W, K] = dyᵀ · AG(x_shard)            all_gather_weight_grad
    matmul_reduce_scatter    y_shard [M/W, N] = RS(x [M, K/W] · w_shard [N, K/W]ᵀ)
      its backward           dx [M, K/W]      = AG(dy_shard) · w_shard        all_gather_matmul
                             dw_shard [N, K/W] = AG(dy_shard)ᵀ · x            the gather of dx serves twice

Partials are rounded once to the dtype of the operands, added in rank order in fp32 and rounded once
more, so in fp32, bf16 and fp16 the bits depend on nothing but shapes, dtype and W: not on the
transport, the number of sub-chunks, arrival or timing. (``Settings.kind = "ring"`` adds along the ring
in the operands' dtype.)

Every op takes the process group by name, for torch.compile; ``site`` names the product in reports and
errors. ``rows`` is M where M is not W times the local rows.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import pad

from flashtrain.comm import groups, overlap, schedule, transport
from flashtrain.comm.schedule import Expect, Schedule, split_rows
from flashtrain.comm.transport.base import Exchange, clock
from flashtrain.comm.transport.landing import Landing
from flashtrain.errors import UserError
from flashtrain.kernels.ordered_sum import choice

# A chunk's bits must not depend on how many rows share its product, but libraries choose their kernel, and
# with it the order of additions, by size: MKL below 4 rows or 12 columns, torch below 16³ multiplications
# (which decides between its own low-precision kernel and oneDNN's). Filler rows and columns keep small
# products on the large side of these borders. fp64 has more of them: only its values are promised.
_FEWEST_ROWS, _FEWEST_COLUMNS, _FEWEST_MULTIPLICATIONS = 4, 16, 16**3


def _product(x: Tensor, w: Tensor, out: Tensor) -> None:
    """``out [rows, N] = x [rows, K] · w [N, K]ᵀ``; the bits of a row do not depend on the number of rows."""
    rows, columns = x.shape[0], w.shape[0]
    wide = max(columns, _FEWEST_COLUMNS)
    tall = max(rows, _FEWEST_ROWS, _FEWEST_MULTIPLICATIONS // max(1, x.shape[1] * wide) + 1)
    if rows == 0:
        return
    if (tall, wide) == (rows, columns):
        torch.mm(x, w.t(), out=out)
        return
    x = pad(x, (0, 0, 0, tall - rows)) if tall > rows else x
    w = pad(w, (0, 0, 0, wide - columns)) if wide > columns else w
    out.copy_(torch.mm(x, w.t())[:rows, :columns])


def _rows_per_rank(shard: Tensor, group: str, rows: int | None) -> tuple[int, ...]:
    """How many rows each rank holds; raises UserError if the local shard does not fit."""
    process_group = groups.resolve(group)
    world, rank = process_group.size(), process_group.rank()
    counts = split_rows(world * shard.shape[0] if rows is None else rows, world)
    if counts[rank] != shard.shape[0]:
        raise UserError(
            f"rank {rank} of {world} holds {shard.shape[0]} rows, but its share of {rows} rows is "
            f"{counts[rank]}; shard with torch.tensor_split and pass rows="
        )
    return counts


def _check_operands(x: Tensor, w: Tensor) -> None:
    if x.dim() != 2 or w.dim() != 2 or x.shape[1] != w.shape[1]:
        raise UserError(
            f"operands {list(x.shape)} and {list(w.shape)} do not multiply: both must be matrices, "
            "[rows, K] and [columns, K]"
        )
    if x.dtype != w.dtype:
        raise UserError(f"operands have dtypes {x.dtype} and {w.dtype}; cast one to the other")


def _plan(op: str, counts: tuple[int, ...], group: str) -> Schedule:
    chosen = transport.settings()
    build = schedule.all_gather if op == "all_gather" else schedule.reduce_scatter
    return build(counts, groups.resolve(group).rank(), kind=chosen.kind, subchunks=chosen.subchunks)


def _rows(plan: Schedule, chunk: int) -> slice:
    _, offset, rows = plan.chunks[chunk]
    return slice(offset, offset + rows)


class _Gathered:
    """The gathered rows while an operation is under way: own rows in ``shard``, others where they landed."""

    def __init__(self, plan: Schedule, shard: Tensor) -> None:
        self.plan, self.shard, self.landed = plan, shard, shard

    def rows(self, rows: slice) -> Tensor:
        """``rows`` of the gathered tensor, all of one rank."""
        own = self.plan.own_rows
        if own.start <= rows.start and rows.stop <= own.stop:
            if rows == own:
                return self.shard
            return self.shard[rows.start - own.start : rows.stop - own.start]
        return self.landed[rows]


def _gather(
    plan: Schedule,
    x_shard: Tensor,
    group: str,
    site: str,
    compute: Callable[[int, _Gathered], None] | None = None,
    keep: bool = True,
) -> Tensor:
    """Gather ``x_shard``; ``compute(chunk, gathered)`` runs as soon as the chunk's rows are there.

    Returns the gathered tensor with ``keep``, one of no rows without.
    """
    mover, started = transport.of(group, x_shard.device), clock()
    x_shard = x_shard.contiguous()
    gathered = _Gathered(plan, x_shard)
    x_full = x_shard.new_empty(0, *x_shard.shape[1:])
    borrowed = False

    def opened(exchange: Exchange) -> None:
        nonlocal x_full, borrowed
        gathered.landed, borrowed = exchange.landing_buffer(x_shard, x_shard.shape[1:]), exchange.borrowed
        if keep:
            x_full = torch.empty_like(gathered.landed) if borrowed else gathered.landed

    def computing(chunk: int) -> None:
        if compute is not None:
            compute(chunk, gathered)
        if keep and (borrowed or chunk in plan.own):
            rows = _rows(plan, chunk)
            x_full[rows] = gathered.rows(rows)

    overlap.run(
        plan,
        mover,
        site,
        payload=lambda send: gathered.rows(_rows(plan, send.chunk)),
        landing=lambda expect: gathered.landed[_rows(plan, expect.chunk)],
        compute=computing,
        opened=opened,
    )
    mover.traffic.operating += clock() - started
    return x_full


def _reduce(
    plan: Schedule,
    like: Tensor,
    columns: int,
    group: str,
    site: str,
    partial: Callable[[int, Tensor], None],
    scale: float = 1.0,
) -> Tensor:
    """Sum partials over the ranks; ``partial(chunk, out)`` writes this rank's. Returns the own rows."""
    mover, started = transport.of(group, like.device), clock()
    own, layout = plan.own_rows, Landing(plan)
    direct = layout.slotted
    leaving = like.new_empty(plan.rows, columns)
    landed = total = leaving

    def opened(exchange: Exchange) -> None:
        nonlocal landed
        landed = exchange.landing_buffer(like, (columns,))

    def landing(expect: Expect) -> Tensor:
        return landed[layout.span(plan.rank, expect.chunk, expect.slot)]

    def place(chunk: int) -> Tensor:
        # Direct: the own partial takes its slot among the others. Ring: the running sum passes through.
        if direct and chunk in plan.own:
            return landed[layout.span(plan.rank, chunk, plan.rank)]
        return leaving[_rows(plan, chunk)]

    def arrived(expect: Expect) -> None:
        if not direct:
            place(expect.chunk).add_(landing(expect))

    def finished() -> None:
        nonlocal total
        slots = landed if direct else leaving[own]
        total = choice.ordered_sum(
            slots.view(plan.world if direct else 1, own.stop - own.start, columns), scale
        )

    overlap.run(
        plan,
        mover,
        site,
        payload=lambda send: place(send.chunk),
        landing=landing,
        compute=lambda chunk: partial(chunk, place(chunk)),
        landed=arrived,
        opened=opened,
        finished=finished,
    )
    mover.traffic.operating += clock() - started
    return total


_TAGS = (torch.Tag.needs_fixed_stride_order,)


@torch.library.custom_op("flashtrain::all_gather", mutates_args=(), tags=_TAGS)
def all_gather(x_shard: Tensor, group: str, site: str = "", rows: int | None = None) -> Tensor:
    """Gather row shards: ``x_shard [M/W, ...]`` -> ``x_full [M, ...]``, equal bits on every rank.

    Backward is reduce-scatter: right where each rank consumes the result differently (its own columns,
    its own heads). A consumer that does the same on every rank would count its gradient W times.
    Raises UserError if the shard does not fit ``rows``, TransportError if a peer fails.
    """
    plan = _plan("all_gather", _rows_per_rank(x_shard, group, rows), group)
    return _gather(plan, x_shard, group, site)


@torch.library.custom_op("flashtrain::reduce_scatter", mutates_args=(), tags=_TAGS)
def reduce_scatter(x: Tensor, group: str, site: str = "", scale: float = 1.0) -> Tensor:
    """Sum over ranks and keep the own rows: ``x [M, ...]`` -> ``x_shard [M/W, ...]``.

    The fp32 sum is multiplied by ``scale`` before it is rounded (1/W makes a mean). Backward is
    all-gather. Raises TransportError if a peer fails.
    """
    world = groups.resolve(group).size()
    plan = _plan("reduce_scatter", split_rows(x.shape[0], world), group)
    flat = x.reshape(x.shape[0], -1) if x.numel() else x.new_empty(x.shape[0], x[:1].numel())

    def partial(chunk: int, out: Tensor) -> None:
        out.copy_(flat[_rows(plan, chunk)])

    own = _reduce(plan, flat, flat.shape[1], group, site, partial, scale)
    return own.reshape(own.shape[0], *x.shape[1:])


@torch.library.custom_op("flashtrain::all_gather_matmul", mutates_args=(), tags=_TAGS)
def all_gather_matmul(
    x_shard: Tensor,
    w_shard: Tensor,
    group: str,
    site: str = "",
    rows: int | None = None,
    keep_gather: bool = False,
    return_gather: bool = True,
) -> tuple[Tensor, Tensor]:
    """``y [M, N/W] = AG(x_shard [M/W, K]) · w_shard [N/W, K]ᵀ``; returns ``(y, x_full [M, K])``.

    The own chunk is multiplied first, the others as they arrive. The weight gradient gathers
    ``x_shard`` again, or with ``keep_gather`` keeps ``x_full``. Without ``return_gather`` x_full is
    ``[0, K]``, unless it is kept; a transport that lends its memory then saves a copy. Raises UserError for
    operands that do not multiply or a shard that does not fit ``rows``, TransportError if a peer fails.
    """
    _check_operands(x_shard, w_shard)
    plan = _plan("all_gather", _rows_per_rank(x_shard, group, rows), group)
    y = x_shard.new_empty(plan.rows, w_shard.shape[0])

    def compute(chunk: int, gathered: _Gathered) -> None:
        _product(gathered.rows(_rows(plan, chunk)), w_shard, y[_rows(plan, chunk)])

    return y, _gather(plan, x_shard, group, site, compute, keep=keep_gather or return_gather)


@torch.library.custom_op("flashtrain::all_gather_weight_grad", mutates_args=(), tags=_TAGS)
def all_gather_weight_grad(x_shard: Tensor, dy: Tensor, group: str, site: str = "") -> Tensor:
    """``dw [N, K] = dy [M, N]ᵀ · AG(x_shard [M/W, K])``, added chunk by chunk, the own chunk first.

    Products of one rank's rows are added in fp32 in schedule order (r, r+1, ...), whatever the number of
    sub-chunks. Raises UserError if the shard does not fit M, TransportError if a peer fails.
    """
    plan = _plan("all_gather", _rows_per_rank(x_shard, group, dy.shape[0]), group)
    wide = torch.promote_types(x_shard.dtype, torch.float32)
    dw = torch.zeros(dy.shape[1], x_shard.shape[1], dtype=wide, device=dy.device)

    def compute(chunk: int, gathered: _Gathered) -> None:
        owner = plan.chunks[chunk].owner
        if chunk == (owner + 1) * plan.subchunks - 1:
            rows = plan.rows_of(owner)
            if dw.dtype == dy.dtype:
                dw.addmm_(dy[rows].t(), gathered.rows(rows))
            else:
                dw.add_(torch.mm(dy[rows].t(), gathered.rows(rows)))

    _gather(plan, x_shard, group, site, compute, keep=False)
    return dw.to(x_shard.dtype)


@torch.library.custom_op("flashtrain::matmul_reduce_scatter", mutates_args=(), tags=_TAGS)
def matmul_reduce_scatter(x: Tensor, w_shard: Tensor, group: str, site: str = "") -> Tensor:
    """``y_shard [M/W, N] = RS(x [M, K/W] · w_shard [N, K/W]ᵀ)``.

    The partial of each other rank's rows is sent as soon as it is computed; the own rows come last.
    Raises UserError for operands that do not multiply, TransportError if a peer fails.
    """
    _check_operands(x, w_shard)
    world = groups.resolve(group).size()
    plan = _plan("reduce_scatter", split_rows(x.shape[0], world), group)

    def partial(chunk: int, out: Tensor) -> None:
        _product(x[_rows(plan, chunk)], w_shard, out)

    return _reduce(plan, x, w_shard.shape[0], group, site, partial)


# Fakes: what torch.compile, meta tensors and opcheck see. Shapes are those of the real ops.


@all_gather.register_fake
def _(x_shard: Tensor, group: str, site: str = "", rows: int | None = None) -> Tensor:
    return x_shard.new_empty(_gathered_rows(x_shard, group, rows), *x_shard.shape[1:])


@reduce_scatter.register_fake
def _(x: Tensor, group: str, site: str = "", scale: float = 1.0) -> Tensor:
    return x.new_empty(_own_rows(x, group), *x.shape[1:])


@all_gather_matmul.register_fake
def _(
    x_shard: Tensor,
    w_shard: Tensor,
    group: str,
    site: str = "",
    rows: int | None = None,
    keep_gather: bool = False,
    return_gather: bool = True,
) -> tuple[Tensor, Tensor]:
    gathered = _gathered_rows(x_shard, group, rows)
    kept = gathered if keep_gather or return_gather else 0
    return x_shard.new_empty(gathered, w_shard.shape[0]), x_shard.new_empty(kept, x_shard.shape[1])


@all_gather_weight_grad.register_fake
def _(x_shard: Tensor, dy: Tensor, group: str, site: str = "") -> Tensor:
    return x_shard.new_empty(dy.shape[1], x_shard.shape[1])


@matmul_reduce_scatter.register_fake
def _(x: Tensor, w_shard: Tensor, group: str, site: str = "") -> Tensor:
    return x.new_empty(_own_rows(x, group), w_shard.shape[0])


def _gathered_rows(x_shard: Tensor, group: str, rows: int | None) -> int:
    return x_shard.shape[0] * groups.resolve(group).size() if rows is None else rows


def _own_rows(x: Tensor, group: str) -> int:
    process_group = groups.resolve(group)
    world, rank = process_group.size(), process_group.rank()
    return (x.shape[0] + world - 1 - rank) // world  # torch.tensor_split: the first M mod W get one more


# Gradients. Each op's backward is the op of the other kind.


def _all_gather_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    _, ctx.group, ctx.site, _ = inputs


def _all_gather_backward(ctx, grad: Tensor):  # type: ignore[no-untyped-def]
    return reduce_scatter(grad.contiguous(), ctx.group, ctx.site), None, None, None


def _reduce_scatter_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    x, ctx.group, ctx.site, ctx.scale = inputs
    ctx.rows = x.shape[0]


def _reduce_scatter_backward(ctx, grad: Tensor):  # type: ignore[no-untyped-def]
    dx = all_gather(grad.contiguous(), ctx.group, ctx.site, ctx.rows)
    return dx * ctx.scale if ctx.scale != 1.0 else dx, None, None, None


def _all_gather_matmul_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    x_shard, w_shard, ctx.group, ctx.site, _, ctx.keep_gather, return_gather = inputs
    ctx.returns_gather = ctx.keep_gather or return_gather
    ctx.save_for_backward(output[1] if ctx.keep_gather else x_shard, w_shard)
    ctx.set_materialize_grads(False)


def _all_gather_matmul_backward(ctx, dy: Tensor | None, dx_full: Tensor | None):  # type: ignore[no-untyped-def]
    x, w_shard = ctx.saved_tensors
    dx_shard = dw_shard = None
    if dy is not None:
        dy = dy.contiguous()
        if ctx.needs_input_grad[0]:
            dx_shard = matmul_reduce_scatter(dy, w_shard.t(), ctx.group, ctx.site)
        if ctx.needs_input_grad[1] and ctx.keep_gather:
            dw_shard = torch.mm(dy.t(), x)
        elif ctx.needs_input_grad[1]:
            dw_shard = all_gather_weight_grad(x, dy, ctx.group, ctx.site)
    if dx_full is not None and ctx.returns_gather and ctx.needs_input_grad[0]:
        more = reduce_scatter(dx_full.contiguous(), ctx.group, ctx.site)
        dx_shard = more if dx_shard is None else dx_shard + more
    return dx_shard, dw_shard, None, None, None, None, None


def _matmul_reduce_scatter_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    x, w_shard, ctx.group, ctx.site = inputs
    ctx.save_for_backward(x, w_shard)


def _matmul_reduce_scatter_backward(ctx, dy_shard: Tensor):  # type: ignore[no-untyped-def]
    x, w_shard = ctx.saved_tensors
    wanted = ctx.needs_input_grad[1]
    dx, dy = all_gather_matmul(
        dy_shard.contiguous(), w_shard.t(), ctx.group, ctx.site, x.shape[0], return_gather=wanted
    )
    dw_shard = torch.mm(dy.t(), x) if wanted else None
    return dx, dw_shard, None, None


all_gather.register_autograd(_all_gather_backward, setup_context=_all_gather_context)
reduce_scatter.register_autograd(_reduce_scatter_backward, setup_context=_reduce_scatter_context)
all_gather_matmul.register_autograd(_all_gather_matmul_backward, setup_context=_all_gather_matmul_context)
matmul_reduce_scatter.register_autograd(
    _matmul_reduce_scatter_backward, setup_context=_matmul_reduce_scatter_context
)


def all_reduce(x: Tensor, group: str, site: str = "", scale: float = 1.0) -> Tensor:
    """Sum ``x`` over the ranks in rank order, times ``scale``: reduce-scatter, then all-gather.

    ``x [...]`` of any shape -> the same shape, equal bits on every rank. Not differentiable. Raises
    TransportError if a peer fails.
    """
    flat = x.detach().reshape(-1)
    return all_gather(reduce_scatter(flat, group, site, scale), group, site, flat.shape[0]).reshape(x.shape)
