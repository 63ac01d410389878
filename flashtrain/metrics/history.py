"""The files of a run's folder, read back: tolerant of what a killed run leaves behind."""

import json
import math
import re
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from flashtrain.errors import UserError
from flashtrain.metrics.events import BEGINNINGS, ENDINGS, EVENTS, Event
from flashtrain.metrics.gpu import GpuSample
from flashtrain.metrics.report import from_json

T = TypeVar("T")

METRICS = "metrics.jsonl"
EVALUATIONS = "evaluations.jsonl"
SITES = "sites.json"
CONFIG = "config.toml"
SUMMARY = "summary.json"

Curve = dict[int, float]


def telemetry_file(out: Path, rank: int) -> Path:
    """Where the GPU samples of a rank are."""
    return out / f"telemetry-rank{rank}.jsonl"


@dataclass(frozen=True)
class History:
    """All that a run has written down of itself so far.

    ``curves`` hold each metric of the steps by step, as in ``StepMetrics``, without what was unknown;
    ``damaged`` counts, by file, lines that could not be read.
    """

    out: Path
    curves: Mapping[str, Curve]
    held_out: Curve
    events: list[Event]
    telemetry: Mapping[int, list[GpuSample]]
    sites: list[dict[str, Any]]
    config: Mapping[str, Any]
    config_text: str
    summary: Mapping[str, Any]
    damaged: Mapping[str, int]

    def curve(self, metric: str) -> Curve:
        """One metric by step, in the order of the steps; empty where it was never known."""
        return self.curves.get(metric, {})

    @property
    def machine(self) -> Mapping[str, Any]:
        """Where the last attempt ran; empty if it did not say."""
        beginnings = [event for event in self.events if event.kind in BEGINNINGS]
        return beginnings[-1].detail.get("machine", {}) if beginnings else {}

    @property
    def attempts(self) -> int:
        """How often the run was begun or resumed."""
        return sum(event.kind in BEGINNINGS for event in self.events)

    @property
    def ending(self) -> Event | None:
        """The event that ended the last attempt; None while it runs, or after it was killed."""
        last = self.events[-1] if self.events else None
        return last if last is not None and last.kind in ENDINGS else None


def read(out: Path) -> History:
    """The run in folder ``out``. Raises UserError if there is none, or a file cannot be opened."""
    if not (out / METRICS).is_file() and not (out / EVENTS).is_file():
        raise UserError(f"there is no run in {out}: it holds no {METRICS}; give the --out of a run")
    damaged: dict[str, int] = {}
    curves: dict[str, Curve] = {}
    for step, values in _lines(out / METRICS, _step, damaged):
        for metric, value in values.items():
            curves.setdefault(metric, {})[step] = value
    evaluations = dict(_lines(out / EVALUATIONS, _step, damaged))
    ranks = [re.fullmatch(r"telemetry-rank(\d+)\.jsonl", path.name) for path in out.iterdir()]
    config_text = _text(out / CONFIG)
    try:
        config = tomllib.loads(config_text)
    except ValueError:
        config = {}
        damaged[CONFIG] = 1
    return History(
        out=out,
        curves={metric: dict(sorted(curve.items())) for metric, curve in curves.items()},
        held_out={step: values["loss"] for step, values in sorted(evaluations.items())},
        events=_lines(out / EVENTS, Event.from_json, damaged),
        telemetry={
            int(rank[1]): _lines(out / rank[0], GpuSample.from_json, damaged)
            for rank in sorted((rank for rank in ranks if rank is not None), key=lambda r: int(r[1]))
        },
        sites=_json(out / SITES, list, damaged),
        config=config,
        config_text=config_text,
        summary=_json(out / SUMMARY, dict, damaged),
        damaged=damaged,
    )


def _step(line: str) -> tuple[int, dict[str, float]]:
    """Step and known numbers of a line, whatever version wrote it. Raises ValueError if it has no loss."""
    record = json.loads(line)
    if not isinstance(record, dict) or type(record.get("step")) is not int or record.get("loss") is None:
        raise ValueError
    known = {name: from_json(value) for name, value in record.items() if value is not None}
    return record["step"], {name: float(value) for name, value in known.items()}


def _lines(path: Path, parse: Callable[[str], T], damaged: dict[str, int]) -> list[T]:
    """What the lines of ``path`` hold, of a missing file nothing; lines that say nothing are counted."""
    found = []
    for line in _text(path).splitlines():
        try:
            found.append(parse(line))
        except (ValueError, TypeError):
            damaged[path.name] = damaged.get(path.name, 0) + 1
    return found


def _json(path: Path, kind: type[T], damaged: dict[str, int]) -> T:
    """What the file holds, of a missing one nothing; something else than a ``kind`` is counted."""
    text = _text(path)
    if not text:
        return kind()
    try:
        held = json.loads(text)
    except ValueError:
        held = None
    if not isinstance(held, kind):
        damaged[path.name] = 1
        return kind()
    return held


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return ""
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None


def finite(curve: Curve) -> Curve:
    """The points of ``curve`` that can be drawn."""
    return {step: value for step, value in curve.items() if math.isfinite(value)}
