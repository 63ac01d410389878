"""The SSD recurrence: references against each other, kernels against them in Triton's interpreter.

The interpreter has no bf16 products and no speed, so sizes are small here; full tiles, bf16 and every
configuration in use are tested in ``test_ssd_gpu.py``.
"""

from typing import Any

import pytest
import torch
from torch import Tensor

from flashtrain.errors import UserError
from flashtrain.kernels.ssd import config, op, reference
from tests.kernels.interpreter import DEVICE, interpreted

with interpreted():
    from flashtrain.kernels.ssd import triton as kernels

FORWARD = config.Forward(config.Scan(16, 16, 4, 1), heads=2, warps=4, stages=1)
BACKWARD = config.Backward(
    config.Scan(16, 32, 4, 1), heads=2, warps=4, stages=1, group_warps=4, group_stages=1
)
NAMES = ("x", "dt", "A", "B", "C", "D", "dt_bias", "initial_state")


def inputs(
    batch: int, sequence: int, heads: int, groups: int, dtype: torch.dtype = torch.float64, states: int = 16
) -> list[Tensor]:
    """Arguments in the order of ``NAMES``, x and B in sequence-first memory as a model has them."""
    draw = torch.Generator().manual_seed(sequence)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw, dtype=torch.float64)

    x = random(sequence, batch, heads, 16).transpose(0, 1)
    keys, queries = (
        random(sequence, batch, groups, states).transpose(0, 1),
        random(batch, sequence, groups, states),
    )
    rate = -torch.rand(heads, generator=draw, dtype=torch.float64) - 0.1
    rest = [random(batch, sequence, heads), rate, keys / states**0.5, queries]
    tensors = [x, *rest, random(heads), random(heads) - 1, random(batch, heads, 16, states)]
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return [t.to(dtype if i in (0, 3, 4) else wide).to(DEVICE) for i, t in enumerate(tensors)]


def gradients(function: Any, given: list[Tensor | None], slopes: tuple[Tensor, Tensor]) -> list[Tensor]:
    """Outputs, then gradients of the inputs that are there."""
    leaves = [None if t is None else t.detach().requires_grad_() for t in given]
    outputs = function(*leaves)
    found = torch.autograd.grad(outputs, [t for t in leaves if t is not None], slopes)
    return [*(t.detach() for t in outputs), *found]


def slopes_of(given: list[Tensor]) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(1)
    return tuple(  # type: ignore[return-value]
        torch.randn(t.shape, generator=draw, dtype=torch.float64).to(t.dtype).to(DEVICE)
        for t in (given[0], given[7])
    )


def error(found: Tensor, true: Tensor) -> float:
    assert not found.isnan().any(), "an element was not written"
    return float((found.double() - true).norm() / true.norm())


@pytest.mark.parametrize(("sequence", "chunk", "groups"), [(1, 4, 1), (11, 4, 2), (12, 4, 4), (7, 16, 1)])
def test_chunks_equal_the_recurrence_with_all_gradients(sequence: int, chunk: int, groups: int) -> None:
    given = inputs(2, sequence, 4, groups)
    by_steps = gradients(reference.recurrence, given, slopes_of(given))
    by_chunks = gradients(lambda *a: reference.chunked(*a, chunk=chunk), given, slopes_of(given))
    for found, true in zip(by_chunks, by_steps, strict=True):
        torch.testing.assert_close(found, true, rtol=1e-9, atol=1e-9)


def test_the_recurrence_is_that_of_the_paper_and_its_gradients_those_of_differences() -> None:
    x, dt, rate, keys, queries, skip, bias, state = inputs(1, 3, 1, 1)
    y, final = reference.recurrence(x, dt, rate, keys, queries, skip, bias, state)
    for t in range(3):
        step = (1 + (dt[0, t, 0] + bias[0]).exp()).log()
        state = state * (step * rate[0]).exp() + step * x[0, t, 0][:, None] * keys[0, t, 0]
        torch.testing.assert_close(y[0, t, 0], state[0, 0] @ queries[0, t, 0] + skip[0] * x[0, t, 0])
    torch.testing.assert_close(final, state)
    given = [t.requires_grad_() for t in inputs(1, 5, 2, 1, states=2)]
    assert torch.autograd.gradcheck(lambda *a: reference.chunked(*a, chunk=2), given, fast_mode=True)


@pytest.mark.parametrize(
    ("batch", "sequence", "heads", "groups", "states"),
    [(2, 37, 4, 2, 16), (1, 16, 2, 1, 32), (1, 5, 3, 1, 16), (1, 48, 4, 4, 16)],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_kernels_equal_fp64(
    batch: int, sequence: int, heads: int, groups: int, states: int, dtype: torch.dtype, poisoned_memory: None
) -> None:
    given = inputs(batch, sequence, heads, groups, dtype, states)
    slopes = slopes_of(given)
    true = gradients(reference.recurrence, [t.double() for t in given], tuple(t.double() for t in slopes))
    found = [
        *kernels.forward(*given, config=FORWARD),
        *kernels.backward(*slopes, *given, config=BACKWARD),
    ]
    bound = 5e-6 if dtype == torch.float32 else 2e-3
    for name, one, other in zip(("y", "final", *NAMES), found, true, strict=True):
        assert error(one, other) < bound, name


def test_kernels_do_without_optional_inputs(poisoned_memory: None) -> None:
    given: list[Any] = inputs(1, 21, 2, 1, torch.float32)
    slopes = slopes_of(given)
    given[1] = given[1].sigmoid()
    given[5:] = [None, None, None]
    wide = [None if t is None else t.double() for t in given]
    leaves = [None if t is None else t.requires_grad_() for t in wide]
    y, final = reference.recurrence(*leaves)
    true = torch.autograd.grad(y, leaves[:5], slopes[0].double())
    found_y, found_final = kernels.forward(*given, config=FORWARD)
    found = kernels.backward(slopes[0], None, *given, config=BACKWARD)
    assert error(found_y, y.detach()) < 5e-6
    assert error(found_final, final.detach()) < 5e-6
    assert found.D is None
    assert found.dt_bias is None
    for one, other in zip(found[:5], true, strict=True):
        assert error(one, other) < 5e-6


def test_strong_decay_neither_overflows_nor_leaks(poisoned_memory: None) -> None:
    given = inputs(1, 40, 2, 1, torch.float32)
    given[2] = given[2] * 1000  # exp(Δ A) is 0 in fp32: a token sees itself alone
    y, _ = kernels.forward(*given, config=FORWARD)
    found = kernels.backward(*slopes_of(given), *given, config=BACKWARD)
    true = gradients(
        reference.recurrence, [t.double() for t in given], slopes_of([t.double() for t in given])
    )
    assert error(y, true[0]) < 5e-6
    assert all(bool(t.isfinite().all()) for t in found)
    assert error(found.x, true[2]) < 5e-6


def test_gradients_have_the_same_bits_again() -> None:
    given = inputs(2, 33, 4, 1, torch.float32)
    runs = [kernels.backward(*slopes_of(given), *given, config=BACKWARD) for _ in range(2)]
    assert all(torch.equal(one, other) for one, other in zip(*runs, strict=True))


def test_the_op_passes_opcheck(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "forward_config", lambda dtype: FORWARD)
    monkeypatch.setattr(kernels, "backward_config", lambda dtype: BACKWARD)
    given: list[Any] = [t.requires_grad_() for t in inputs(1, 17, 2, 1, torch.float32)]
    torch.library.opcheck(op.ssd_kernels.traced, tuple(given))
    torch.library.opcheck(
        op.ssd_kernels.traced, (*given[:5], None, None, None), test_utils=("test_faketensor",)
    )


def test_autograd_of_the_op_equals_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "forward_config", lambda dtype: FORWARD)
    monkeypatch.setattr(kernels, "backward_config", lambda dtype: BACKWARD)
    given = inputs(2, 19, 4, 2, torch.float32)
    true = gradients(
        reference.recurrence, [t.double() for t in given], slopes_of([t.double() for t in given])
    )
    for found, other in zip(gradients(op.ssd_kernels, given, slopes_of(given)), true, strict=True):
        assert error(found, other) < 5e-6
    leaves = [t.detach().requires_grad_() for t in given]
    _, final = op.ssd_kernels(*leaves)
    (alone,) = torch.autograd.grad(final, leaves[7], slopes_of(given)[1])  # y has no gradient at all
    wide = [t.detach().double().requires_grad_() for t in given]
    (other,) = torch.autograd.grad(reference.recurrence(*wide)[1], wide[7], slopes_of(given)[1].double())
    assert error(alone, other) < 5e-6


@pytest.mark.parametrize("cut", [1, 8, 20])
def test_two_pieces_equal_one(cut: int) -> None:
    x, dt, rate, keys, queries, skip, bias, state = (t.cpu().requires_grad_() for t in inputs(2, 21, 4, 2))
    z = torch.randn_like(x, requires_grad=True)
    leaves = [x, dt, rate, keys, queries, skip, z, bias, state]

    def run(part: slice, begin: Tensor) -> tuple[Tensor, Tensor]:
        pieces = (t[:, part] for t in (x, dt, keys, queries, z))
        one, step, key, query, gate = pieces
        return op.ssd(one, step, rate, key, query, skip, gate, bias, begin)

    whole = run(slice(None), state)
    first, carried = run(slice(0, cut), state)
    second, final = run(slice(cut, None), carried)
    slopes = (torch.randn_like(whole[0]), torch.randn_like(whole[1]))
    in_pieces = (torch.cat([first, second], dim=1), final)
    for found, true in zip(in_pieces, whole, strict=True):
        torch.testing.assert_close(found, true, rtol=1e-10, atol=1e-10)
    pairs = (torch.autograd.grad(outputs, leaves, slopes) for outputs in (in_pieces, whole))
    for found, true in zip(*pairs, strict=True):
        torch.testing.assert_close(found, true, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": (2, 9, 4)}, "must be [B, S, H, P]"),
        ({"x": (2, 0, 4, 16), "dt": (2, 0, 4)}, "at least one token"),
        ({"B": (2, 9, 3, 16)}, "3 groups must divide"),
        ({"dt": (2, 9, 3)}, "dt is [2, 9, 3]"),
        ({"A": (3,)}, "A is [3]"),
        ({"C": (2, 9, 2, 8)}, "C is [2, 9, 2, 8]"),
        ({"D": (4, 1)}, "D is [4, 1]"),
        ({"initial_state": (2, 4, 16, 8)}, "initial_state is [2, 4, 16, 8]"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(change: dict[str, tuple[int, ...]], message: str) -> None:
    given = dict(zip(NAMES, inputs(2, 9, 4, 2), strict=True))
    given |= {name: torch.zeros(shape, dtype=torch.float64) for name, shape in change.items()}
    with pytest.raises(UserError) as raised:
        op.ssd(**given)
    assert message in str(raised.value)


def test_one_dtype_for_x_and_b_and_c() -> None:
    given = inputs(1, 4, 2, 1)
    given[3] = given[3].float()
    with pytest.raises(UserError, match="one dtype"):
        op.ssd(*given[:6])


def test_sizes_that_the_kernels_lack_are_named() -> None:
    assert config.refusal(torch.bfloat16, 64, 128) is None
    assert "float64" in str(config.refusal(torch.float64, 64, 128))
    assert "not 48" in str(config.refusal(torch.bfloat16, 48, 128))
    assert "not 256" in str(config.refusal(torch.bfloat16, 64, 256))
