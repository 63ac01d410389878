"""Run one schedule: walk its actions, with the products as callbacks between the transfers."""

from collections.abc import Callable

from torch import Tensor

from flashtrain.comm.schedule import Compute, Expect, Schedule, Send, Transfer, Wait
from flashtrain.comm.transport.base import Exchange, Transport, clock


def run(
    schedule: Schedule,
    transport: Transport,
    site: str,
    *,
    payload: Callable[[Send], Tensor],
    landing: Callable[[Expect], Tensor],
    compute: Callable[[int], None],
    landed: Callable[[Expect], None] | None = None,
    opened: Callable[[Exchange], None] | None = None,
    finished: Callable[[], None] | None = None,
) -> None:
    """Execute ``schedule`` on ``transport``; returns when all has arrived and all payloads have left.

    ``payload(send) [rows, ...]`` is the contiguous tensor to send, with the rows of its chunk; in a scatter
    it is asked for after its chunk was computed. ``landing(expect)`` is where an arriving chunk goes, as
    large as what the peer sends. ``compute(chunk)`` runs the chunk's product. ``landed(expect)`` is called
    once after each arrival, at the point where the schedule needs it. ``opened(exchange)`` is called first,
    the time to ask for its landing buffer, and ``finished()`` when all has arrived, the last time to read
    that. An exchange that takes arrivals into its landing buffer (``borrowed``) is not given any other
    ``landing``. Raises TransportError if a peer fails.
    """
    with transport.open(schedule, site) as exchange:
        if opened is not None:
            opened(exchange)
        begun = exchange.begin(payload)
        for action in schedule.actions():
            match action:
                case Transfer(step, sends, expects):
                    leaving = {send: payload(send) for send in sends if send not in begun}
                    arriving = {} if exchange.borrowed else {expect: landing(expect) for expect in expects}
                    if leaving or not exchange.borrowed:
                        exchange.transfer(step, leaving, arriving)
                case Wait(step, expect):
                    exchange.wait(step, expect)
                    if landed is not None:
                        landed(expect)
                case Compute(_, chunk):
                    computing = clock()
                    compute(chunk)
                    transport.traffic.computing += clock() - computing
        if finished is not None:
            finished()
