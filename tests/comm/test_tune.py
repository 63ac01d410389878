"""The choice among ways: the fastest, the same on every rank, measured once. On GPUs: test_nvlink.py."""

import json
import re
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from flashtrain.comm import products, tune
from tests.comm.transport.fake_gpu import Ranks

DEVICE = torch.device("cpu")


class Mover:
    def __init__(self, rank: int, world: int) -> None:
        self.rank, self.world = rank, world


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(tune, "_key", lambda device, world: f"a machine; {world} ranks")


def choices(
    times: list[dict[str, float]], monkeypatch: pytest.MonkeyPatch, name: str = "a shape"
) -> list[str]:
    """What each rank picks where way ``title`` takes ``times[rank][title]`` milliseconds there."""
    ranks, here = Ranks(len(times)), threading.local()

    def burst(title: str, way: str, call: Callable[[Any], Any]) -> float:
        call(way)
        return times[here.rank][title]

    monkeypatch.setattr(tune, "_burst", burst)

    def main(rank: int, _: Ranks) -> str:
        here.rank = rank
        candidates = {title: (lambda title=title: title) for title in times[0]}
        exchange = lambda text: ranks.exchange(rank, text)  # noqa: E731
        mover: Any = Mover(rank, len(times))
        picked: str = tune.choose(name, candidates, lambda way: None, mover, exchange, DEVICE)
        return picked

    return ranks.run(main)


def test_the_slowest_rank_decides_and_all_take_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    times = [{"fused a": 1.0, "fused b": 1.5}, {"fused a": 2.0, "fused b": 1.6}]
    assert choices(times, monkeypatch) == ["fused b", "fused b"]


def test_another_way_must_be_faster_by_the_margin(monkeypatch: pytest.MonkeyPatch) -> None:
    assert choices([{"fused a": 1.0, "whole": 0.98}], monkeypatch, "one") == ["fused a"]
    assert choices([{"fused a": 1.0, "whole": 0.96}], monkeypatch, "two") == ["whole"]


def test_a_tie_goes_to_what_would_be_taken_unmeasured(monkeypatch: pytest.MonkeyPatch) -> None:
    assert choices([{"fused b": 1.0, "fused a": 0.995}], monkeypatch, "one") == ["fused b"]
    assert choices([{"fused b": 1.0, "fused a": 0.985}], monkeypatch, "two") == ["fused a"]


def test_the_best_of_many_is_among_the_finalists(monkeypatch: pytest.MonkeyPatch) -> None:
    times = {f"fused {number}": 1.0 + ((number + 7) * 7 % 20) / 10 for number in range(20)}
    assert choices([times], monkeypatch) == ["fused 13"]


def test_a_choice_is_kept_and_not_measured_again(monkeypatch: pytest.MonkeyPatch) -> None:
    assert choices([{"fused a": 1.0, "fused b": 2.0}] * 2, monkeypatch) == ["fused a"] * 2
    assert choices([{"fused a": 2.0, "fused b": 1.0}] * 2, monkeypatch) == ["fused a"] * 2
    assert choices([{"fused a": 2.0, "fused b": 1.0}] * 2, monkeypatch, "another shape") == ["fused b"] * 2
    kept = json.loads((tune.folder() / "tuned.json").read_text())
    assert kept == {"a machine; 2 ranks": {"a shape": "fused a", "another shape": "fused b"}}
    # Another number of ranks is another measurement, and a way that is gone is chosen anew.
    assert choices([{"fused a": 2.0, "fused b": 1.0}], monkeypatch) == ["fused b"]
    assert choices([{"fused c": 2.0, "fused b": 1.0}] * 2, monkeypatch) == ["fused b"] * 2


@pytest.mark.parametrize("content", ["", "{", "[]", "\udcff"])
def test_a_damaged_file_is_measured_over(content: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tune.folder().mkdir()
    (tune.folder() / "tuned.json").write_text(content, errors="surrogateescape")
    assert choices([{"fused a": 2.0, "fused b": 1.0}], monkeypatch) == ["fused b"]
    assert json.loads((tune.folder() / "tuned.json").read_text()) == {
        "a machine; 1 ranks": {"a shape": "fused b"}
    }


def test_without_a_place_to_write_the_choice_holds_for_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "flashtrain").write_text("a file where a folder should be")
    assert choices([{"fused a": 2.0, "fused b": 1.0}], monkeypatch) == ["fused b"]
    assert "is not kept" in caplog.text


def test_batches_of_nearly_one_size_share_a_choice() -> None:
    assert len({tune.bucket(rows) for rows in range(8000, 8400)}) == 1
    assert [tune.bucket(rows) for rows in (0, 1, 2, 2048, 8192, 11585)] == [0, 1, 2, 2048, 8192, 11585]
    assert tune.bucket(2048) != tune.bucket(4096)


def test_the_rest_after_a_burst_is_as_long_as_the_device_was_busy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not as long as the host waited: that holds the rests of other ranks, so they would grow and grow."""
    world, busy = 2, 0.002
    ranks, rested = Ranks(world), [[0.0] for _ in range(world)]
    here = threading.local()

    class Event:
        def __init__(self, enable_timing: bool) -> None: ...

        def record(self) -> None: ...

        def elapsed_time(self, end: "Event") -> float:
            return busy * 1e3

    def rest(seconds: float) -> None:
        rested[here.rank].append(seconds)
        time.sleep(seconds)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: None)
    monkeypatch.setattr(tune, "time", SimpleNamespace(sleep=rest, perf_counter=time.perf_counter))
    real = time.sleep

    def main(rank: int, _: Ranks) -> None:
        here.rank = rank
        # One rank comes late, and an operation ends when both have come.
        titles, call = ["fused"] * 3 + ["chunked"] * 3, lambda way: (real(0.001), ranks.barrier.wait(60))
        bursts = [tune._burst(title, None, call) for title in titles]
        # Issuing a call took a millisecond, longer than the device, which did four in two.
        assert min(bursts[:3]) >= 1.0
        assert min(bursts[3:]) >= 2.0

    ranks.run(main)
    assert max(max(times) for times in rested) < 10 * busy


@pytest.mark.parametrize(
    ("op", "rows", "inner", "columns", "world", "expected"),
    [
        (  # tiles at once
            "all_gather",
            2048,
            4096,
            1536,
            4,
            [f"by {n} in {ranges} columns" for n in (12, 33) for ranges in (4, 8)],
        ),
        ("all_gather", 16384, 4096, 1536, 4, []),
        ("all_gather", 2048, 4096, 7168, 4, []),  # a product that is longer than its transfers
        (
            "reduce_scatter",
            16384,
            1024,
            4096,
            4,
            [f"by {n} in {subs}" for n in (12, 33) for subs in (2, 4, 8)],
        ),
        ("reduce_scatter", 2048, 1024, 4096, 4, [f"by {n} in {subs}" for n in (12, 33) for subs in (2, 4)]),
        ("reduce_scatter", 2048, 512, 4096, 8, [f"by {n} in 2" for n in (14, 35)]),  # as many for each peer
        ("reduce_scatter", 2048, 3584, 4096, 4, []),
    ],
)
def test_carriers_are_tried_where_transfers_set_the_pace(
    op: str,
    rows: int,
    inner: int,
    columns: int,
    world: int,
    expected: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(products, "plan_of", lambda *given, **options: None)
    properties = SimpleNamespace(multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    gathers = op == "all_gather"
    x = torch.empty(rows // world if gathers else rows, inner, dtype=torch.bfloat16, device="meta")
    w = torch.empty(columns, inner, dtype=torch.bfloat16, device="meta")
    found = products._carried(None, op, (rows // world,) * world, "", x, w)
    assert [re.sub(r" 128x256\S* s\d w\d split g\d+", "", name) for name in found] == [
        f"fused carried {name}" for name in expected
    ]
