"""Output projection and cross-entropy in chunks, and its kernels, against fp64 and torch."""

import math

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, linear

from flashtrain.errors import UserError
from flashtrain.kernels.cross_entropy import chunks, op, reference
from flashtrain.kernels.weight_gradient import WeightGradient
from tests.kernels.interpreter import DEVICE, interpreted

with interpreted():
    from flashtrain.kernels.cross_entropy import triton as kernels


def logits_of(case: str, rows: int, width: int) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(rows)
    logits = 3 * torch.randn(rows, width, generator=draw)
    targets = torch.randint(0, width, (rows,), generator=draw)
    match case:
        case "large":
            logits *= 1e4
        case "confident":
            logits.scatter_(-1, targets.unsqueeze(-1), 20.0)
        case "masked":  # nothing but -inf in the second of two ranks
            logits[:, width // 2 :] = float("-inf")
            targets %= width // 2
        case "ignored":
            targets[::2] = -100
    return logits, targets


@pytest.mark.parametrize("case", ["plain", "large", "confident", "masked", "ignored"])
@pytest.mark.parametrize(("rows", "width", "ranks"), [(5, 24, 1), (3, 12288, 2), (4, 66, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kernels_equal_fp64(
    case: str, rows: int, width: int, ranks: int, dtype: torch.dtype, poisoned_memory: None
) -> None:
    whole, targets = logits_of(case, rows, width)
    whole = whole.to(dtype)
    true = whole.double().requires_grad_()
    wanted = cross_entropy(true, targets, reduction="none")
    count = (targets != -100).sum()
    (wanted.sum() / count).backward()
    # Columns of another rank lie beside these: rows are further apart than they are wide.
    shards = [part.to(DEVICE) for part in whole.chunk(ranks, dim=1)]
    targets, first = targets.to(DEVICE), width // ranks
    everyone = torch.stack([kernels.statistics(s, targets, r * first) for r, s in enumerate(shards)])
    for rank, shard in enumerate(shards):
        losses = kernels.slopes_(shard, targets, rank * first, everyone, rank, 1.0 / count.to(DEVICE).float())
        torch.testing.assert_close(losses.double().cpu(), wanted.detach(), rtol=2e-6, atol=2e-6)
        slopes = true.grad.chunk(ranks, dim=1)[rank]
        # Each element is as near as its dtype can be: p - 1 of a confident row keeps its digits.
        torch.testing.assert_close(
            shard.double().cpu(), slopes, rtol=max(2e-5, torch.finfo(dtype).eps), atol=1e-7
        )


def test_kernels_leave_the_neighbours_alone() -> None:
    logits, targets = logits_of("plain", 4, 40)
    packed = torch.full((4, 64), 7.0)
    packed[:, 8:48] = logits
    packed = packed.to(DEVICE)
    numbers = kernels.statistics(packed[:, 8:48], targets.to(DEVICE), 0)
    kernels.slopes_(
        packed[:, 8:48], targets.to(DEVICE), 0, numbers.unsqueeze(0), 0, torch.ones((), device=DEVICE)
    )
    assert (packed[:, :8] == 7).all()
    assert (packed[:, 48:] == 7).all()
    assert (packed[:, 8:48] != logits.to(DEVICE)).all()


def inputs(rows: int, dtype: torch.dtype = torch.float64, width: int = 40) -> list[Tensor]:
    draw = torch.Generator().manual_seed(rows)
    x, weight = (torch.randn(n, 12, generator=draw, dtype=torch.float64) for n in (rows, width))
    targets = torch.randint(0, width, (rows,), generator=draw)
    targets[0] = targets[rows // 2] = -100
    return [x.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(), targets]


@pytest.mark.parametrize("rows", [3, 7, 300])
@pytest.mark.parametrize("chunk_bytes", [1, 40 * 8 * 3, 1 << 20])
def test_chunks_equal_whole_logits(rows: int, chunk_bytes: int, poisoned_memory: None) -> None:
    x, weight, targets = inputs(rows)
    wanted = cross_entropy(linear(x, weight), targets)
    true = torch.autograd.grad(wanted, (x, weight), torch.tensor(0.3, dtype=torch.float64))
    found = op.in_chunks(x, weight, targets, chunk_bytes=chunk_bytes)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    gradients = torch.autograd.grad(found, (x, weight), torch.tensor(0.3, dtype=torch.float64))
    for one, other in zip(gradients, true, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)
    with torch.no_grad():
        torch.testing.assert_close(op.in_chunks(x, weight, targets, None, chunk_bytes), wanted)


def test_whole_logits_never_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    real = chunks.Local.logits

    def watched(self: chunks.Local, rows: slice, keep: bool) -> tuple[Tensor, Tensor]:
        logits, x = real(self, rows, keep)
        seen.append(logits.nbytes)
        return logits, x

    monkeypatch.setattr(chunks.Local, "logits", watched)
    x, weight, targets = inputs(1000, torch.bfloat16)
    op.in_chunks(x, weight, targets, chunk_bytes=40 * 2 * 300).backward()
    assert max(seen) <= 40 * 2 * 300
    assert len(seen) == 4


def test_what_wants_no_gradient_gets_none() -> None:
    x, weight, targets = inputs(9)
    wanted = torch.autograd.grad(op.in_chunks(x, weight, targets), (x, weight))
    op.in_chunks(x.detach(), weight, targets).backward()
    torch.testing.assert_close(weight.grad, wanted[1])
    op.in_chunks(x, weight.detach(), targets).backward()
    torch.testing.assert_close(x.grad, wanted[0])


def test_gradients_of_narrow_weights_are_added_in_fp32() -> None:
    x, weight, targets = inputs(64, torch.bfloat16)
    wide = [t.detach().double().requires_grad_() for t in (x, weight)]
    wanted = cross_entropy(linear(*wide), targets)
    wanted.backward()
    main = WeightGradient(weight)
    for factor in (1.0, 0.5):
        loss = op.in_chunks(x, weight, targets, main, chunk_bytes=40 * 2 * 16)
        (loss * factor).backward()
    assert weight.grad is None
    assert main.total.dtype == torch.float32
    off = (main.total.double() - 1.5 * wide[1].grad).norm() / (1.5 * wide[1].grad.norm())
    assert off < 4e-3, "the rounding of the logits and of their gradients alone"
    assert (x.grad.double() - 1.5 * wide[0].grad).norm() < 2e-2 * wide[0].grad.norm()


def test_small_probabilities_of_many_rows_survive_fp16() -> None:
    """p is 6e-6 beside the target; a 256th of it is below all that fp16 has."""
    x, weight = torch.ones(256, 8).half(), torch.zeros(40, 8).half().requires_grad_()
    with torch.no_grad():
        weight[0] = 1.5
    main = WeightGradient(weight)
    op.in_chunks(x, weight, torch.zeros(256, dtype=torch.long), main).backward()
    true = torch.full((39, 8), 1 / (math.exp(12) + 39))
    torch.testing.assert_close(main.total[1:], true, rtol=1e-2, atol=0.0)


def test_no_target_that_counts_has_no_mean() -> None:
    x, weight, targets = inputs(5)
    loss = op.in_chunks(x, weight, torch.full_like(targets, -100))
    assert loss.isnan()
    assert cross_entropy(linear(x, weight), torch.full_like(targets, -100)).isnan()


def test_a_second_backward_pass_is_refused() -> None:
    x, weight, targets = inputs(5)
    loss = op.in_chunks(x, weight, targets)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_on_the_cpu_it_is_torchs_own_to_the_bit() -> None:
    x, weight, targets = inputs(33, torch.float32)
    found = op.linear_cross_entropy(x.view(11, 3, 12), weight, targets.view(11, 3))
    wanted = cross_entropy(linear(x, weight).float(), targets)
    assert torch.equal(found, wanted)
    pairs = zip(
        torch.autograd.grad(found, (x, weight)), torch.autograd.grad(wanted, (x, weight)), strict=True
    )
    assert all(torch.equal(one, other) for one, other in pairs)


def test_inputs_that_do_not_fit_are_refused() -> None:
    x, weight, targets = inputs(6)
    for arguments in ((x, weight, targets[:3]), (x, weight[:, :5], targets)):
        with pytest.raises(UserError, match="do not fit"):
            op.linear_cross_entropy(*arguments)
    with pytest.raises(UserError, match="no targets"):
        op.in_chunks(x[:0], weight, targets[:0])


def test_reference_keeps_the_digits_of_a_confident_row() -> None:
    logits, targets = logits_of("confident", 4, 50)
    narrow = logits.bfloat16()
    true = torch.softmax(narrow.double(), -1) - torch.nn.functional.one_hot(targets, 50)
    numbers = reference.statistics(narrow, targets, 0)
    reference.slopes_(narrow, targets, 0, numbers.unsqueeze(0), 0, torch.ones(()))
    torch.testing.assert_close(narrow.double(), true, rtol=2**-8, atol=1.5e-7)
