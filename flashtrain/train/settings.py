"""The settings of a run that belong to the loop itself."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from flashtrain.errors import UserError
from flashtrain.parallel.recompute import Policy


@dataclass(frozen=True, kw_only=True)
class Training:
    """What is trained, for how long.

    ``batch`` counts the sequences of a step over all ranks; each rank runs its share in ``accumulate``
    micro-batches. ``evaluate_every`` steps, 0: at the end alone, on ``evaluation_windows`` sequences.
    ``init_from``: a checkpoint, a run or a folder of ``flashtrain convert hf2ft`` whose weights a fresh run
    starts with, rounded to ``dtype``; the optimizer starts anew, at step 1.
    ``document_mask``: tokens attend to their own document alone, as the tokenizer's boundary ends it.
    ``recompute``: activations to compute again in the backward pass instead of keeping them (none; pointwise:
    norms and activations; attention: and attention; full: whole blocks). It changes memory and time, no bit.
    """

    steps: int = 1000
    seed: int = 0
    dtype: Literal["float32", "bfloat16"] = "float32"
    batch: int = 8
    sequence: int = 128
    accumulate: int = 1
    evaluate_every: int = 0
    evaluation_windows: int = 256
    init_from: Path | None = None
    document_mask: bool = False
    recompute: Policy = "none"

    def validate(self, data_degree: int, context_degree: int = 1) -> None:
        """Raise UserError for a value out of range, or a batch or sequences that the ranks cannot share."""
        for name in ("steps", "batch", "sequence", "accumulate", "evaluation_windows"):
            if getattr(self, name) < 1:
                raise UserError(f"train.{name} is {getattr(self, name)}; it must be at least 1")
        for name in ("seed", "evaluate_every"):
            if getattr(self, name) < 0:
                raise UserError(f"train.{name} is {getattr(self, name)}; it must not be negative")
        if self.seed >= 2**64:
            raise UserError(f"train.seed is {self.seed}; it must be below 2**64")
        if self.batch % (data_degree * self.accumulate):
            raise UserError(
                f"train.batch is {self.batch}; parallel.data {data_degree} x train.accumulate "
                f"{self.accumulate} must divide it"
            )
        if self.sequence % context_degree:
            raise UserError(
                f"train.sequence is {self.sequence}; parallel.context {context_degree} must divide it"
            )
        if self.document_mask and context_degree > 1:
            raise UserError(
                f"train.document_mask is true, but documents do not end where segments do: set it to false, "
                f"or parallel.context {context_degree} to 1"
            )


@dataclass(frozen=True, kw_only=True)
class Checkpointing:
    """Save each ``every`` steps (0: never in between) and after the last one; the last ``keep`` stay.

    ``background``: copy to host memory, and write while training goes on. A save that fails then ends the
    run one step later, or at the next save.
    """

    every: int = 100
    keep: int = 2
    background: bool = False

    def validate(self) -> None:
        """Raise UserError for a value out of range."""
        if self.every < 0:
            raise UserError(f"checkpoint.every is {self.every}; it must not be negative")
        if self.keep < 1:
            raise UserError(f"checkpoint.keep is {self.keep}; it must be at least 1")
