"""Faults on purpose: what can go wrong with a rank, at a step, for tests and drills."""

import errno
import logging
import os
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from flashtrain.errors import UserError
from flashtrain.metrics import events

log = logging.getLogger("flashtrain.train")

_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC


@dataclass(frozen=True, kw_only=True)
class Fault:
    """One fault, on ``rank`` at the beginning of ``step`` or in its gradients.

    kill: the process ends by SIGKILL. delay: it sleeps ``seconds``. full: from here to the end of the
    process, the disk of the checkpoints is full for it. These three strike once in a run's folder, so a run
    that is started again gets past them. inf: the largest gradient element of the rank becomes infinite.
    flip: its highest exponent bit flips, as in a damaged memory cell. These two are a part of what the run
    computes, and strike whenever the step is computed.
    """

    kind: Literal["kill", "delay", "full", "inf", "flip"]
    step: int
    rank: int = 0
    seconds: float = 1.0

    def __str__(self) -> str:
        return f"{self.kind} on rank {self.rank} at step {self.step}"


def validate(faults: Sequence[Fault], world: int) -> None:
    """Raise UserError for a fault that could never strike."""
    for fault in faults:
        if fault.step < 1:
            raise UserError(f"faults: step {fault.step} of {fault.kind}; steps are counted from 1")
        if not 0 <= fault.rank < world:
            raise UserError(f"faults: {fault}; the run has ranks 0 to {world - 1}")
        if not fault.seconds > 0:
            raise UserError(f"faults: {fault} has seconds {fault.seconds}; it must be above 0")


class FaultPlan:
    """The faults of one rank. ``out`` is the run's folder, ``protected`` the one that a full disk is for."""

    def __init__(self, faults: Sequence[Fault], rank: int, out: Path, protected: Path) -> None:
        self._faults = [fault for fault in faults if fault.rank == rank]
        self._out, self._protected = out, protected.absolute()
        self._full = False
        for fault in faults:
            log.warning("fault plan: %s", fault)
        if any(fault.kind == "full" for fault in self._faults):
            sys.addaudithook(self._refuse_to_write)

    def before_step(self, step: int) -> None:
        """Strike with what ends or slows this process."""
        for fault in self._faults:
            if fault.step == step and fault.kind in ("kill", "delay", "full") and self._first_time(fault):
                self._record(fault)
                match fault.kind:
                    case "kill":
                        os.kill(os.getpid(), signal.SIGKILL)
                    case "delay":
                        time.sleep(fault.seconds)
                    case "full":
                        self._full = True

    def spoil(self, step: int, gradients: Mapping[str, Tensor]) -> None:
        """Strike the gradients of ``step``, fp32 tensors of any shape ``[...]``, in place."""
        for fault in self._faults:
            if fault.step == step and fault.kind in ("inf", "flip"):
                self._record(fault)
                held = [gradient for gradient in gradients.values() if gradient.numel()]
                flat = max(held, key=lambda gradient: float(gradient.abs().max())).view(-1)
                place = int(flat.abs().argmax())
                flat[place] = torch.inf if fault.kind == "inf" else _flipped(float(flat[place]))

    def _first_time(self, fault: Fault) -> bool:
        folder = self._out / "faults"
        folder.mkdir(parents=True, exist_ok=True)
        try:
            (folder / f"{fault.kind}-{fault.step}-{fault.rank}").touch(exist_ok=False)
        except FileExistsError:
            return False
        return True

    def _record(self, fault: Fault) -> None:
        detail = {"rank": fault.rank, "reason": f"fault plan: {fault.kind}"}
        events.record(self._out, events.Event("fault", fault.step, detail))

    def _refuse_to_write(self, event: str, arguments: tuple[Any, ...]) -> None:
        """An audit hook, because files are opened by libraries too, and it meets all of them."""
        if not self._full or event != "open" or not isinstance(arguments[2], int):
            return
        if arguments[2] & _WRITING and isinstance(arguments[0], str | os.PathLike):
            path = Path(os.fspath(arguments[0]))
            if self._protected in path.parents:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))


def _flipped(value: float) -> float:
    bits = torch.tensor([value]).view(torch.int32) ^ (1 << 30)
    return float(bits.view(torch.float32))
