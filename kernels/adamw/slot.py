"""What AdamW works on, and with which numbers."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Slot:
    """One parameter: its fp32 ``master`` and moments, and the ``weight`` that is rounded from the master.

    All contiguous and of one shape. An fp32 weight is its own master.
    """

    weight: Tensor
    master: Tensor
    mean: Tensor
    variance: Tensor
    decays: bool


@dataclass(frozen=True)
class Hyperparameters:
    """Those of one step; ``update`` counts from 1 and sets the bias correction."""

    rate: float
    beta1: float
    beta2: float
    epsilon: float
    decay: float
    update: int
