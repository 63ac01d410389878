"""The addition of every reduce-scatter: its order, its precision, its one rounding."""

import pytest
import torch

from flashtrain.kernels.ordered_sum.reference import ordered_sum


def test_slots_are_added_in_rank_order() -> None:
    big = 2.0**24  # where fp32 has no odd numbers left: big + 1 is big
    assert ordered_sum(torch.tensor([[big], [1.0], [-big]])).item() == 0.0
    assert ordered_sum(torch.tensor([[big], [-big], [1.0]])).item() == 1.0
    assert ordered_sum(torch.tensor([[1.0], [1.0], [big]])).item() == big + 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_added_in_fp32_and_rounded_once(dtype: torch.dtype) -> None:
    eps = torch.finfo(dtype).eps
    # Each addend alone is too small to change 1 in this dtype; together they do.
    slots = torch.tensor([[1.0], *[[eps / 4]] * 4], dtype=dtype)
    assert ordered_sum(slots).item() == 1 + eps
    assert ordered_sum(slots).dtype == dtype
    generator = torch.Generator().manual_seed(0)
    many = torch.randn(5, 300, generator=generator).to(dtype)
    wanted = many[0].float()
    for slot in many[1:]:
        wanted = wanted + slot.float()
    assert torch.equal(ordered_sum(many), wanted.to(dtype))
    assert torch.equal(ordered_sum(many, 0.2), (wanted * 0.2).to(dtype))


def test_sums_that_low_precision_cannot_hold_may_be_scaled_back() -> None:
    slots = torch.full((4, 2), 40_000.0, dtype=torch.float16)  # the sum is beyond fp16, the mean is not
    assert torch.equal(ordered_sum(slots, 0.25), torch.full((2,), 40_000.0, dtype=torch.float16))


def test_fp64_and_integers_keep_their_own_precision() -> None:
    wide = torch.tensor([[1.0], [2.0**-40]], dtype=torch.float64)
    assert ordered_sum(wide).item() == 1.0 + 2.0**-40
    whole = torch.tensor([[2**53], [1]])
    assert ordered_sum(whole).item() == 2**53 + 1
    assert ordered_sum(whole).dtype == torch.int64


@pytest.mark.parametrize("shape", [(1, 3), (3, 0), (2, 2, 2)])
def test_the_slots_stay_as_they_are(shape: tuple[int, ...]) -> None:
    slots = torch.randn(*shape, generator=torch.Generator().manual_seed(0))
    before = slots.clone()
    total = ordered_sum(slots)
    assert total.shape == shape[1:]
    total.add_(1)
    assert torch.equal(slots, before)
