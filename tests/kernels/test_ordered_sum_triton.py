"""The ordered sum as one kernel: the bits of the reference. Interpreted by Triton where there is no GPU."""

import os

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")
ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda", 0) if ON_GPU else torch.device("cpu")
_before = os.environ.get("TRITON_INTERPRET")
if not ON_GPU:
    os.environ["TRITON_INTERPRET"] = "1"  # read when the kernel is defined
from flashtrain.kernels.ordered_sum import choice, reference  # noqa: E402
from flashtrain.kernels.ordered_sum import triton as kernel  # noqa: E402

if _before is None:
    os.environ.pop("TRITON_INTERPRET", None)

SHAPES = [(4, 7, 13), (3, 0, 5), (2, 100, 50), (1, 3, 3), (8, 4097), (3, 80, 64)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("scale", [1.0, 1 / 3])
def test_bits_equal_the_reference(shape: tuple[int, ...], dtype: torch.dtype, scale: float) -> None:
    slots = torch.randn(shape, generator=torch.Generator().manual_seed(1)).mul(100).to(dtype).to(DEVICE)
    if dtype == torch.bfloat16 and not ON_GPU:
        # The interpreter cuts fp32 off to bf16 instead of rounding: whole numbers that fit need neither.
        slots, scale = slots.div(16).round(), 1.0
    wanted = reference.ordered_sum(slots, scale)
    assert torch.equal(kernel.ordered_sum(slots, scale), wanted)
    for own in {0, shape[0] - 1}:
        term = slots[own].clone()
        replaced = slots.clone()
        replaced[own] = float("nan")  # must not be read
        for function in (kernel.ordered_sum, reference.ordered_sum, choice.ordered_sum):
            out = torch.full_like(wanted, 7)
            assert function(replaced, scale, (own, term), out) is out
            assert torch.equal(out, wanted)


def test_addresses_that_allow_no_wide_loads() -> None:
    memory = torch.arange(1 + 3 * 4128, dtype=torch.float32, device=DEVICE) % 61
    slots, term = memory[1:].view(3, 4128), torch.ones(4129, device=DEVICE)[1:]
    assert torch.equal(kernel.ordered_sum(slots), reference.ordered_sum(slots))
    wanted = reference.ordered_sum(slots, own=(2, term))
    assert torch.equal(kernel.ordered_sum(slots.clone(), own=(2, term)), wanted)


def test_slots_are_added_in_order() -> None:
    big = 2.0**24  # where fp32 has no odd numbers left: big + 1 is big
    assert kernel.ordered_sum(torch.tensor([[big], [1.0], [-big]], device=DEVICE)).item() == 0.0
    assert kernel.ordered_sum(torch.tensor([[big], [-big], [1.0]], device=DEVICE)).item() == 1.0


def test_the_choice_leaves_other_types_and_devices_to_torch() -> None:
    for dtype in (torch.float64, torch.int64, torch.bfloat16):
        slots = torch.arange(12, device=DEVICE).view(3, 4).to(dtype)
        assert torch.equal(choice.ordered_sum(slots), reference.ordered_sum(slots))
