"""Heads out of a packed projection, rotated: reference against complex numbers, kernels against fp64."""

from typing import Any

import pytest
import torch
from torch import Tensor

from flashtrain.errors import UserError
from flashtrain.kernels.rotary import op, reference
from tests.kernels.interpreter import DEVICE, interpreted

with interpreted():
    from flashtrain.kernels.rotary import triton as kernels

GROUPED, PAIRED = (3, 2, 1, 1), (1, 5, 2, 2)  # units, then query, key and value heads of each


def angles(sequence: int, width: int, first: int = 0) -> Tensor:
    """``[sequence, width / 2]``, some of them many turns."""
    position = torch.arange(first, first + sequence, dtype=torch.float64)
    return position[:, None] * 10.0 ** torch.linspace(0, -3, width // 2, dtype=torch.float64)


def inputs(sequence: int, heads: tuple[int, ...], width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    units, *each = heads
    draw = torch.Generator().manual_seed(sequence)
    packed = torch.randn(sequence, 2, units * sum(each) * width, generator=draw).half()
    angle = angles(sequence, width).repeat(1, 2)
    return packed.to(dtype).to(DEVICE), torch.stack([angle.cos(), angle.sin()]).float().to(DEVICE)


def outcome(function: Any, packed: Tensor, table: Tensor, heads: tuple[int, ...]) -> list[Tensor]:
    """Query, key, value, and the gradient of packed for slopes with the heads first in memory."""
    leaf = packed.detach().requires_grad_()
    outputs = function(leaf, table, *heads)
    draw = torch.Generator().manual_seed(1)
    slopes = [torch.randn(y.shape, generator=draw).half().to(y.dtype).to(DEVICE) for y in outputs]
    return [*(y.detach() for y in outputs), *torch.autograd.grad(outputs, leaf, slopes)]


@pytest.mark.parametrize("heads", [GROUPED, PAIRED])
def test_reference_turns_pairs_as_complex_numbers(heads: tuple[int, ...]) -> None:
    units, queries, keys, values = heads
    packed, table = inputs(4, heads, 6, torch.float64)
    query, key, value = reference.rotary_qkv(packed, table.double(), *heads)
    turn = torch.polar(torch.ones(4, 3, dtype=torch.float64), angles(4, 6)).to(DEVICE)
    each = packed.unflatten(-1, (units, queries + keys + values, 6))
    for unit in range(units):
        for place, head in enumerate(each[:, :, unit].unbind(2)):
            turned = torch.complex(head[..., :3], head[..., 3:]) * turn[:, None]
            turned = torch.cat([turned.real, turned.imag], dim=-1).transpose(0, 1)
            if place < queries:
                torch.testing.assert_close(query[:, unit * queries + place], turned, rtol=0, atol=1e-6)
            elif place < queries + keys:
                torch.testing.assert_close(key[:, unit * keys + place - queries], turned, rtol=0, atol=1e-6)
            else:
                own = value[:, unit * values + place - queries - keys]
                assert torch.equal(own, head.transpose(0, 1))


# 12 columns leave idle ones in the tile; 64 make tiles of 32 heads, of which there are two.
@pytest.mark.parametrize(
    ("heads", "width"),
    [
        (GROUPED, 12),
        (PAIRED, 16),
        ((9, 3, 1, 1), 64),
        ((1, 1, 1, 1), 2),
        ((5, 1, 0, 0), 8),
        ((3, 1, 0, 1), 8),
    ],
)
def test_kernels_equal_fp64(heads: tuple[int, ...], width: int, poisoned_memory: None) -> None:
    packed, table = inputs(3, heads, width, torch.float32)
    true = outcome(reference.rotary_qkv, packed.double(), table, heads)
    for found, other in zip(outcome(op.rotary_kernels, packed, table, heads), true, strict=True):
        assert found.isfinite().all(), "an element was not written"
        torch.testing.assert_close(found.double(), other, rtol=1e-5, atol=1e-6)


def test_kernels_take_each_half_of_the_table_as_the_reference_does() -> None:
    packed, table = inputs(3, GROUPED, 8, torch.float32)
    table = torch.randn_like(table)
    true = outcome(reference.rotary_qkv, packed.double(), table, GROUPED)
    for found, other in zip(outcome(op.rotary_kernels, packed, table, GROUPED), true, strict=True):
        torch.testing.assert_close(found.double(), other, rtol=1e-5, atol=1e-6)


def test_half_precision_is_rounded_once() -> None:
    packed, table = inputs(5, GROUPED, 16, torch.float16)
    true = outcome(reference.rotary_qkv, packed.double(), table, GROUPED)
    for function in (op.rotary_kernels, reference.rotary_qkv):
        for found, other in zip(outcome(function, packed, table, GROUPED)[:3], true, strict=False):
            assert (found != other.half()).float().mean() < 0.01, "values are not the nearest"
    gradient = outcome(op.rotary_kernels, packed, table, GROUPED)[3]
    assert (gradient != true[3].half()).float().mean() < 0.01


def test_a_slice_of_a_longer_table_starts_at_its_position() -> None:
    packed, table = inputs(9, PAIRED, 8, torch.float32)
    whole = kernels.forward(packed, table, *PAIRED)
    part = kernels.forward(packed[4:6], table[:, 4:6], *PAIRED)
    for found, wanted in zip(part, whole, strict=True):
        assert torch.equal(found, wanted[:, :, 4:6])


def test_kernels_take_any_strides_and_put_the_sequence_first() -> None:
    packed, table = inputs(4, GROUPED, 8, torch.float32)
    dense = kernels.forward(packed, table, *GROUPED)
    for strided in (torch.cat([packed, packed], dim=-1)[..., :96], packed.mT.contiguous().mT):
        for found, wanted in zip(kernels.forward(strided, table, *GROUPED), dense, strict=True):
            assert torch.equal(found, wanted)
    assert dense[0].permute(2, 0, 1, 3).is_contiguous()
    slopes = [torch.randn(y.shape, device=DEVICE) for y in dense]
    wanted = kernels.backward(*slopes, table, 3)
    moved = [
        slopes[0].permute(2, 0, 1, 3).contiguous().permute(1, 2, 0, 3),
        slopes[1].mT.contiguous().mT,
        torch.cat([slopes[2], slopes[2]], dim=1)[:, :3],
    ]
    assert torch.equal(kernels.backward(*moved, table, 3), wanted)
    one = slopes[1][:, :1].expand(slopes[1].shape)
    assert torch.equal(
        kernels.backward(slopes[0], one, slopes[2], table, 3),
        kernels.backward(slopes[0], one.contiguous(), slopes[2], table, 3),
    )


def test_an_output_that_nothing_uses_counts_as_zero() -> None:
    packed, table = inputs(3, GROUPED, 8, torch.float32)
    leaf = packed.requires_grad_()
    for number in range(3):
        found, wanted = (
            torch.autograd.grad(function(leaf, table, *GROUPED)[number].square().sum(), leaf)[0]
            for function in (op.rotary_kernels, reference.rotary_qkv)
        )
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


def test_the_op_passes_opcheck() -> None:
    packed, table = inputs(3, GROUPED, 8, torch.float32)
    torch.library.opcheck(op.rotary_kernels.traced, (packed.requires_grad_(), table, *GROUPED))


@pytest.mark.parametrize(
    ("packed", "table", "heads", "message"),
    [
        ((3, 2, 96), (2, 3, 8), (3, 0, 1, 1), "3 units of 0 query, 1 key and 1 value heads"),
        ((6, 96), (2, 3, 8), GROUPED, "packed heads [6, 96] must be [S, B, heads · D]"),
        ((3, 2, 84), (2, 3, 7), GROUPED, "with an even D"),
        ((3, 2, 88), (2, 3, 8), GROUPED, "12 heads and the rotary table [2, 3, 8] need [3, B, 96]"),
        ((4, 2, 96), (2, 3, 8), GROUPED, "need [3, B, 96]"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(
    packed: tuple[int, ...], table: tuple[int, ...], heads: tuple[int, int, int, int], message: str
) -> None:
    with pytest.raises(UserError) as raised:
        op.rotary_qkv(torch.zeros(packed), torch.zeros(table), *heads)
    assert message in str(raised.value)
