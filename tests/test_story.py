"""The whole way of docs/story.md: text, tokens, a run that is killed and goes on, transformers, a report."""

import json
import re
from pathlib import Path

import pytest

from tests import guides
from tests.launch.pages import Page
from tests.train import runs


def test_text_to_tokens_to_a_killed_and_resumed_run_to_transformers_to_a_report(tmp_path: Path) -> None:
    printed = guides.Reader(tmp_path).follow(guides.DOCS / "story.md")
    assert "rank 2 was killed by SIGKILL; the other ranks were stopped" in printed
    assert "ended with exit code 1" in printed

    out = tmp_path / "runs/story"
    events = [json.loads(line) for line in (out / "events.jsonl").read_text().splitlines()]
    told = [(event["event"], event["step"]) for event in events if event["event"] != "checkpoint"]
    assert told == [("start", 1), ("fault", 13), ("failure", 13), ("resume", 9), ("end", 24)]
    metrics = runs.metrics(out)
    assert [one["step"] for one in metrics] == list(range(1, 25))
    assert metrics[-1]["loss"] < metrics[0]["loss"] - 0.5

    difference = re.search(r"largest difference: (\S+)", printed)
    assert difference is not None
    assert float(difference[1]) <= 1e-5
    training = Page((out / "report.html").read_text()).data["charts"]["loss"][0]["points"]
    assert training == [[one["step"], pytest.approx(one["loss"], rel=1e-5)] for one in metrics]
