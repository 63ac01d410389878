"""AdamW (arXiv 1711.05101) over many tensors at once: a launch on a GPU, torch's fused step elsewhere."""

from collections.abc import Sequence
from itertools import groupby
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from flashtrain.errors import UserError
from flashtrain.kernels.adamw import reference
from flashtrain.kernels.adamw.slot import Hyperparameters, Slot


class Optimizer(Protocol):
    """Norms and updates of a fixed list of slots."""

    def squares(self, gradients: Sequence[Tensor | None]) -> Tensor:
        """Squared norms ``[2]`` in fp64: of the first ``divided`` gradients together, and of the others."""

    def update(
        self,
        gradients: Sequence[Tensor | None],
        factor: Tensor,
        accepted: Tensor,
        values: Hyperparameters,
    ) -> None:
        """Update every slot that has a gradient, times ``factor``, if ``accepted`` is true.

        Both are fp64 and bool scalars on the device of the slots; nothing waits for them on a GPU. Gradients
        are fp32 or of the weight's dtype, and may change.
        """


def optimizer(slots: Sequence[Slot], divided: int) -> Optimizer:
    """The way of the slots' device. Raises UserError for weights that the kernel does not take."""
    return _Kernels(slots, divided) if slots and slots[0].master.is_cuda else _Plain(slots, divided)


class _Plain:
    def __init__(self, slots: Sequence[Slot], divided: int) -> None:
        self.slots, self.divided = slots, divided

    def squares(self, gradients: Sequence[Tensor | None]) -> Tensor:
        return reference.squares(self.slots, gradients, self.divided)

    def update(
        self,
        gradients: Sequence[Tensor | None],
        factor: Tensor,
        accepted: Tensor,
        values: Hyperparameters,
    ) -> None:
        reference.update(self.slots, gradients, factor, accepted, values)


class _Run(NamedTuple):
    """Slots whose weights have one dtype, all divided or none, and their blocks."""

    dtype: torch.dtype
    slots: slice
    blocks: slice


class _Kernels:
    def __init__(self, slots: Sequence[Slot], divided: int) -> None:
        from flashtrain.kernels.adamw import triton

        self.kernels, self.slots = triton, slots
        self.device = slots[0].master.device
        for slot in slots:
            if slot.weight.dtype not in triton.DTYPES:
                raise UserError(
                    f"the optimizer updates fp32, bf16 and fp16 weights on a GPU, not {slot.weight.dtype}"
                )
            if not all(part.is_contiguous() for part in (slot.weight, slot.master, slot.mean, slot.variance)):
                raise UserError(
                    f"the optimizer updates contiguous weights on a GPU, not {list(slot.weight.shape)} with "
                    f"strides {list(slot.weight.stride())}: call contiguous() on it first"
                )
        counts = [-(-slot.master.numel() // triton.BLOCK) for slot in slots]
        blocks = torch.empty(sum(counts), 2, dtype=torch.int32)
        blocks[:, 0] = torch.repeat_interleave(torch.arange(len(slots)), torch.tensor(counts))
        blocks[:, 1] = torch.cat([torch.arange(count) for count in counts])
        self.blocks = blocks.to(self.device)
        self.first_others = sum(counts[:divided])
        # One launch for each run of slots whose weights have one dtype: of a usual model, one in all, or two,
        # since gradients that were summed over the ranks that divide the others may be wider than those.
        self.runs: list[_Run] = []
        first = begin = 0
        kinds = [(place < divided, slot.weight.dtype) for place, slot in enumerate(slots)]
        for (_, dtype), run in groupby(zip(kinds, counts, strict=True), key=lambda pair: pair[0]):
            of_run = [count for _, count in run]
            last, end = first + len(of_run), begin + sum(of_run)
            self.runs.append(_Run(dtype, slice(first, last), slice(begin, end)))
            first, begin = last, end
        parts = [(slot.master, slot.mean, slot.variance, slot.weight) for slot in slots]
        rows = [
            [*(part.data_ptr() for part in four), int(slot.decays)]
            for four, slot in zip(parts, slots, strict=True)
        ]
        self.tensors = torch.tensor(rows, dtype=torch.int64).to(self.device)
        self.sizes = torch.tensor([slot.master.numel() for slot in slots]).to(self.device)
        self.aligned = all(part.data_ptr() % 16 == 0 for four in parts for part in four)
        self.addresses: list[int] = []

    def squares(self, gradients: Sequence[Tensor | None]) -> Tensor:
        gradients, dtypes = self._uniform(gradients)
        aligned = self._point(gradients)
        partial = torch.empty(self.blocks.shape[0], dtype=torch.float64, device=self.device)
        for run, dtype in zip(self.runs, dtypes, strict=True):
            blocks = self.blocks[run.blocks]
            self.kernels.squares(blocks, self.gradients, self.sizes, partial[run.blocks], dtype, aligned)
        halves = partial[: self.first_others], partial[self.first_others :]
        return torch.stack([half.sum() for half in halves])

    def update(
        self,
        gradients: Sequence[Tensor | None],
        factor: Tensor,
        accepted: Tensor,
        values: Hyperparameters,
    ) -> None:
        gradients, dtypes = self._uniform(gradients)
        aligned = self._point(gradients) and self.aligned
        narrow = factor.float()
        scalars = (
            values.rate / (1 - values.beta1**values.update),
            (1 - values.beta2**values.update) ** -0.5,
            1 - values.rate * values.decay,
            1 - values.beta1,
            values.beta2,
            1 - values.beta2,
            values.epsilon,
        )
        for run, dtype in zip(self.runs, dtypes, strict=True):
            self.kernels.update(
                self.blocks[run.blocks],
                self.tensors,
                self.gradients,
                self.sizes,
                narrow,
                accepted,
                scalars,
                run.dtype,
                dtype,
                aligned,
            )

    def _uniform(self, gradients: Sequence[Tensor | None]) -> tuple[list[Tensor | None], list[torch.dtype]]:
        """Gradients of one dtype in each run, as its launches read them, and these dtypes."""
        found, dtypes = list(gradients), []
        for run in self.runs:
            own = {gradient.dtype for gradient in found[run.slots] if gradient is not None}
            dtypes.append(own.pop() if len(own) == 1 else torch.float32)
            if own:
                found[run.slots] = [None if g is None else g.float() for g in found[run.slots]]
        return found, dtypes

    def _point(self, gradients: Sequence[Tensor | None]) -> bool:
        """Tell the device where the gradients lie, if they have moved; whether they lie on 16 bytes."""
        addresses = [0 if gradient is None else gradient.data_ptr() for gradient in gradients]
        if addresses != self.addresses:
            table = torch.tensor(addresses, dtype=torch.int64)
            on_gpu = self.device.type == "cuda"  # not so in Triton's interpreter
            # From pinned memory, so that the host does not wait for all that was enqueued before.
            table = table.pin_memory() if on_gpu else table
            self.gradients, self.addresses = table.to(self.device, non_blocking=True), addresses
        return all(address % 16 == 0 for address in addresses)
