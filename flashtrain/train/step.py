"""One training step: forward, backward, update. No input, no output, no clock but its own."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from flashtrain.comm import collectives, transport
from flashtrain.comm.transport.base import clock
from flashtrain.nn.attend import Documents
from flashtrain.parallel.mesh import TENSOR, token_ranks
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


class StepUnderWay:
    """A step that the host has enqueued; on a GPU it may still run.

    What is read of it was copied to the host behind its update, so reading waits for that step alone.
    """

    def __init__(self, numbers: Tensor, read: Callable[[list[float]], StepResult]) -> None:
        self._read, self._result = read, None
        self._numbers, self._copied = numbers, None
        if numbers.is_cuda:
            self._numbers = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True)
            self._numbers.copy_(numbers, non_blocking=True)
            self._copied = torch.cuda.Event()
            self._copied.record()

    _result: StepResult | None
    _copied: torch.cuda.Event | None

    def result(self) -> StepResult:
        """What came of it. Raises UserError if too many steps in a row made no update, TransportError if an
        operation of it failed.
        """
        if self._result is None:
            if self._copied is not None:
                self._copied.synchronize()
            self._result = self._read(self._numbers.tolist())
        return self._result


class TrainStep:
    """Runs ``model(tokens, targets) -> loss`` over micro-batches and updates the parameters once."""

    def __init__(
        self, model: nn.Module, mesh: DeviceMesh, optimizer: AdamW, skips: SkipRule, faults: FaultPlan
    ) -> None:
        self.model, self.mesh, self.optimizer = model, mesh, optimizer
        self.skips, self.faults = skips, faults
        self._latest: StepUnderWay | None = None

    def __call__(
        self,
        step: int,
        learning_rate: float,
        micro_batches: Sequence[Batch],
        notes: Callable[[], Sequence[float]] = tuple,
    ) -> StepResult:
        """``begin``, and the result as soon as there is one."""
        return self.begin(step, learning_rate, micro_batches, notes).result()

    def begin(
        self,
        step: int,
        learning_rate: float,
        micro_batches: Sequence[Batch],
        notes: Callable[[], Sequence[float]] = tuple,
    ) -> StepUnderWay:
        """``micro_batches`` begin with tokens and targets ``[S, B]`` of equal size; ``step`` counts from 1.

        What ``notes`` gives after the backward pass travels to every rank beside the loss, so it costs no
        message of its own. The host waits for the step before at most, whose norm decides which norm this one
        may have; and for this one if it drew random numbers, which a skipped step gives back. Raises
        UserError on all ranks if too many steps in a row had to be skipped.
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
        if self._latest is not None:
            self._latest.result()
        norm = self.optimizer.step(learning_rate, step - self.skips.count, self.skips.limit)
        traffic = [mover.traffic for mover in transport.in_use()]
        exposed, in_flight = sum(t.exposed for t in traffic), sum(t.in_flight for t in traffic)

        def read(numbers: list[float]) -> StepResult:
            loss_value, grad_norm, *others = numbers
            # What the device has come past by now: an operation that failed there is known.
            for mover in transport.in_use():
                mover.check()
            if not self.skips.accepts(grad_norm):
                _set_rng_states(rng)
            width = len(others) // everyone.shape[0]
            return StepResult(
                loss=loss_value,
                grad_norm=grad_norm,
                arithmetic=max(0.0, passes - added),
                exposed=exposed,
                overlap=None if in_flight <= 0 else max(0.0, 1.0 - exposed / in_flight),
                notes=[others[rank * width : (rank + 1) * width] for rank in range(everyone.shape[0])],
                skipped=self.skips.reason,
            )

        numbers = torch.cat([torch.stack([loss.double(), norm]), everyone[:, 1:].flatten()])
        self._latest = StepUnderWay(numbers, read)
        if any(not torch.equal(now, then) for now, then in zip(_rng_states(), rng, strict=True)):
            self._latest.result()
        return self._latest

    def _exchange(self, loss: Tensor, notes: Sequence[float]) -> tuple[Tensor, Tensor]:
        """The mean loss over ranks that see other tokens, in their order, and each rank's loss and notes."""
        everyone = torch.tensor([[0.0, *notes]], dtype=torch.float64)
        if loss.is_cuda:  # from pinned memory, so that the host does not wait
            everyone = everyone.pin_memory().to(loss.device, non_blocking=True)
        everyone[0, 0] = loss
        for ranks in (self.mesh[TENSOR], token_ranks(self.mesh)):
            if ranks.size() > 1:
                everyone = collectives.all_gather(everyone, ranks.get_group().group_name, "mean loss")
        # Ranks are numbered with the tensor dimension innermost; each takes the losses of its own column.
        tensor = self.mesh[TENSOR]
        losses = everyone[tensor.get_local_rank() :: tensor.size(), 0].to(loss.dtype)
        return losses.mean(), everyone


def _rng_states() -> list[Tensor]:
    states = [torch.get_rng_state()]
    return [*states, torch.cuda.get_rng_state()] if torch.cuda.is_available() else states


def _set_rng_states(states: list[Tensor]) -> None:
    torch.set_rng_state(states[0])
    if len(states) > 1:
        torch.cuda.set_rng_state(states[1])


def mean_over_tokens(value: Tensor, mesh: DeviceMesh) -> Tensor:
    """Mean of a scalar over ranks that see other tokens, added in rank order: the same bits on every rank."""
    ranks = token_ranks(mesh)
    if ranks.size() == 1:
        return value
    return collectives.all_gather(value.reshape(1), ranks.get_group().group_name, "mean loss").mean()
