"""A report's page taken apart, and folders of runs to make reports of."""

import json
import math
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from flashtrain.metrics import events
from flashtrain.metrics.events import Event
from flashtrain.metrics.gpu import GpuSample
from flashtrain.train.sinks import JsonLines
from tests.train.records import METRICS, run_view

VOID = {"meta", "br", "link", "img", "input", "hr"}


class Page(HTMLParser):
    """Every element with its attributes and text; asserts that tags are balanced."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None], list[str]]] = []
        self._open: list[int] = []
        self.feed(html)
        self.close()
        assert not self._open, [self.elements[index][0] for index in self._open]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len({name for name, _ in attrs}) == len(attrs), (tag, attrs)
        self.elements.append((tag, dict(attrs), []))
        if tag not in VOID:
            self._open.append(len(self.elements) - 1)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs), []))

    def handle_endtag(self, tag: str) -> None:
        assert self.elements[self._open[-1]][0] == tag, (tag, self.elements[self._open[-1]])
        self._open.pop()
        if tag in ("td", "th"):
            self.handle_data(" ")

    def handle_data(self, data: str) -> None:
        for index in self._open:
            self.elements[index][2].append(data)

    def all(self, tag: str, **wanted: str) -> list[tuple[dict[str, str | None], str]]:
        """Attributes and whole text of the elements ``tag`` whose attributes hold the words ``wanted``."""
        return [
            (attributes, " ".join("".join(text).split()))
            for name, attributes, text in self.elements
            if name == tag
            and all(set(v.split()) <= set((attributes.get(k) or "").split()) for k, v in wanted.items())
        ]

    @property
    def data(self) -> dict[str, Any]:
        """What the script reads."""
        ((_, text),) = self.all("script", type="application/json")
        return dict(json.loads(text))

    def charts(self) -> dict[str, dict[str, str | None]]:
        """The figures by key."""
        found = [attributes for attributes, _ in self.all("figure", **{"class": "chart"})]
        return {str(attributes["data-key"]): attributes for attributes in found}

    def places(self, key: str) -> list[list[tuple[float, float]]]:
        """The places of each drawn path of a chart, in 0..1000, main lines alone."""
        wanted, found, inside = f"chart-{key}", [], False
        for tag, attributes, _ in self.elements:
            if tag == "figure":
                inside = attributes.get("id") == wanted
            if inside and tag == "path" and attributes.get("class") == "main":
                numbers = re.findall(r"[ML](-?[\d.]+) (-?[\d.]+)", str(attributes["d"]))
                found.append([(float(x), float(y)) for x, y in numbers])
        return found


def loss_at(step: int) -> float:
    """The made-up training loss of ``folder``."""
    return 1.5 + 2 / step


def folder(out: Path, steps: int = 20, mfu: float | None = 0.4, faster: float = 1.0) -> Path:
    """The files of a run that was killed at step 12, went on from step 9 and skipped step 15."""
    sink = JsonLines()
    sink.on_start(run_view(out))
    (out / "config.toml").write_text(f'[train]\nsteps = {steps}\n[data]\nsource = "<b>{out.name}</b>"\n')
    (out / "sites.json").write_text(
        json.dumps([{"name": "layers.0.mlp.down", "product": "[8, 4] x [4, 2]", "forward": "f",
                     "backward": "b", "overlapped": True, "why": "2 chunks"}])
    )  # fmt: skip
    machine = {"host": "here", "torch": "2.13", "memory_bytes": 8 << 30, "gpus": [], "cuda": None}
    story = {
        1: Event("start", 1, {"ranks": 2, "machine": machine}, 1000.0),
        9: Event("resume", 9, {"ranks": 2, "machine": machine}, 1100.0),
        15: Event("skipped_step", 15, {"reason": "</script><script>alert(1)</script>"}, 1200.0),
        steps: Event("end", steps, {}, 1300.0),
    }
    for step in range(1, steps + 1):
        if step in story and step < steps:
            if step == 9:
                events.record(out, Event("skipped_step", 10, {"reason": "before the kill"}, 1050.0))
            events.record(out, story[step])
        norm = math.inf if step == 15 else 1.0 + step
        sink.on_step(
            replace(METRICS, step=step, loss=loss_at(step), grad_norm=norm, mfu=mfu, tokens=100 * step,
                    tokens_per_s=1000.0 * faster + step, overlap=0.8, memory_bytes=step << 28)
        )  # fmt: skip
        if step % 10 == 0:
            sink.on_evaluate(step, loss_at(step) + 0.25)
    sink.on_end(run_view(out))
    events.record(out, story[steps])
    return out


def with_gpus(out: Path) -> Path:
    """Adds what two GPUs said of themselves to a run's folder."""
    for rank in (0, 1):
        samples = [
            GpuSample(step, 10.0 * step, 600.0 + rank, 700.0, 1755, 2619, 60, 0.9,
                      ("power cap",) if rank and step > 10 else (), 1000 * step, 10**9 * step, 5, 2, step)
            for step in (5, 10, 15, 20)
        ]  # fmt: skip
        lines = "".join(sample.as_json() + "\n" for sample in samples)
        (out / f"telemetry-rank{rank}.jsonl").write_text(lines)
    return out
