"""The report: a file that is whole after every row, and the tables that show it."""

import json
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import machine
from on_gpu import score
from on_gpu.settings import NO_MULTICAST, Settings


class Report:
    """What rank 0 writes to ``path``; other ranks pass None and write nothing."""

    def __init__(self, path: Path | None, settings: Settings) -> None:
        self._path = path
        self.data: dict[str, Any] = {
            "benchmark": "overlap",
            "date": machine.date(),
            "ended": "cut short",
            "machine": machine.facts() | {"gpus": machine.gpus(settings.world)},
            "versions": machine.versions() | machine.gpu_versions(),
            "multicast": "off",
            "environment": {
                name: os.environ.get(name, "") for name in (*NO_MULTICAST, "CUDA_DEVICE_MAX_CONNECTIONS")
            },
            "settings": asdict(settings),
            "link_bytes_per_second": score.LINK,
            "parts": {},
        }

    def plan(self, part: str, titles: list[str]) -> None:
        """Say what ``part`` is going to measure; until then all of it counts as left out."""
        self.data["parts"][part] = {"planned": len(titles), "left_out": list(titles), "rows": []}
        self._write()

    def add(self, part: str, title: str, row: Mapping[str, Any]) -> None:
        """Keep what was measured under ``title``."""
        found = self.data["parts"][part]
        found["left_out"].remove(title)
        found["rows"].append(dict(row))
        self._write()

    def note(self, part: str, facts: Mapping[str, Any]) -> None:
        """Keep facts of a part beside its rows."""
        self.data["parts"][part].update(facts)
        self._write()

    def end(self, how: str) -> None:
        """Say how the run ended."""
        self.data["ended"] = how
        self._write()

    def _write(self) -> None:
        if self._path is None:
            return
        self.data["summary"] = summarise(self.data)
        save(self._path, self.data)


def save(path: Path, data: Mapping[str, Any]) -> None:
    """Replace ``path`` at once, so that whoever reads it never finds half of it."""
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(data, indent=1) + "\n")
    partial.replace(path)


def summarise(data: Mapping[str, Any]) -> dict[str, Any]:
    """Scores of each mode, where the op is behind, and the goals."""
    parts = data["parts"]
    forward, graph = (parts.get(part, {}).get("rows", []) for part in ("forward", "graph"))
    measured = {"launch_free": forward, "host_issued": forward, "graph": graph}
    return {
        "scores": {mode: score.scores(rows, mode) for mode, rows in measured.items() if rows},
        "slower_than_nccl": {mode: score.slower(rows, mode) for mode, rows in measured.items() if rows},
        "goals": score.goals(data),
    }
