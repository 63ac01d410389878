"""What a finished run leaves beside its curves."""

import json
from pathlib import Path

import pytest

from flashtrain.train.summary import Summary
from tests.train.records import METRICS


def test_a_finished_run_that_is_started_again_keeps_its_figures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Summary, "_sample", lambda self: "")
    for measured in ([METRICS] * 3, []):
        Summary(tmp_path, tmp_path, 1.5, 3.0, measured).show()
        figures = json.loads((tmp_path / "summary.json").read_text())
        assert figures["steps"] == 3
        assert figures["tokens_per_s"] == METRICS.tokens_per_s
