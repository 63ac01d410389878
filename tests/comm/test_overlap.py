"""The executor: what it asks of a transport and of its callbacks, and in which order."""

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

from flashtrain.comm import overlap, schedule
from flashtrain.comm.schedule import Compute, Expect, Schedule, Send, Transfer, Wait
from flashtrain.comm.transport.base import Exchange, Transport
from flashtrain.errors import TransportError

FAMILIES = [
    (schedule.all_gather, "direct"),
    (schedule.all_gather, "ring"),
    (schedule.reduce_scatter, "direct"),
    (schedule.reduce_scatter, "ring"),
    (schedule.all_to_all, "direct"),
]


class Recorder(Transport):
    """Moves nothing and writes down what happens, in the order in which it happens."""

    name = "recorder"

    def __init__(self, fails_at: int | None = None) -> None:
        super().__init__(0, 4, 1.0)
        self.events: list[object] = []
        self.fails_at = fails_at

    def open(self, plan: Schedule, site: str) -> Exchange:
        self.events.append(("open", site))
        return _Recorded(self, plan, site)

    def shutdown(self) -> None: ...


class _Recorded(Exchange):
    transport: Recorder

    def _transfer(self, step: int, sends: Mapping[Send, Tensor], expects: Mapping[Expect, Tensor]) -> None:
        self.transport.events.append(Transfer(step, tuple(sends), tuple(expects)))
        assert all(payload.is_contiguous() for payload in (*sends.values(), *expects.values()))

    def _wait(self, step: int, expect: Expect) -> float:
        if step == self.transport.fails_at:
            raise TransportError(self.describe(step, expect.chunk, expect.src))
        self.transport.events.append(Wait(step, expect))
        return 0.0

    def _close(self) -> None:
        self.transport.events.append("close")

    def _abort(self) -> None:
        self.transport.events.append("abort")


def run(recorder: Recorder, plan: Schedule, fails_in: int | None = None) -> None:
    step = -1

    def compute(chunk: int) -> None:
        nonlocal step
        step += 1
        if chunk == fails_in:
            raise ZeroDivisionError
        recorder.events.append(Compute(step, chunk))

    def tensor(part: Send | Expect) -> Tensor:
        recorder.events.append(("asked", part))
        return torch.empty(plan.chunks[part.chunk].rows, 2)

    overlap.run(
        plan,
        recorder,
        "layers.3.mlp.down",
        payload=tensor,
        landing=tensor,
        compute=compute,
        landed=lambda expect: recorder.events.append(("landed", expect)),
    )


@pytest.mark.parametrize(("build", "kind"), FAMILIES)
@pytest.mark.parametrize("subchunks", [1, 3])
def test_it_walks_the_actions_of_the_schedule_and_nothing_else(build, kind: str, subchunks: int) -> None:  # type: ignore[no-untyped-def]
    for rank in range(4):
        plan, recorder = build([3, 2, 0, 2], rank, kind=kind, subchunks=subchunks), Recorder()
        run(recorder, plan)
        assert recorder.events[0] == ("open", "layers.3.mlp.down")
        assert recorder.events[-1] == "close"
        walked = [event for event in recorder.events if isinstance(event, Wait | Compute | Transfer)]
        assert walked == list(plan.actions())


@pytest.mark.parametrize(("build", "kind"), FAMILIES)
def test_callbacks_come_at_the_points_that_the_schedule_needs(build, kind: str) -> None:  # type: ignore[no-untyped-def]
    plan, recorder = build([2, 2, 2, 2], 1, kind=kind, subchunks=2), Recorder()
    run(recorder, plan)
    events = recorder.events
    computed = {event.chunk: at for at, event in enumerate(events) if isinstance(event, Compute)}
    landed = [event[1] for event in events if isinstance(event, tuple) and event[0] == "landed"]
    expected = [expect for step in plan.steps for expect in step.expects]
    assert sorted(landed) == sorted(expected)
    for at, event in enumerate(events):
        if isinstance(event, Wait):
            assert events[at + 1] == ("landed", event.expect)
            # A gather multiplies what arrived, a scatter adds it to what it has computed.
            assert (at < computed[event.expect.chunk]) == plan.gathers
        if event[:1] == ("asked",) and isinstance(event[1], Send) and not plan.gathers:
            assert at > computed[event[1].chunk], "a payload was asked for before its product"


def test_a_failing_product_gives_the_exchange_up_without_waiting_for_the_peers() -> None:
    recorder = Recorder()
    with pytest.raises(ZeroDivisionError):
        run(recorder, schedule.reduce_scatter([2] * 4, 0), fails_in=2)
    assert recorder.events[-1] == "abort"
    assert "close" not in recorder.events


def test_a_failing_peer_ends_the_operation_with_its_place() -> None:
    recorder = Recorder(fails_at=3)
    place = r"rank 0: layers\.3\.mlp\.down: all_gather step 3 of 4, chunk 3, peer rank 3"
    with pytest.raises(TransportError, match=place):
        run(recorder, schedule.all_gather([2] * 4, 0))
    assert recorder.events[-1] == "abort"


def test_traffic_counts_bytes_products_and_waiting() -> None:
    recorder = Recorder()
    run(recorder, schedule.all_gather([2] * 4, 0))
    assert recorder.traffic.bytes_sent == 3 * 2 * 2 * 4
    assert recorder.traffic.computing > 0
    assert recorder.traffic.exposed > 0
    recorder.traffic.reset()
    assert vars(recorder.traffic) == dict.fromkeys(vars(recorder.traffic), 0)
    assert recorder.traffic.hidden is None
