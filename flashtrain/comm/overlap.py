"""Run one schedule: walk its actions, with the products as callbacks between the transfers."""

from collections.abc import Callable

from torch import Tensor

from flashtrain.comm.schedule import Compute, Expect, Schedule, Send, Transfer, Wait
from flashtrain.comm.transport.base import Transport, clock


def run(
    schedule: Schedule,
    transport: Transport,
    site: str,
    *,
    payload: Callable[[Send], Tensor],
    landing: Callable[[Expect], Tensor],
    compute: Callable[[int], None],
    landed: Callable[[Expect], None] | None = None,
) -> None:
    """Execute ``schedule`` on ``transport``; returns when all has arrived and all payloads have left.

    ``payload(send)`` is the contiguous tensor to send; in a scatter it is asked for after its chunk was
    computed. ``landing(expect)`` is where an arriving chunk goes, as large as what the peer sends.
    ``compute(chunk)`` runs the chunk's product. ``landed(expect)`` is called once after each arrival, at
    the point where the schedule needs it. Raises TransportError if a peer fails.
    """
    with transport.open(schedule, site) as exchange:
        for action in schedule.actions():
            match action:
                case Transfer(step, sends, expects):
                    exchange.transfer(step, {s: payload(s) for s in sends}, {e: landing(e) for e in expects})
                case Wait(step, expect):
                    exchange.wait(step, expect)
                    if landed is not None:
                        landed(expect)
                case Compute(_, chunk):
                    begun = clock()
                    compute(chunk)
                    transport.traffic.computing += clock() - begun
