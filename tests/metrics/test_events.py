import json
from pathlib import Path

import pytest

from flashtrain.metrics.events import EVENTS, Event, record, superseded


def events_of(out: Path) -> list[Event]:
    return [Event.from_json(line) for line in (out / EVENTS).read_text().splitlines()]


def test_an_event_is_one_flat_line_that_reads_back() -> None:
    event = Event("skipped_step", 12, {"reason": "gradient norm", "norm": float("inf"), "ranks": [0, 1]}, 5.5)
    assert json.loads(event.as_json()) == {
        "event": "skipped_step", "step": 12, "time": 5.5,
        "reason": "gradient norm", "norm": "inf", "ranks": [0, 1],
    }  # fmt: skip
    again = Event.from_json(event.as_json())
    assert (again.kind, again.step, again.time) == ("skipped_step", 12, 5.5)
    assert again.as_json() == event.as_json()
    assert event.describe().startswith("step 12: skipped_step  reason: gradient norm")


@pytest.mark.parametrize(
    "line", ["", "[]", "{", '{"step": 1, "time": 2}', '{"event": "x", "step": "1", "time": 2}',
             '{"event": "x", "step": 1}', '{"event": "x", "step": true, "time": 1}']
)  # fmt: skip
def test_other_lines_are_refused(line: str) -> None:
    with pytest.raises(ValueError, match=r"not an event|Expecting"):
        Event.from_json(line)


def test_detail_must_not_hide_what_every_event_has() -> None:
    with pytest.raises(ValueError, match="event x: detail must not hold step"):
        Event("x", 1, {"step": 2})


def test_a_line_after_a_torn_one_stands_alone(tmp_path: Path) -> None:
    record(tmp_path, Event("start", 1))
    with (tmp_path / EVENTS).open("a") as file:
        file.write('{"event": "che')
    record(tmp_path, Event("resume", 1))
    lines = (tmp_path / EVENTS).read_text().splitlines()
    assert [line[:16] for line in lines] == ['{"event": "start', '{"event": "che', '{"event": "resum']
    assert Event.from_json(lines[2]).kind == "resume"


def test_what_a_resume_did_again_is_superseded() -> None:
    kinds = [("start", 1), ("checkpoint", 4), ("skipped_step", 5), ("failure", 7), ("resume", 5),
             ("skipped_step", 5), ("checkpoint", 8), ("end", 8)]  # fmt: skip
    again = superseded(Event(kind, step) for kind, step in kinds)
    assert again == [False, False, True, False, False, False, False, False]
