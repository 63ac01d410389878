import json
import math
from pathlib import Path

import pytest

from flashtrain.errors import UserError
from flashtrain.metrics import history
from flashtrain.metrics.events import Event, record


def line(step: int, **values: object) -> str:
    return json.dumps({"step": step, "loss": 2.0, **values}) + "\n"


def test_known_numbers_become_curves(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text(
        line(1, mfu=None, overlap=0.5) + line(2, loss="nan", overlap=0.75, later_field=7)
    )
    (tmp_path / "evaluations.jsonl").write_text(line(2, loss=1.5))
    run = history.read(tmp_path)
    assert run.curve("loss")[1] == 2.0
    assert math.isnan(run.curve("loss")[2])
    assert run.curve("overlap") == {1: 0.5, 2: 0.75}
    assert run.curve("mfu") == {}
    assert run.curve("later_field") == {2: 7.0}
    assert run.held_out == {2: 1.5}
    assert (run.damaged, run.ending, run.attempts, run.machine) == ({}, None, 0, {})


@pytest.mark.parametrize(
    "damage", ["\n", "[1]\n", '{"loss": 1}\n', '{"step": 3}\n', "\0\0\0\n", '{"step": 3, "lo']
)
def test_damaged_lines_are_counted_and_the_rest_is_kept(tmp_path: Path, damage: str) -> None:
    (tmp_path / "metrics.jsonl").write_text(line(1) + damage)
    record(tmp_path, Event("start", 1))
    with (tmp_path / "events.jsonl").open("a") as file:
        file.write(damage)
    (tmp_path / "telemetry-rank3.jsonl").write_text(damage)
    run = history.read(tmp_path)
    assert run.curve("loss") == {1: 2.0}
    assert [event.kind for event in run.events] == ["start"]
    assert run.telemetry == {3: []}
    assert run.damaged == {"metrics.jsonl": 1, "events.jsonl": 1, "telemetry-rank3.jsonl": 1}


def test_other_files_may_be_damaged_or_missing(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text("")
    run = history.read(tmp_path)
    assert (run.curve("loss"), run.config, run.sites, run.summary, run.damaged) == ({}, {}, [], {}, {})
    (tmp_path / "config.toml").write_text("steps = = 3")
    (tmp_path / "sites.json").write_text("{}")
    (tmp_path / "summary.json").write_text("{")
    run = history.read(tmp_path)
    assert (run.config, run.config_text, run.sites, run.summary) == ({}, "steps = = 3", [], {})
    assert run.damaged == {"config.toml": 1, "sites.json": 1, "summary.json": 1}


def test_the_last_attempt_says_where_and_how_it_ended(tmp_path: Path) -> None:
    for event in (
        Event("start", 1, {"machine": {"host": "a"}}),
        Event("failure", 4, {"reason": "lost rank 1"}),
        Event("resume", 3, {"machine": {"host": "b"}}),
    ):
        record(tmp_path, event)
    run = history.read(tmp_path)
    assert (run.machine, run.attempts, run.ending) == ({"host": "b"}, 2, None)
    record(tmp_path, Event("end", 9))
    ending = history.read(tmp_path).ending
    assert ending is not None
    assert ending.kind == "end"


def test_a_folder_without_a_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"there is no run in .*: it holds no metrics\.jsonl"):
        history.read(tmp_path / "nowhere")
