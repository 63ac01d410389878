"""AdamW over many tensors: the kernels against fp64 and against torch's fused step."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from flashtrain.errors import UserError
from flashtrain.kernels.adamw import op
from flashtrain.kernels.adamw.slot import Hyperparameters, Slot
from tests.kernels.interpreter import DEVICE, ON_GPU, interpreted

with interpreted():
    from flashtrain.kernels.adamw import triton as kernels

SIZES = [(70, 90), (3,), (1,), (4096,), (64, 64), (4097,)]
VALUES = Hyperparameters(rate=1e-2, beta1=0.9, beta2=0.95, epsilon=1e-8, decay=0.1, update=1)


def slots_of(dtypes: list[torch.dtype]) -> list[Slot]:
    torch.manual_seed(0)
    slots = []
    for size, dtype in zip(SIZES, dtypes, strict=True):
        weight = torch.randn(size).to(dtype).to(DEVICE)
        master = weight if dtype == torch.float32 else weight.float()
        slots.append(
            Slot(weight, master, torch.zeros_like(master), torch.zeros_like(master), weight.dim() > 1)
        )
    return slots


def gradients_of(step: int) -> list[Tensor | None]:
    torch.manual_seed(step)
    found: list[Tensor | None] = [torch.randn(size).to(DEVICE) for size in SIZES]
    found[2] = None
    return found


def scalar(value: float, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.tensor(value, dtype=dtype, device=DEVICE)


def run(make: Callable[..., op.Optimizer], slots: list[Slot], steps: int = 4) -> list[Tensor]:
    one = make(slots, 3)
    for step in range(1, steps + 1):
        values = Hyperparameters(**vars(VALUES) | {"update": step})
        one.update(gradients_of(step), scalar(0.3), scalar(True, torch.bool), values)
    return [t.clone() for slot in slots for t in (slot.weight, slot.master, slot.mean, slot.variance)]


def truth(slots: list[Slot], steps: int = 4) -> list[tuple[Tensor, ...]]:
    """Masters and moments in fp64, by the formulas of the paper."""
    state = [[slot.master.double(), slot.mean.double(), slot.variance.double()] for slot in slots]
    for step in range(1, steps + 1):
        for slot, (master, mean, variance), gradient in zip(slots, state, gradients_of(step), strict=True):
            if gradient is None:
                continue
            gradient = 0.3 * gradient.double()
            if slot.decays:
                master *= 1 - VALUES.rate * VALUES.decay
            mean.mul_(0.9).add_(gradient, alpha=0.1)
            variance.mul_(0.95).addcmul_(gradient, gradient, value=0.05)
            root = (variance / (1 - 0.95**step)).sqrt() + VALUES.epsilon
            master -= VALUES.rate * mean / (1 - 0.9**step) / root
    return [tuple(tensors) for tensors in state]


NARROW = [torch.bfloat16] * 6
MIXED = [torch.bfloat16, torch.float32, torch.float32, torch.float16, torch.bfloat16, torch.bfloat16]


@pytest.mark.parametrize("dtypes", [[torch.float32] * 6, NARROW, MIXED])
@pytest.mark.parametrize("make", [op._Kernels, op._Plain])
def test_masters_and_moments_equal_fp64(make: Callable[..., op.Optimizer], dtypes: list[torch.dtype]) -> None:
    slots = slots_of(dtypes)
    wanted = truth(slots)
    found = run(make, slots)
    for index, true in enumerate(wanted):
        weight, *rest = found[4 * index : 4 * index + 4]
        for one, other in zip(rest, true, strict=True):
            torch.testing.assert_close(one.double(), other, rtol=2e-6, atol=1e-7)
        # Triton's interpreter cuts bf16 off where a GPU rounds.
        cut = make is op._Kernels and not ON_GPU and weight.dtype == torch.bfloat16
        bound = torch.finfo(torch.bfloat16).eps if cut else 0.0
        torch.testing.assert_close(weight, rest[0].to(weight.dtype), rtol=bound, atol=0.0)
    again = run(make, slots_of(dtypes))
    assert all(torch.equal(one, other) for one, other in zip(found, again, strict=True))


@pytest.mark.parametrize("wide", [(), (0,), (1, 4)])
@pytest.mark.parametrize("make", [op._Kernels, op._Plain])
def test_gradients_of_the_weights_dtype_are_those_in_fp32(
    make: Callable[..., op.Optimizer], wide: tuple[int, ...], poisoned_memory: None
) -> None:
    """Some in fp32 beside them, too."""
    found = []
    for narrow in (True, False):
        slots = slots_of(MIXED)
        rounded = [
            None if g is None else g.to(slot.weight.dtype)
            for g, slot in zip(gradients_of(1), slots, strict=True)
        ]
        given = [g if g is None or (narrow and at not in wide) else g.float() for at, g in enumerate(rounded)]
        one = make(slots, 3)
        squares = one.squares(given)
        one.update(given, scalar(0.3), scalar(True, torch.bool), VALUES)
        found.append(
            [squares, *(t for slot in slots for t in (slot.weight, slot.master, slot.mean, slot.variance))]
        )
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_only_gradients_beside_wider_ones_are_copied() -> None:
    """Those that were summed over ranks are fp32; those that ranks hold parts of are read as they are."""
    one = op._Kernels(slots_of(NARROW), 3)
    given = [g if g is None or at >= 3 else g.bfloat16() for at, g in enumerate(gradients_of(1))]
    read, dtypes = one._uniform(given)
    assert all(one is other for one, other in zip(read, given, strict=True))
    assert dtypes == [torch.bfloat16, torch.float32]


def test_tensors_that_do_not_lie_on_16_bytes() -> None:
    memory = [torch.randn(5001, generator=torch.Generator().manual_seed(n)) for n in range(3)]
    odd = [m.to(DEVICE)[1:] for m in memory]
    slot = Slot(odd[0], odd[0], odd[1].zero_(), odd[2].zero_(), False)
    before = odd[0].double().clone()
    gradient = torch.ones(5001, device=DEVICE)[1:]
    op._Kernels([slot], 1).update([gradient], scalar(1.0), scalar(True, torch.bool), VALUES)
    torch.testing.assert_close(odd[0].double(), before - 0.01, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("make", [op._Kernels, op._Plain])
def test_a_step_that_is_not_accepted_changes_nothing(make: Callable[..., op.Optimizer]) -> None:
    slots = slots_of(NARROW)
    before = [t.clone() for slot in slots for t in (slot.weight, slot.master, slot.mean, slot.variance)]
    gradients = gradients_of(1)
    gradients[0] = torch.full(SIZES[0], torch.inf, device=DEVICE)
    make(slots, 3).update(gradients, scalar(torch.nan), scalar(False, torch.bool), VALUES)
    after = [t for slot in slots for t in (slot.weight, slot.master, slot.mean, slot.variance)]
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))


@pytest.mark.parametrize("make", [op._Kernels, op._Plain])
@pytest.mark.parametrize("divided", [0, 3, 6])
def test_squared_norms(make: Callable[..., op.Optimizer], divided: int, poisoned_memory: None) -> None:
    gradients = gradients_of(1)
    found = make(slots_of(NARROW), divided).squares(gradients)
    wide = [0.0 if g is None else float(g.double().square().sum()) for g in gradients]
    wanted = [sum(wide[:divided]), sum(wide[divided:])]
    assert found.dtype == torch.float64
    assert found.tolist() == pytest.approx(wanted, rel=1e-6)


@pytest.mark.parametrize("bad", [torch.inf, torch.nan])
def test_a_norm_that_is_none_is_seen(bad: float) -> None:
    gradients = gradients_of(1)
    assert gradients[4] is not None
    gradients[4][5, 6] = bad
    found = op._Kernels(slots_of(NARROW), 3).squares(gradients)
    assert torch.isfinite(found).tolist() == [True, False]


def test_gradients_that_moved_are_found() -> None:
    slots = slots_of(NARROW)
    one = op._Kernels(slots, 6)
    first = one.squares(gradients_of(1))
    kept = gradients_of(2)
    assert not torch.equal(one.squares(kept), first)
    kept[0] = None
    fewer = sum(float(g.double().square().sum()) for g in kept if g is not None)
    assert float(one.squares(kept)[0]) == pytest.approx(fewer)


def test_weights_of_other_dtypes_are_refused() -> None:
    wide = torch.zeros(3, dtype=torch.float64)
    with pytest.raises(UserError, match="updates fp32, bf16 and fp16 weights"):
        op._Kernels([Slot(wide, wide.float(), wide.float(), wide.float(), False)], 1)
    assert kernels.BLOCK == 4096
