"""The benchmark of the GPUs, rehearsed on the CPU, and what it does when a run goes wrong."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from flashtrain.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
REPORT = "overlap-rehearsal-w2.json"


def run(
    *arguments: str, script: Path = ROOT / "benchmarks" / "overlap.py"
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(script), *arguments],
        capture_output=True,
        text=True,
        timeout=240,
        env=os.environ | {"PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "benchmarks")))},
    )


def rehearse(out: Path, *arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    return run("--device", "cuda", "--rehearse", "--out", str(out), *arguments, **options)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, Any]]:
    out = tmp_path_factory.mktemp("benchmark")
    done = rehearse(out, "--sites", "qkv", "o")
    assert done.returncode == 0, done.stderr
    return done.stdout, json.loads((out / REPORT).read_text())


@pytest.fixture(scope="module")
def parts(finished: tuple[str, dict[str, Any]]) -> dict[str, Any]:
    return finished[1]["parts"]


def test_every_system_that_runs_here_is_timed_in_both_modes(parts: dict[str, Any]) -> None:
    rows = parts["forward"]["rows"]
    assert [(row["name"], row["style"]) for row in rows] == [("qkv", "column"), ("o", "row")]
    for row in rows:
        systems = {"gemm", "collective", "nccl", "ours"} | (
            {"ours, x_full"} if row["name"] == "qkv" else set()
        )
        for mode in ("launch_free", "host_issued"):
            assert set(row["ms"][mode]) == systems
            for times in row["ms"][mode].values():
                assert 0 < times["min"] <= times["low"] <= times["median"] <= times["high"]
            middle = {name: times["median"] for name, times in row["ms"][mode].items()}
            judged = row["judged"][mode]
            assert judged["G"]["ours"] == pytest.approx(middle["gemm"] / middle["ours"], abs=1e-3)
            assert judged["over"]["nccl"] == pytest.approx(middle["nccl"] / middle["ours"], abs=1e-3)
            # The link's rate is that of GPUs: here the product alone is the bound.
            assert judged["bound"] == pytest.approx(middle["gemm"], abs=1e-3)


def test_errors_are_those_of_rounding_to_bf16_and_of_partials(parts: dict[str, Any]) -> None:
    gathered, scattered = (row["error"] for row in parts["forward"]["rows"])
    assert gathered["ours"] == pytest.approx(gathered["nccl"])
    assert 0.0010 < gathered["ours"] < 0.0020 < scattered["ours"] < 0.0035
    assert scattered["ours"] <= scattered["nccl"] * 1.01


def test_a_peer_that_cannot_run_is_absent_with_its_reason(parts: dict[str, Any]) -> None:
    for part in ("forward", "host"):
        for row in parts[part]["rows"]:
            assert row["absent"]["torch"].startswith("rank 0: NotImplementedError")
    assert "no CUDA graphs" in parts["graph"]["absent"]["gemm"]
    assert parts["graph"]["left_out"] == ["tiny qkv 64", "tiny o 64"]


def test_gradients_and_host_times_stand_beside_the_baseline(parts: dict[str, Any]) -> None:
    assert [row["name"] for row in parts["backward"]["rows"]] == ["qkv", "o"]
    for row in parts["backward"]["rows"]:
        assert set(row["difference"]) == {"dx", "dw"}
        for mode, factor in row["over_nccl"].items():
            times = row["ms"][mode]
            assert factor == pytest.approx(times["nccl"]["median"] / times["ours"]["median"], abs=1e-3)
    for row in parts["host"]["rows"]:
        assert set(row["host_ms"]) == {"nccl", "ours", "nccl, gradient", "ours, gradient"}
        assert min(row["host_ms"].values()) > 0


def test_steps_of_data_parallelism_are_compared_with_one_that_sends_nothing(parts: dict[str, Any]) -> None:
    assert [row["batch"] for row in parts["dp"]["rows"]] == [1, 2]
    for row in parts["dp"]["rows"]:
        assert set(row["ms"]) == {"nccl", "ours", "none"}
        assert set(row["host_us"]) == set(row["ms"])
        assert min(microseconds for one in row["host_us"].values() for microseconds in one.values()) > 0
        # A mean of two bf16 gradients is rounded once either way: the copies stay together.
        assert row["losses"]["ours"] == pytest.approx(row["losses"]["nccl"], rel=1e-2)
        for name, exposed in row["exposed_ms"].items():
            step = row["ms"][name]["median"] - row["ms"]["none"]["median"]
            assert exposed == pytest.approx(step, abs=1e-3)


def test_the_report_says_where_and_how_it_was_measured(finished: tuple[str, dict[str, Any]]) -> None:
    printed, report = finished
    assert report["ended"] == "complete"
    assert report["environment"]["NCCL_NVLS_ENABLE"] == "0"
    assert {"gpus", "cores"} <= set(report["machine"])
    assert {"python", "torch", "flashtrain"} <= set(report["versions"])
    assert report["date"].endswith("+00:00")
    assert set(report["summary"]["scores"]) == {"launch_free", "host_issued"}
    assert "forward, launch-free, ms" in printed
    assert "goals" in printed


def test_a_part_without_time_names_what_it_left_out(tmp_path: Path) -> None:
    done = rehearse(tmp_path, "--parts", "forward", "--seconds", "1e-9")
    assert done.returncode == 0, done.stderr
    forward = json.loads((tmp_path / REPORT).read_text())["parts"]["forward"]
    assert forward["rows"] == []
    assert len(forward["left_out"]) == forward["planned"] == 4
    assert "not measured: tiny qkv 64, tiny o 64, tiny gate_up 64, tiny down 64" in done.stdout


FAULTY = """
import os, sys, time
from on_gpu import command, forward
from on_gpu.products import Product

def raises(ranks):
    if ranks.rank == 1:
        raise RuntimeError("the fault of rank 1")

def hangs(ranks):
    if ranks.rank == 0:
        ranks.alive("hanging")
        os.utime(ranks._heartbeat, (0, 0))  # as if that had been long ago
    time.sleep(600)

class Faulty(Product):
    def __init__(self, site, ranks):
        if site.name == "o":
            {fault}(ranks)
        super().__init__(site, ranks)

forward.Product = Faulty

if __name__ == "__main__":
    sys.exit(command.main(sys.argv[3:]))
"""


@pytest.mark.parametrize(
    ("fault", "complaint"),
    [("raises", "the fault of rank 1"), ("hangs", "no progress for 180 s since: hanging")],
)
def test_a_rank_that_fails_or_hangs_ends_the_run_which_keeps_its_rows(
    tmp_path: Path, fault: str, complaint: str
) -> None:
    script = tmp_path / "faulty.py"
    script.write_text(FAULTY.format(fault=fault))
    done = rehearse(tmp_path, "--parts", "forward", "--sites", "qkv", "o", script=script)
    assert done.returncode == 1, done.stderr
    assert complaint in done.stderr
    if fault == "hangs":
        assert "hangs" in done.stderr  # where each rank stood; both write at once, word by word
    report = json.loads((tmp_path / REPORT).read_text())
    assert complaint in report["ended"]
    forward = report["parts"]["forward"]
    assert ([row["name"] for row in forward["rows"]], forward["left_out"]) == (["qkv"], ["tiny o 64"])
    assert "forward, launch-free, ms" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--world", "1"], "--world is 1"),
        (["--world", "3"], "do not divide by 3 ranks"),
        (["--rows", "65"], "65 rows do not divide by 2 ranks"),
        (["--seconds", "0"], "--seconds is 0"),
    ],
)
def test_settings_that_cannot_be_measured_are_refused(
    monkeypatch: pytest.MonkeyPatch, arguments: list[str], complaint: str
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    with pytest.raises(UserError, match=complaint):
        importlib.import_module("on_gpu.settings").parse(["--rehearse", *arguments])


@pytest.mark.skipif("__import__('torch').cuda.device_count() > 1", reason="this machine has the GPUs")
def test_without_gpus_the_benchmark_says_how_to_rehearse(tmp_path: Path) -> None:
    done = run("--device", "cuda", "--out", str(tmp_path))
    assert done.returncode == 2
    assert "--rehearse" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert not list(tmp_path.iterdir())
