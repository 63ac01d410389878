"""One training step: forward, backward, update. No input, no output, no clock but its own."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from flashtrain.comm import ops, transport
from flashtrain.comm.transport.base import clock
from flashtrain.parallel.mesh import DATA
from flashtrain.train.optimizer import AdamW

Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class StepResult:
    """``loss`` is the mean over all tokens of the step, on all ranks; times in seconds on this rank.

    ``arithmetic`` is the time of the model's forward and backward passes without what their
    communication added: waiting, copies, additions, and the processor time of the transport's threads.
    """

    loss: float
    grad_norm: float
    arithmetic: float
    exposed: float
    overlap: float | None


class TrainStep:
    """Runs ``model(tokens, targets) -> loss`` over micro-batches and updates the parameters once."""

    def __init__(self, model: nn.Module, mesh: DeviceMesh, optimizer: AdamW) -> None:
        self.model, self.mesh, self.optimizer = model, mesh, optimizer

    def __call__(self, step: int, learning_rate: float, micro_batches: Sequence[Batch]) -> StepResult:
        """``micro_batches`` are (tokens, targets) ``[S, B]`` of equal size; ``step`` counts from 1."""
        for mover in transport.in_use():
            mover.traffic.reset()
        started = clock()
        losses = []
        for tokens, targets in micro_batches:
            loss = self.model(tokens, targets)
            (loss / len(micro_batches)).backward()
            self.optimizer.accumulate()
            losses.append(loss.detach())
        passes = clock() - started
        traffic = [mover.traffic for mover in transport.in_use()]
        added = sum(t.exposed + t.handling + t.copying for t in traffic)
        loss = mean_over_data(torch.stack(losses).mean(), self.mesh)
        grad_norm = self.optimizer.step(learning_rate, step)
        traffic = [mover.traffic for mover in transport.in_use()]
        loss_value = float(loss)
        # Reading the loss waited for the device: an operation that failed there is known by now.
        for mover in transport.in_use():
            mover.check()
        exposed, in_flight = sum(t.exposed for t in traffic), sum(t.in_flight for t in traffic)
        return StepResult(
            loss=loss_value,
            grad_norm=grad_norm,
            arithmetic=max(0.0, passes - added),
            exposed=exposed,
            overlap=None if in_flight <= 0 else max(0.0, 1.0 - exposed / in_flight),
        )


def mean_over_data(value: Tensor, mesh: DeviceMesh) -> Tensor:
    """Mean of a scalar over the data-parallel ranks, added in rank order: the same bits on every rank."""
    ranks = mesh[DATA]
    if ranks.size() == 1:
        return value
    return ops.all_gather(value.reshape(1), ranks.get_group().group_name, "mean loss").mean()
