"""One rank of the run: its device and groups, and what ranks decide together."""

import time
from pathlib import Path

import torch
import torch.distributed as dist
from on_gpu.device import Cpu, Cuda, Device
from on_gpu.settings import Settings
from torch import Tensor

from flashtrain.comm import transport


class Ranks:
    """Everything here is collective unless it says otherwise.

    ``collective`` is the group of the plain collectives, ``ours`` the name of the ops' own. ``heartbeat`` is
    a file whose change tells the parent that the run goes on.
    """

    def __init__(self, settings: Settings, rank: int, heartbeat: Path) -> None:
        self.settings, self.rank, self.world = settings, rank, settings.world
        self._heartbeat = heartbeat
        self.device: Device = Cpu(rank) if settings.rehearse else Cuda(rank)
        self.collective = dist.new_group(backend=self.device.backend)
        transport.configure(transport.Settings(transport=self.device.transport))  # type: ignore[arg-type]
        self.ours = self.new_group()
        self._token = torch.zeros(1, device=self.device.device)

    def new_group(self) -> str:
        """The name of another group of all ranks; ops on it have a transport of their own."""
        return dist.new_group(backend=self.device.group_backend).group_name

    def meet(self) -> None:
        """Hosts wait for each other."""
        dist.barrier()

    def align(self) -> None:
        """Devices wait for each other before what is issued next; hosts do not, where there are devices."""
        dist.all_reduce(self._token, group=self.collective)

    def alive(self, doing: str = "") -> None:
        """Tell the parent that the run goes on. Not collective."""
        if self.rank == 0:
            if doing:
                print(f"  {doing}", flush=True)
                self._heartbeat.write_text(doing)
            else:
                self._heartbeat.touch()

    def slowest(self, values: Tensor) -> Tensor:
        """Element by element the maximum over the ranks of ``values``, on the CPU."""
        values = values.clone()
        dist.all_reduce(values, dist.ReduceOp.MAX)
        return values

    def complaint(self, problem: str) -> str:
        """The first rank's ``problem``, with its number; nothing if no rank has one."""
        everyone = transport.exchange_of(dist.group.WORLD.group_name)(problem)
        return next((f"rank {rank}: {text}" for rank, text in enumerate(everyone) if text), "")


class Budget:
    """Seconds that one part may take, by the clock of rank 0."""

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds

    def left(self) -> float:
        """Seconds left, the same on all ranks. Collective."""
        value = torch.tensor([self._end - time.monotonic()], dtype=torch.float64)
        dist.broadcast(value, 0)
        return float(value)
