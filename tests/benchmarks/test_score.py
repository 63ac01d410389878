"""The score's arithmetic against a published race, and the goals."""

import importlib
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests.benchmarks.race import HIDDEN, PUBLISHED, SYSTEMS, shapes

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def score(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("on_gpu.score")


def rows(score: ModuleType, world: int, peer: str = "torch", ours: str = "kraken") -> list[dict[str, Any]]:
    """Rows in which ``peer`` plays torch's fused op and ``ours`` the op."""
    found = []
    for row, ms in shapes(world):
        played = {"gemm": ms["gemm"], "collective": 0.0, "nccl": ms["nccl"]}
        played |= {"torch": ms[peer], "ours": ms[ours]}
        judged = score.judge(played, row["rows"], HIDDEN[row["shape"]], world)
        found.append(row | {"judged": {"launch_free": judged}})
    return found


def report(world: int, **parts: dict[str, Any]) -> dict[str, Any]:
    return {"settings": {"world": world}, "parts": parts}


@pytest.mark.parametrize("world", [4, 2])
@pytest.mark.parametrize("system", SYSTEMS)
def test_scores_of_the_published_race(score: ModuleType, world: int, system: str) -> None:
    # Its times have three digits, those of the shortest product two.
    found = score.scores(rows(score, world, ours=system), "launch_free")["ours"]
    for title, published in PUBLISHED[world].items():
        assert found[title]["score"] == pytest.approx(published[system], abs=0.0015), title
    assert found["all"]["shapes"] == (32 if world == 4 else 16)


def test_the_best_peer_is_taken_shape_by_shape(score: ModuleType) -> None:
    # The race's best of all three, once NCCL or Kraken, once with torch's in its place.
    best = [min(ms[name] for name in SYSTEMS) for _, ms in shapes(4)]
    measured = rows(score, 4, peer="kraken", ours="torch")
    for row, time in zip(measured, best, strict=True):
        over = row["judged"]["launch_free"]["bound_over"]
        assert max(over.values()) == pytest.approx(row["judged"]["launch_free"]["bound"] / time, rel=1e-3)
    both = score.scores(measured, "launch_free")
    assert both["best peer"]["all"]["score"] > max(both[name]["all"]["score"] for name in ("nccl", "torch"))


def test_bound_of_a_product_that_hides_its_transfers_and_of_one_that_cannot(score: ModuleType) -> None:
    assert score.bound(2.515, 8192, 8192, 4) == pytest.approx(2.515)
    # 8B o at M 8192: own quarter of the product, then three chunks of 2048 x 4096 bf16 at 390 GB/s.
    assert score.bound(0.101, 8192, 4096, 4) == pytest.approx(0.101 / 4 + 3 * 2048 * 4096 * 2 / 390e6)


def test_what_a_row_says_of_its_times(score: ModuleType) -> None:
    ms = {"gemm": 1.0, "collective": 0.4, "nccl": 1.5, "ours": 1.1, "torch": 1.2}
    judged = score.judge(ms, 8192, 8192, 4)
    assert judged["G"] == {"nccl": 0.6667, "ours": 0.9091, "torch": 0.8333}
    assert judged["over"] == {"nccl": 1.3636, "torch": 1.0909}
    assert judged["hidden"] == pytest.approx((1.5 - 1.1) / (1.5 - 1.0))
    assert "torch" not in score.judge({k: v for k, v in ms.items() if k != "torch"}, 64, 64, 4)["over"]


def test_goals_say_how_far_off_and_of_how_many_shapes(score: ModuleType) -> None:
    forward = {"planned": 32, "rows": rows(score, 4)}
    host = {"planned": 8, "rows": [{"host_ms": {"ours": 0.05}}, {"host_ms": {"ours": 0.07}}]}
    backward = {"planned": 2, "rows": [{"over_nccl": {"launch_free": f}} for f in (1.2, 1.5)]}
    goals = {g["what"]: g for g in score.goals(report(4, forward=forward, host=host, backward=backward))}
    everything = goals["score, W = 4"]
    assert (everything["met"], everything["measured"], everything["of"]) == (False, 32, 32)
    assert everything["by"] == pytest.approx(0.751 - 0.90, abs=0.002)
    slower = goals["shapes slower than NCCL + cuBLAS"]
    assert (
        slower["value"] == len(score.slower(forward["rows"], "launch_free")) == 3
    )  # 8B qkv, o and down at 2048
    assert goals["host ms of an op, no gradient, slowest site"]["by"] == pytest.approx(-0.01)
    mean = goals["NCCL + cuBLAS over ours, backward, mean"]
    assert (mean["met"], mean["value"]) == (True, pytest.approx((1.2 * 1.5) ** 0.5, abs=1e-4))


def test_other_shapes_do_not_enter_the_goals_but_count_where_they_are_slower(score: ModuleType) -> None:
    measured = rows(score, 2)
    other = {"shape": "1B", "name": "qkv", "style": "column", "rows": 4096}
    slow = score.judge({"gemm": 1.0, "collective": 0.1, "nccl": 1.0, "ours": 9.0}, 4096, 2048, 2)
    measured.append(other | {"judged": {"launch_free": slow}})
    measured.append(other | {"shape": "8B", "rows": 2048, "judged": {"launch_free": slow}})
    goals = score.goals(report(2, forward={"planned": 18, "rows": measured}))
    assert [(g["what"], g["measured"]) for g in goals[:1]] == [("score, M = 4096 and 8192, W = 2", 16)]
    assert goals[0]["value"] == pytest.approx(PUBLISHED[2]["all"]["kraken"], abs=0.0015)
    assert "1B qkv 4096 (x0.111)" in score.slower(measured, "launch_free")


def test_a_part_that_was_not_measured_meets_no_goal(score: ModuleType) -> None:
    assert {goal["met"] for goal in score.goals(report(4))} == {None}
