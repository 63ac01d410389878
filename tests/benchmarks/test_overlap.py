import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
SYSTEMS = {"plain", "gloo", "host", "group"}


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "overlap.py"), *arguments],
        capture_output=True,
        text=True,
        timeout=240,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, Any]]:
    out = tmp_path_factory.mktemp("benchmark") / "results"
    done = run("--device", "cpu", "--world", "2", "--quick", "--out", str(out))
    assert done.returncode == 0, done.stderr
    return done.stdout, json.loads((out / "overlap-cpu.json").read_text())


@pytest.fixture(scope="module")
def report(finished: tuple[str, dict[str, Any]]) -> dict[str, Any]:
    return finished[1]


def test_every_direction_of_a_column_and_a_row_site_is_measured(report: dict[str, Any]) -> None:
    assert [(row["name"], row["style"], row["direction"]) for row in report["rows"]] == [
        ("qkv", "column", "forward"),
        ("qkv", "column", "backward"),
        ("qkv", "column", "backward, input kept"),
        ("o", "row", "forward"),
        ("o", "row", "backward"),
    ]


def test_a_row_has_times_of_all_systems_and_what_follows_from_them(report: dict[str, Any]) -> None:
    for row in report["rows"]:
        assert set(row["ms"]) == SYSTEMS
        for times in row["ms"].values():
            assert 0 < times["min"] <= times["low"] <= times["median"] <= times["high"]
            assert times["iqr"] == pytest.approx(times["high"] - times["low"], abs=2e-5)
        middle = {name: times["median"] for name, times in row["ms"].items()}
        assert row["G"]["host"] == pytest.approx(middle["plain"] / middle["host"], abs=1e-3)
        assert row["gloo_over"]["host"] == pytest.approx(middle["gloo"] / middle["host"], abs=1e-3)
        assert row["repeats"] == 3
        assert 0 <= row["others_share"] <= 1
        assert set(row["gloo_ways"]) == {"gather", "scatter"}
        assert set(row["gloo_ways"].values()) <= set(row["collective_ms"])


def test_each_transport_sent_what_the_schedule_says(report: dict[str, Any]) -> None:
    hidden, rows, word = 32, 64, 4
    half = rows // 2 * hidden * word  # of the activations, to the one peer
    for row in report["rows"]:
        # A column site's backward gathers its input again beside scattering its gradient.
        twice = row["style"] == "column" and row["direction"] == "backward"
        for transport in ("host", "group"):
            assert row["per_call"][transport]["bytes_sent"] == half * (2 if twice else 1)


def test_numbers_come_with_machine_versions_and_date(report: dict[str, Any]) -> None:
    assert {"processor", "cores", "memory_bytes"} <= set(report["machine"])
    assert {"python", "torch", "flashtrain"} <= set(report["versions"])
    assert report["date"].endswith("+00:00")
    assert report["settings"]["world"] == 2
    assert report["settings"]["device"] == "cpu"
    assert set(report["load_average"]) == {"before", "after"}
    assert set(report["floors"]) == {"copy_gb_per_s", "product_gflop_per_s", "call_ms", "others_share"}


def test_the_verdict_is_that_of_the_rows(finished: tuple[str, dict[str, Any]]) -> None:
    printed, report = finished
    ratios = [row["gloo_over"]["host"] for row in report["rows"]]
    summary = report["summary"]
    assert summary["worst"]["gloo_over_host"] == min(ratios)
    assert len(summary["host_slower_than_gloo"]) == sum(ratio < 1 for ratio in ratios)
    assert len(summary["disturbed"]) == sum(row["others_share"] > 0.05 for row in report["rows"])
    assert f"worst gloo/host: {min(ratios):.2f} at tiny" in printed


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("--world", "1"), "--world is 1"),
        (("--repeats", "0"), "--repeats is 0"),
        (("--only", "nowhere"), "--only 'nowhere' matches no site"),
        (("--quick", "--world", "3"), "do not divide by 3 ranks"),
    ],
)
def test_settings_that_cannot_be_measured_are_refused_in_one_line(
    arguments: tuple[str, ...],
    complaint: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    assert importlib.import_module("overlap").main(list(arguments)) == 2
    error = capsys.readouterr().err
    assert complaint in error
    assert len(error.strip().splitlines()) == 1
