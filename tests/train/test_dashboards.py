"""Weights & Biases offline, with the real package, and the Prometheus endpoint over loopback."""

import builtins
import json
import logging
import math
import socket
import urllib.request
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest

from flashtrain.errors import UserError
from flashtrain.metrics import Event, StepMetrics
from flashtrain.train.dashboards import Prometheus, WeightsAndBiases
from flashtrain.train.sinks import TensorBoard
from tests.train.records import METRICS, run_view


def scrape(port: int, address: str = "127.0.0.1") -> dict[str, float]:
    """What a Prometheus server reads, by name with labels."""
    # No proxy of the environment stands between this process and itself.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(f"http://{address}:{port}/metrics", timeout=10) as answer:
        lines = answer.read().decode().splitlines()
    pairs = (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
    return {name: float(value) for name, value in pairs}


@pytest.fixture
def endpoint(tmp_path: Path) -> Iterator[Prometheus]:
    sink = Prometheus(port=0)
    sink.on_start(run_view(tmp_path, steps=10))
    yield sink
    sink.on_end(run_view(tmp_path))


def test_the_endpoint_serves_the_last_step(endpoint: Prometheus) -> None:
    before = scrape(endpoint.port)
    assert math.isnan(before["flashtrain_loss"])
    assert before["flashtrain_steps"] == 10
    endpoint.on_step(METRICS)
    endpoint.on_step(replace(METRICS, step=2, loss=1.25, overlap=0.5))
    endpoint.on_evaluate(2, 1.5)
    endpoint.on_event(Event("skipped_step", 2))
    endpoint.on_event(Event("skipped_step", 3))
    after = scrape(endpoint.port)
    assert {f"flashtrain_{field.name}" for field in fields(StepMetrics)} <= set(after)
    assert (after["flashtrain_step"], after["flashtrain_loss"], after["flashtrain_overlap"]) == (2, 1.25, 0.5)
    assert math.isnan(after["flashtrain_mfu"])
    assert after["flashtrain_held_out_loss"] == 1.5
    assert after['flashtrain_events_total{kind="skipped_step"}'] == 2


def test_only_loopback_is_listened_on(endpoint: Prometheus) -> None:
    assert endpoint._server.server_address[0] == "127.0.0.1"
    # 127.0.0.2 reaches this machine too, but not a socket that is bound to 127.0.0.1.
    with socket.socket() as other, pytest.raises(ConnectionRefusedError):
        other.connect(("127.0.0.2", endpoint.port))


def test_a_port_in_use_is_one_line(tmp_path: Path, endpoint: Prometheus) -> None:
    with pytest.raises(UserError) as raised:
        Prometheus(endpoint.port).on_start(run_view(tmp_path))
    line = str(raised.value)
    assert f"cannot listen on 127.0.0.1 port {endpoint.port}: Address already in use" in line
    assert "choose another watch.prometheus_port" in line
    assert "\n" not in line


def test_the_port_is_free_again_after_the_run(tmp_path: Path) -> None:
    first = Prometheus(port=0)
    first.on_start(run_view(tmp_path))
    first.on_end(run_view(tmp_path))
    again = Prometheus(first.port)
    again.on_start(run_view(tmp_path))
    again.on_end(run_view(tmp_path))
    again.on_end(run_view(tmp_path))


def logged(path: Path) -> Iterator[bytes]:
    """The records of a .wandb file: LevelDB's log format behind a header of 7 bytes."""
    data, at, parts = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        left = 32768 - at % 32768
        if left < 7:
            at += left
            continue
        length, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        parts += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield parts
            parts = b""


def records(out: Path) -> tuple[list[Any], list[dict[str, Any]]]:
    """Headers and logged rows of every offline record, in the order of time."""
    from wandb.proto import wandb_internal_pb2

    headers, rows = [], []
    for path in sorted(out.glob("wandb/offline-run-*/*.wandb"), key=lambda path: path.stat().st_mtime_ns):
        for data in logged(path):
            one = wandb_internal_pb2.Record()
            one.ParseFromString(data)
            if one.WhichOneof("record_type") == "run":
                headers.append(one.run)
            elif one.WhichOneof("record_type") == "history":
                items = one.history.item
                rows.append(
                    {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in items}
                )
    return headers, rows


def test_a_real_offline_record_holds_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    sink = WeightsAndBiases("a-project")
    with caplog.at_level(logging.INFO, "flashtrain"):
        sink.on_start(run_view(tmp_path / "run"))
    assert "Weights & Biases: project a-project, run" in caplog.text
    assert "offline, in out/wandb" in caplog.text
    sink.on_step(METRICS)
    sink.on_step(replace(METRICS, step=2, loss=2.5))
    sink.on_evaluate(2, 2.75)
    sink.on_event(Event("skipped_step", 2))
    state = sink.state_dict()
    sink.on_end(run_view(tmp_path / "run"))

    resumed = WeightsAndBiases("a-project")
    resumed.load_state_dict(state)
    resumed.on_start(run_view(tmp_path / "run", first_step=2))
    resumed.on_step(replace(METRICS, step=2, loss=2.5))
    resumed.on_end(run_view(tmp_path / "run"))

    headers, rows = records(tmp_path / "run")
    assert {(head.project, head.run_id, head.display_name) for head in headers} == {
        ("a-project", state["id"], "run")
    }
    config = {item.key: item.value_json for item in headers[0].config.update}
    assert config["data"] == '{"source":"stdlib"}'
    steps = [(row["step"], row["loss/train"]) for row in rows if "loss/train" in row]
    assert steps == [(1, 3.25), (2, 2.5), (2, 2.5)]
    first = next(row for row in rows if row.get("step") == 1)
    assert {tag for name, tag in TensorBoard.TAGS.items() if name != "mfu"} <= set(first)
    assert "speed/mfu" not in first
    assert [row["loss/held_out"] for row in rows if "loss/held_out" in row] == [2.75]
    assert [row["events/skipped_step"] for row in rows if "events/skipped_step" in row] == [1]


@pytest.mark.parametrize(
    ("package", "sink", "advice"),
    [
        ("wandb", WeightsAndBiases("p"), r"pip install 'flashtrain\[wandb\]'"),
        ("prometheus_client", Prometheus(0), r"pip install 'flashtrain\[prometheus\]'"),
    ],
)
def test_a_missing_package_is_named_before_the_first_step(
    package: str, sink: Any, advice: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == package:
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UserError, match=advice):
        sink.on_start(run_view(tmp_path / "run"))
    assert not (tmp_path / "run").exists()
    sink.on_end(run_view(tmp_path))


def test_weights_and_biases_that_cannot_log_in_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import wandb

    def refuse(**_: Any) -> None:
        raise wandb.errors.UsageError("api_key not configured\n(no-tty).")

    monkeypatch.setattr(wandb, "init", refuse)
    with pytest.raises(UserError) as raised:
        WeightsAndBiases("p").on_start(run_view(tmp_path))
    assert str(raised.value) == (
        "Weights & Biases: api_key not configured (no-tty).; run `wandb login`, or set WANDB_MODE=offline"
    )
