"""What a rank gets of a run's samples: micro-batches of each step, and a share of the held-out windows."""

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from flashtrain.data.source import HeldOut, Source
from flashtrain.nn.attend import Documents
from flashtrain.parallel.context import own_segment
from flashtrain.parallel.mesh import DATA
from flashtrain.train.settings import Training
from flashtrain.train.step import Batch, mean_over_tokens


class Batches:
    """The samples of ``source`` on this rank's device. Raises UserError for too little text."""

    def __init__(self, source: Source, train: Training, mesh: DeviceMesh, device: torch.device) -> None:
        self._train, self._mesh, self._device = train, mesh, device
        self._boundary = source.tokenizer.boundary if train.document_mask else None
        self._samples = source.samples(train.sequence, train.seed)
        held_out = source.held_out(train.sequence, train.evaluation_windows)
        self.unigram_entropy = held_out.unigram_entropy
        self._windows_a_rank = len(held_out.inputs) / mesh[DATA].size()
        self._held_out = self._own_share(held_out)

    def of(self, step: int) -> list[Batch]:
        """This rank's micro-batches of ``step``. Samples are numbered over the whole run and all ranks."""
        train, ranks = self._train, self._mesh[DATA]
        share = train.batch // ranks.size()
        size = share // train.accumulate
        first = (step - 1) * train.batch + ranks.get_local_rank() * share
        return [
            self._on_device(*self._samples.batch(first + i * size, size)) for i in range(train.accumulate)
        ]

    @torch.no_grad()
    def held_out_loss(self, model: nn.Module) -> float:
        """Held-out loss in nats per token over the windows of all ranks, each counted once."""
        total = torch.zeros((), dtype=torch.float64, device=self._device)
        for windows, batch in self._held_out:
            total += model(*batch).double() * windows
        return float(mean_over_tokens(total / self._windows_a_rank, self._mesh))

    def _own_share(self, held_out: HeldOut) -> list[tuple[int, Batch]]:
        """This data rank's share of the held-out windows, in batches of the training step's size.

        As many on every rank, since ranks meet in each: one that has no window left runs another's, as none.
        """
        ranks, windows = self._mesh[DATA], len(held_out.inputs)
        share = -(-windows // ranks.size())
        size = self._train.batch // (ranks.size() * self._train.accumulate)
        first, found = ranks.get_local_rank() * share, []
        for begin in range(first, first + share, size):
            count = max(0, min(begin + size, first + share, windows) - begin)
            rows = slice(begin, begin + count) if count else slice(0, 1)
            found.append((count, self._on_device(held_out.inputs[rows], held_out.targets[rows])))
        return found

    def _on_device(self, tokens: Tensor, targets: Tensor) -> Batch:
        """``[B, S]`` as the sampler gives it -> this rank's segment ``[S, B]`` as the model takes it."""
        taken = tuple(own_segment(part, self._mesh).t().contiguous() for part in (tokens, targets))
        if self._device.type == "cuda":  # from pinned memory, so that the host does not wait
            taken = taken[0].pin_memory(), taken[1].pin_memory()
        batch = taken[0].to(self._device, non_blocking=True), taken[1].to(self._device, non_blocking=True)
        if self._boundary is None:
            return batch
        return *batch, Documents.of(tokens, self._boundary, self._device)
