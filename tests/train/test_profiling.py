import gzip
import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from flashtrain.methods.callback import Callback
from flashtrain.train.profiling import MemorySnapshot, Profiler
from tests.train.records import METRICS, run_view


def play(callback: Callback, out: Path, last: int, failing: bool = False) -> None:
    """Steps whose work is one product, which a trace shows; the last one may fail half-way."""
    callback.on_start(run_view(out))
    for step in range(1, last + 1):
        callback.before_step(step)
        torch.mm(torch.ones(step, 3), torch.ones(3, 2))
        if not (failing and step == last):
            callback.on_step(replace(METRICS, step=step))
    callback.on_end(run_view(out))


def products(path: Path) -> list[Any]:
    """The shapes of the products in a trace."""
    events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    return [event["args"]["Input Dims"] for event in events if event.get("name") == "aten::mm"]


def test_chosen_steps_are_traced_and_no_others(tmp_path: Path) -> None:
    play(Profiler([2, 3, 5], rank=1), tmp_path, last=6)
    folder = tmp_path / "profile"
    assert sorted(path.name for path in folder.iterdir()) == [
        "step-5.rank1.json.gz",
        "steps-2-3.rank1.json.gz",
    ]
    assert products(folder / "steps-2-3.rank1.json.gz") == [[[2, 3], [3, 2]], [[3, 3], [3, 2]]]
    assert products(folder / "step-5.rank1.json.gz") == [[[5, 3], [3, 2]]]


def test_a_failure_leaves_what_was_traced(tmp_path: Path) -> None:
    play(Profiler([2, 3, 4], rank=0), tmp_path, last=3, failing=True)
    (path,) = (tmp_path / "profile").iterdir()
    assert products(path) == [[[2, 3], [3, 2]], [[3, 3], [3, 2]]]


def test_a_run_that_ends_before_leaves_nothing(tmp_path: Path) -> None:
    play(Profiler([9], rank=0), tmp_path, last=3)
    assert list(tmp_path.iterdir()) == []


SNAPSHOT = {
    "segments": [{"device": 0, "address": 2**47, "blocks": [{"size": 512, "state": "active_allocated"}]}],
    "device_traces": [[{"action": "alloc", "size": 512, "frames": [{"name": "f", "line": 3}]}]],
}


def test_a_snapshot_is_json_that_torch_draws(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recorded: list[dict[str, Any]] = []
    monkeypatch.setattr(torch.cuda.memory, "_record_memory_history", lambda **how: recorded.append(how))
    monkeypatch.setattr(torch.cuda.memory, "_snapshot", lambda device: SNAPSHOT)
    play(MemorySnapshot([2, 4], rank=3, device=torch.device("cuda", 0)), tmp_path, last=5)
    assert sorted(path.name for path in (tmp_path / "memory").iterdir()) == [
        "step-2.rank3.json",
        "step-4.rank3.json",
    ]
    held = json.loads((tmp_path / "memory" / "step-2.rank3.json").read_text())
    assert held == SNAPSHOT
    assert "stacks" in recorded[0]
    assert recorded[-1] == {"enabled": None}
    from torch.cuda._memory_viz import trace_plot

    assert "<html" in trace_plot(held) or "<body" in trace_plot(held) or "<script" in trace_plot(held)


def test_without_a_gpu_there_are_no_snapshots(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "flashtrain"):
        play(MemorySnapshot([1], rank=0, device=torch.device("cpu")), tmp_path, last=2)
    assert [record.getMessage() for record in caplog.records] == [
        "no memory snapshots: this run is on the CPU"
    ]
    assert list(tmp_path.iterdir()) == []
