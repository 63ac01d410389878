"""One training step: forward, backward, update. No input, no output, no clock but its own."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from flashtrain.comm import ops, transport
from flashtrain.comm.transport.base import clock
from flashtrain.nn.attend import Documents
from flashtrain.parallel.mesh import DATA, TENSOR
from flashtrain.train.faults import FaultPlan
from flashtrain.train.optimizer import AdamW
from flashtrain.train.skips import SkipRule

# What the model is called with: tokens, targets, and documents where they are told apart.
Batch = tuple[Tensor, Tensor] | tuple[Tensor, Tensor, Documents]


@dataclass(frozen=True)
class StepResult:
    """``loss`` is the mean over all tokens of the step, on all ranks; times in seconds on this rank.

    ``notes`` are what each rank gave to the step, in rank order; ``skipped`` is why it made no update.
    ``arithmetic`` is the time of the model's forward and backward passes without what their
    communication added: waiting, copies, additions, and the processor time of the transport's threads.
    """

    loss: float
    grad_norm: float
    arithmetic: float
    exposed: float
    overlap: float | None
    notes: list[list[float]]
    skipped: str | None


class TrainStep:
    """Runs ``model(tokens, targets) -> loss`` over micro-batches and updates the parameters once."""

    def __init__(
        self, model: nn.Module, mesh: DeviceMesh, optimizer: AdamW, skips: SkipRule, faults: FaultPlan
    ) -> None:
        self.model, self.mesh, self.optimizer = model, mesh, optimizer
        self.skips, self.faults = skips, faults

    def __call__(
        self,
        step: int,
        learning_rate: float,
        micro_batches: Sequence[Batch],
        notes: Callable[[], Sequence[float]] = tuple,
    ) -> StepResult:
        """``micro_batches`` begin with tokens and targets ``[S, B]`` of equal size; ``step`` counts from 1.

        What ``notes`` gives after the backward pass travels to every rank beside the loss, so it costs no
        message of its own. Raises UserError on all ranks if too many steps in a row had to be skipped.
        """
        rng = _rng_states()
        for mover in transport.in_use():
            mover.traffic.reset()
        started = clock()
        losses = []
        for batch in micro_batches:
            loss = self.model(*batch)
            (loss / len(micro_batches)).backward()
            self.optimizer.accumulate()
            losses.append(loss.detach())
        passes = clock() - started
        traffic = [mover.traffic for mover in transport.in_use()]
        added = sum(t.exposed + t.handling + t.copying for t in traffic)
        loss, everyone = self._exchange(torch.stack(losses).mean(), notes())
        self.faults.spoil(step, self.optimizer.gradients)
        grad_norm = self.optimizer.step(learning_rate, step - self.skips.count, self.skips.accepts)
        if self.skips.reason is not None:
            _set_rng_states(rng)
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
            notes=everyone,
            skipped=self.skips.reason,
        )

    def _exchange(self, loss: Tensor, notes: Sequence[float]) -> tuple[Tensor, list[list[float]]]:
        """The mean loss over the data-parallel ranks, added in rank order, and the notes of all ranks."""
        everyone = torch.tensor([[0.0, *notes]], dtype=torch.float64, device=loss.device)
        everyone[0, 0] = loss
        for dimension in (TENSOR, DATA):
            ranks = self.mesh[dimension]
            if ranks.size() > 1:
                everyone = ops.all_gather(everyone, ranks.get_group().group_name, "mean loss")
        # Ranks are numbered with the tensor dimension innermost; each takes the losses of its own column.
        tensor = self.mesh[TENSOR]
        losses = everyone[tensor.get_local_rank() :: tensor.size(), 0].to(loss.dtype)
        return losses.mean(), everyone[:, 1:].tolist()


def _rng_states() -> list[Tensor]:
    states = [torch.get_rng_state()]
    return [*states, torch.cuda.get_rng_state()] if torch.cuda.is_available() else states


def _set_rng_states(states: list[Tensor]) -> None:
    torch.set_rng_state(states[0])
    if len(states) > 1:
        torch.cuda.set_rng_state(states[1])


def mean_over_data(value: Tensor, mesh: DeviceMesh) -> Tensor:
    """Mean of a scalar over the data-parallel ranks, added in rank order: the same bits on every rank."""
    ranks = mesh[DATA]
    if ranks.size() == 1:
        return value
    return ops.all_gather(value.reshape(1), ranks.get_group().group_name, "mean loss").mean()
