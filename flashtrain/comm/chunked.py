"""A schedule with a product a chunk between its transfers (tier T0), for any transport, device and dtype."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import pad

from flashtrain.comm import overlap, transport
from flashtrain.comm.schedule import Expect, Schedule
from flashtrain.comm.transport.base import Exchange, clock
from flashtrain.comm.transport.landing import Landing
from flashtrain.kernels.ordered_sum import choice

# Takes the gathered rows ``[M, K]``, and whether they may be kept; else they are gone when it returns, and
# what reads them must be on the stream by then.
Landed = Callable[[Tensor, bool], None]

# A chunk's bits must not depend on how many rows share its product, but libraries choose their kernel, and
# with it the order of additions, by size: MKL below 4 rows or 12 columns, torch below 16³ multiplications
# (which decides between its own low-precision kernel and oneDNN's). Filler rows and columns keep small
# products on the large side of these borders. fp64 has more of them: only its values are promised.
_FEWEST_ROWS, _FEWEST_COLUMNS, _FEWEST_MULTIPLICATIONS = 4, 16, 16**3


def product(x: Tensor, w: Tensor, out: Tensor) -> None:
    """``out [rows, N] = x [rows, K] · w [N, K]ᵀ``; the bits of a row do not depend on the number of rows."""
    rows, columns = x.shape[0], w.shape[0]
    if rows == 0:
        return
    tall, wide = _filled(rows, columns, x.shape[1])
    if (tall, wide) == (rows, columns):
        torch.mm(x, w.t(), out=out)
        return
    x = pad(x, (0, 0, 0, tall - rows)) if tall > rows else x
    w = pad(w, (0, 0, 0, wide - columns)) if wide > columns else w
    out.copy_(torch.mm(x, w.t())[:rows, :columns])


def plain(rows: int, columns: int, inner: int) -> bool:
    """Whether a ``product`` of this size is ``torch.mm``, without filler."""
    return rows > 0 and _filled(rows, columns, inner) == (rows, columns)


def _filled(rows: int, columns: int, inner: int) -> tuple[int, int]:
    wide = max(columns, _FEWEST_COLUMNS)
    return max(rows, _FEWEST_ROWS, _FEWEST_MULTIPLICATIONS // max(1, inner * wide) + 1), wide


class Gathered:
    """The gathered rows while an operation is under way: own rows in ``shard``, others where they landed."""

    def __init__(self, plan: Schedule, shard: Tensor) -> None:
        self.plan, self.shard, self.landed = plan, shard, shard

    def rows(self, rows: slice) -> Tensor:
        """``rows`` of the gathered tensor, all of one rank: ``[rows, ...]``."""
        own = self.plan.own_rows
        if own.start <= rows.start and rows.stop <= own.stop:
            if rows == own:
                return self.shard
            return self.shard[rows.start - own.start : rows.stop - own.start]
        return self.landed[rows]


def gather(
    plan: Schedule,
    x_shard: Tensor,
    group: str,
    site: str,
    compute: Callable[[int, Gathered], None] | None = None,
    keep: bool = True,
    out: Tensor | None = None,
) -> Tensor:
    """Gather ``x_shard [M/W, ...]``; ``compute(chunk, gathered)`` runs as soon as the chunk's rows are there.

    Returns the gathered tensor ``[M, ...]`` with ``keep``, one of no rows without: ``out`` if it is given,
    contiguous and of its shape. Raises TransportError if a peer fails.
    """
    mover, started = transport.of(group, x_shard.device), clock()
    x_shard = x_shard.contiguous()
    gathered = Gathered(plan, x_shard)
    x_full = x_shard.new_empty(0, *x_shard.shape[1:])
    borrowed = False

    def opened(exchange: Exchange) -> None:
        nonlocal x_full, borrowed
        borrowed = exchange.borrowed
        if out is None or borrowed:
            gathered.landed = exchange.landing_buffer(x_shard, x_shard.shape[1:])
        else:
            gathered.landed = out
        if keep:
            x_full = gathered.landed
            if borrowed:
                x_full = torch.empty_like(x_full) if out is None else out

    def computing(chunk: int) -> None:
        if compute is not None:
            compute(chunk, gathered)
        if keep and (borrowed or chunk in plan.own):
            rows = plan.rows_in(chunk)
            x_full[rows] = gathered.rows(rows)

    overlap.run(
        plan,
        mover,
        site,
        payload=lambda send: gathered.rows(plan.rows_in(send.chunk)),
        landing=lambda expect: gathered.landed[plan.rows_in(expect.chunk)],
        compute=computing,
        opened=opened,
    )
    mover.traffic.operating += clock() - started
    return x_full


def reduce(
    plan: Schedule,
    like: Tensor,
    columns: int,
    group: str,
    site: str,
    partial: Callable[[int, Tensor], None],
    scale: float = 1.0,
    out: Tensor | None = None,
) -> Tensor:
    """Sum partials over the ranks; ``partial(chunk, out)`` writes this rank's ``[rows, columns]``.

    Returns the own rows ``[M/W, columns]``, in ``out`` if it is given, contiguous. Raises TransportError if a
    peer fails.
    """
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
        return leaving[plan.rows_in(chunk)]

    def arrived(expect: Expect) -> None:
        if not direct:
            place(expect.chunk).add_(landing(expect))

    def finished() -> None:
        nonlocal total
        slots = landed if direct else leaving[own]
        slots = slots.view(plan.world if direct else 1, own.stop - own.start, columns)
        total = choice.ordered_sum(slots, scale, out=out)

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


class ChunkedGather:
    """``y [M, N] = AG(x_shard [M/W, K]) · w [N, K]ᵀ``, a product a chunk."""

    def __init__(self, plan: Schedule, group: str) -> None:
        self.plan, self.group = plan, group

    def __call__(self, x_shard: Tensor, w: Tensor, site: str, landed: Landed | None = None) -> Tensor:
        """``y [M, N]``. Raises TransportError if a peer fails."""
        y = x_shard.new_empty(self.plan.rows, w.shape[0])

        def compute(chunk: int, gathered: Gathered) -> None:
            rows = self.plan.rows_in(chunk)
            product(gathered.rows(rows), w, y[rows])

        keep = landed is not None
        x_full = gather(self.plan, x_shard, self.group, site, compute, keep=keep)
        if landed is not None:
            landed(x_full, True)
        return y


class ChunkedScatter:
    """``RS(x [M, K] · w [N, K]ᵀ)``, the own rows ``[M/W, N]``, a product a chunk."""

    def __init__(self, plan: Schedule, group: str) -> None:
        self.plan, self.group = plan, group

    def __call__(self, x: Tensor, w: Tensor, site: str) -> Tensor:
        """The own rows ``[M/W, N]``. Raises TransportError if a peer fails."""

        def partial(chunk: int, out: Tensor) -> None:
            product(x[self.plan.rows_in(chunk)], w, out)

        return reduce(self.plan, x, w.shape[0], self.group, site, partial)
