"""What a run measures: the peak of the hardware, memory, one record a step, and its events."""

from flashtrain.metrics.events import Event
from flashtrain.metrics.flops import peak_flops
from flashtrain.metrics.memory import current_memory, peak_memory, reset_peak_memory
from flashtrain.metrics.report import StepMetrics

__all__ = [
    "Event",
    "StepMetrics",
    "current_memory",
    "peak_flops",
    "peak_memory",
    "reset_peak_memory",
]
