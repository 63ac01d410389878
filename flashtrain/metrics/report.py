"""The record of one training step."""

import json
import math
from dataclasses import dataclass, fields
from typing import Any


@dataclass(frozen=True)
class StepMetrics:
    """What one step did and cost; None means unknown and is shown as n/a.

    ``tokens`` counts from the start of training over all ranks; rates are per second over all ranks but
    ``tflops_per_s``, which is per rank and counts model FLOPs. Shares lie in [0, 1].
    """

    step: int
    loss: float  # nats per token
    grad_norm: float  # before clipping
    learning_rate: float
    tokens: int
    tokens_per_s: float
    tflops_per_s: float
    mfu: float | None  # None where the device's peak is not known
    overlap: float | None  # share of the communication time that is hidden; None without communication
    exposed_s: float  # communication time that is not hidden
    overhead: float  # share of the step that is not model arithmetic
    memory_bytes: int | None  # peak
    step_s: float

    def as_json(self) -> str:
        """One line of JSON that ``from_json`` reads back to the same bits.

        JSON has no number for NaN and the infinities: they become the strings that ``float`` reads.
        """
        return json.dumps({field.name: to_json(getattr(self, field.name)) for field in fields(self)})

    @classmethod
    def from_json(cls, line: str) -> "StepMetrics":
        """The metrics that ``as_json`` wrote. Raises ValueError for anything else."""
        record = json.loads(line)
        names = {field.name for field in fields(cls)}
        if not isinstance(record, dict) or set(record) != names:
            raise ValueError(f"not the metrics of a step: {line.strip()[:80]!r}")
        return cls(**{name: from_json(value) for name, value in record.items()})


def to_json(value: Any) -> Any:
    """``value``, or the name of a float that JSON has no number for."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def from_json(value: Any) -> Any:
    """The inverse of ``to_json``."""
    return float(value) if isinstance(value, str) else value
