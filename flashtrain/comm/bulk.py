"""Collectives that run under whole products: everything leaves at once, and is waited for later.

Where a product does not depend on what travels, cutting it up gains nothing and costs waves of tiles. The
backward pass of a column-parallel product is such a place: the gather of its input hides under the product
for the input's gradient, whose reduce-scatter hides under the product for the weight's.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import Tensor

from flashtrain.comm import transport
from flashtrain.comm.chunked import Landed, product
from flashtrain.comm.schedule import Schedule
from flashtrain.comm.transport.base import Exchange, Transport
from flashtrain.comm.transport.landing import Landing
from flashtrain.kernels.ordered_sum import choice

# A gather that is under way while a scatter begins needs a transport of its own, and so do gathers whose
# landing buffers are lent.
LENT, GATHERS, SCATTERS = 2, 1, 0


@contextmanager
def gathering(
    plan: Schedule,
    x_shard: Tensor,
    group: str,
    site: str,
    out: Tensor | None = None,
    mover: Transport | None = None,
) -> Iterator[Callable[[], Tensor]]:
    """Send the own rows to everyone; the function waits for theirs and gives ``x_full [M, ...]``.

    ``plan`` is direct. The gathered rows are there until the block ends. They land in ``out``, contiguous and
    shaped as they are, where it is given and ``mover`` can. Raises TransportError if a peer fails.
    """
    x_shard = x_shard.contiguous()
    mover, own = mover or transport.of(group, x_shard.device, GATHERS), plan.own_rows
    with mover.open(plan, site) as exchange:
        if out is not None and not exchange.borrowed:
            landed = out
        else:
            landed = exchange.landing_buffer(x_shard, x_shard.shape[1:])

        def payload(chunk: int) -> Tensor:
            rows = plan.rows_in(chunk)
            return x_shard[rows.start - own.start : rows.stop - own.start]

        begun = exchange.begin(lambda send: payload(send.chunk))
        for index, step in enumerate(plan.steps):
            leaving = {send: payload(send.chunk) for send in step.sends if send not in begun}
            arriving = {} if exchange.borrowed else {e: landed[plan.rows_in(e.chunk)] for e in step.expects}
            exchange.transfer(index, leaving, arriving)
        if landed[own].data_ptr() != x_shard.data_ptr():
            landed[own] = x_shard

        def gathered() -> Tensor:
            _wait(exchange, plan)
            return landed

        yield gathered


@contextmanager
def scattering(
    plan: Schedule, partials: Tensor, group: str, site: str, scale: float = 1.0, out: Tensor | None = None
) -> Iterator[Callable[[], Tensor]]:
    """Send ``partials [M, N]`` to their owners; the function gives the sum of the own rows ``[M/W, N]``.

    ``plan`` is direct. Added in rank order in fp32, times ``scale``, to ``out`` if it is given. Raises
    TransportError if a peer fails.
    """
    mover, own, layout = transport.of(group, partials.device, SCATTERS), plan.own_rows, Landing(plan)
    with mover.open(plan, site) as exchange:
        slots = exchange.landing_buffer(partials, partials.shape[1:])
        for index, step in enumerate(plan.steps):
            leaving = {send: partials[plan.rows_in(send.chunk)] for send in step.sends}
            arriving = {e: slots[layout.span(plan.rank, e.chunk, e.slot)] for e in step.expects}
            if exchange.borrowed:
                arriving = {}
            exchange.transfer(index, leaving, arriving)
        slots = slots.view(plan.world, own.stop - own.start, *partials.shape[1:])

        def scattered() -> Tensor:
            _wait(exchange, plan)
            return choice.ordered_sum(slots, scale, own=(plan.rank, partials[own]), out=out)

        yield scattered


def _wait(exchange: Exchange, plan: Schedule) -> None:
    for index, step in enumerate(plan.steps):
        for expect in step.expects:
            exchange.wait(index, expect)


class WholeGather:
    """``y [M, N] = AG(x_shard [M/W, K]) · w [N, K]ᵀ``: everything gathered, then one product."""

    def __init__(self, plan: Schedule, group: str) -> None:
        self.plan, self.group = plan, group

    def __call__(self, x_shard: Tensor, w: Tensor, site: str, landed: Landed | None = None) -> Tensor:
        """``y [M, N]``. Raises TransportError if a peer fails."""
        y = x_shard.new_empty(self.plan.rows, w.shape[0])
        with gathering(self.plan, x_shard, self.group, site) as gathered:
            x_full = gathered()
            product(x_full, w, y)
            if landed is not None:
                landed(x_full, False)
        return y


class WholeScatter:
    """``RS(x [M, K] · w [N, K]ᵀ)``, the own rows ``[M/W, N]``: one product, then everything is sent."""

    def __init__(self, plan: Schedule, group: str) -> None:
        self.plan, self.group = plan, group

    def __call__(self, x: Tensor, w: Tensor, site: str) -> Tensor:
        """The own rows ``[M/W, N]``. Raises TransportError if a peer fails."""
        partials = x.new_empty(self.plan.rows, w.shape[0])
        product(x, w, partials)
        with scattering(self.plan, partials, self.group, site) as scattered:
            return scattered()
