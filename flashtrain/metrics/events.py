"""What happens to a run beside its steps, one JSON object a line: ``{"event": kind, "step": n, "time": t}``.

Any word may be a kind, and any further keys with plain JSON values its detail. These mean the same in
every run, and reports know them:

    start          a run began at its first step        ranks, restart, machine
    resume         it went on from a checkpoint         ranks, restart, machine, checkpoint
    checkpoint     a checkpoint is complete             seconds
    end            the last step is done
    failure        an error ended the run               reason
    preempted      a signal asked the run to end        reason
    skipped_step   no update was made in this step      reason
    straggler      a rank was slower than the others    rank
    fault          the fault plan struck                rank, reason

The file is only ever added to, so it keeps what happened before a restart. A start or resume at step k
means that what came before it in the file at step k or later was done again.
"""

import json
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flashtrain.metrics.report import from_json, to_json

EVENTS = "events.jsonl"
BEGINNINGS = frozenset({"start", "resume"})
ENDINGS = frozenset({"end", "failure", "preempted"})
# What every run does: told from what deserves a person's attention.
ROUTINE = frozenset({"start", "checkpoint", "end"})


@dataclass(frozen=True)
class Event:
    """Something that happened at ``step`` (that was done, or failed); ``time`` in seconds since 1970."""

    kind: str
    step: int
    detail: Mapping[str, Any] = field(default_factory=dict)
    time: float = field(default_factory=time.time)

    def __post_init__(self) -> None:
        if clash := {"event", "step", "time"} & set(self.detail):
            raise ValueError(f"event {self.kind}: detail must not hold {', '.join(sorted(clash))}")

    def as_json(self) -> str:
        """One line of JSON that ``from_json`` reads back."""
        detail = {name: to_json(value) for name, value in self.detail.items()}
        return json.dumps({"event": self.kind, "step": self.step, "time": self.time, **detail})

    @classmethod
    def from_json(cls, line: str) -> "Event":
        """The event that ``as_json`` wrote. Raises ValueError for anything else."""
        record = json.loads(line)
        if not isinstance(record, dict):
            raise ValueError(f"not an event: {line.strip()[:80]!r}")
        kind, step, when = (record.pop(name, None) for name in ("event", "step", "time"))
        if not isinstance(kind, str) or type(step) is not int or type(when) not in (int, float):
            raise ValueError(f"not an event: {line.strip()[:80]!r}")
        return cls(kind, step, record, float(from_json(when)))

    def describe(self) -> str:
        """The event in one line without its time: ``step 12: skipped_step  reason: gradient norm is inf``."""
        words = [f"{name}: {value}" for name, value in self.detail.items() if name != "machine"]
        return "  ".join([f"step {self.step}: {self.kind}", *words])


def record(out: Path, event: Event) -> None:
    """Add ``event`` to the run's file; another process may do the same. A torn line before it is closed."""
    path = out / EVENTS
    with path.open("a+b") as file:
        # A process that was killed while it wrote leaves a line without an end.
        torn = file.tell() > 0 and _last_byte(path) != b"\n"
        # One write of an append-only file: lines of several writers do not mix.
        file.write((b"\n" if torn else b"") + event.as_json().encode() + b"\n")


def _last_byte(path: Path) -> bytes:
    with path.open("rb") as file:
        file.seek(-1, 2)
        return file.read(1)


def superseded(events: Iterable[Event]) -> list[bool]:
    """For each event in the order of the file, whether what it tells of was done again after a resume.

    Beginnings and endings are the history of the attempts themselves, which no later one undoes.
    """
    found, first = [], float("inf")
    for event in reversed(list(events)):
        found.append(event.step >= first and event.kind not in BEGINNINGS | ENDINGS)
        if event.kind in BEGINNINGS:
            first = min(first, event.step)
    return found[::-1]
