"""What watches a run: settings, and the callbacks that they mean."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from flashtrain.errors import UserError
from flashtrain.methods.callback import Callback
from flashtrain.parallel.sites import Site
from flashtrain.train.dashboards import LOOPBACK, Prometheus, WeightsAndBiases
from flashtrain.train.profiling import MemorySnapshot, Profiler
from flashtrain.train.progress import ProgressBar
from flashtrain.train.sinks import JsonLines, LossPlot, TensorBoard
from flashtrain.train.site_table import SiteTable
from flashtrain.train.telemetry import GpuTelemetry


@dataclass(frozen=True, kw_only=True)
class Watching:
    """Who sees what of a run. Nothing of it changes what the run computes.

    ``tensorboard``: write events for it. ``wandb``: the project of Weights & Biases to log to.
    ``prometheus_port``: serve the last step's metrics there (0: a free port) on ``prometheus_address``;
    there is no password, so any address but the loopback shows them to whoever reaches it.
    ``telemetry_every``: read power, clocks, throttling, NVLink and ECC counters of each rank's GPU every so
    many steps (0: never). ``profile_steps``: steps to trace with torch's profiler, on every rank.
    ``memory_steps``: steps after which to write what the CUDA allocator holds, on every rank.
    """

    tensorboard: bool = True
    wandb: str | None = None
    prometheus_port: int | None = None
    prometheus_address: str = LOOPBACK
    telemetry_every: int = 0
    profile_steps: tuple[int, ...] = ()
    memory_steps: tuple[int, ...] = ()

    def validate(self, steps: int) -> None:
        """Raise UserError for a value out of range, or a step that a run of ``steps`` does not reach."""
        if self.wandb is not None and not self.wandb.strip():
            raise UserError("watch.wandb is empty; give the name of a project, or None")
        if self.prometheus_port is not None and not 0 <= self.prometheus_port <= 65535:
            raise UserError(f"watch.prometheus_port is {self.prometheus_port}; it must be 0 to 65535")
        if self.telemetry_every < 0:
            raise UserError(f"watch.telemetry_every is {self.telemetry_every}; it must not be negative")
        for name in ("profile_steps", "memory_steps"):
            for step in getattr(self, name):
                if not 1 <= step <= steps:
                    raise UserError(f"watch.{name} names step {step}; the run has steps 1 to {steps}")


def build_callbacks(
    settings: Watching, rank: int, device: torch.device, sites: Sequence[Site], unigram_entropy: float
) -> list[Callback]:
    """The callbacks of ``rank``: rank 0 has those that speak for the whole run as well."""
    own: list[Callback] = []
    if settings.profile_steps:
        own.append(Profiler(settings.profile_steps, rank))
    if settings.memory_steps:
        own.append(MemorySnapshot(settings.memory_steps, rank, device))
    if settings.telemetry_every:
        own.append(GpuTelemetry(settings.telemetry_every, rank, device))
    if rank != 0:
        return own
    # What may refuse to start goes first: nothing has been written then.
    shown: list[Callback] = []
    if settings.prometheus_port is not None:
        shown.append(Prometheus(settings.prometheus_port, settings.prometheus_address))
    if settings.wandb is not None:
        shown.append(WeightsAndBiases(settings.wandb))
    kept: list[Callback] = [JsonLines(), LossPlot(unigram_entropy)]
    if settings.tensorboard:
        kept.append(TensorBoard())
    return [*shown, *own, SiteTable(sites), ProgressBar(), *kept]
