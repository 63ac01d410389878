"""Rows of a table by token: reference against the definition, kernels against it and sums in one order."""

import pytest
import torch
from torch import Tensor

from flashtrain.errors import UserError
from flashtrain.kernels.embedding import op, reference
from flashtrain.kernels.weight_gradient import WeightGradient
from tests.kernels.interpreter import DEVICE, interpreted

with interpreted():
    from flashtrain.kernels.embedding import triton as kernels

PIECE = kernels.PIECE
# A run of one piece to the token, one of one token more, one of three pieces, all between other tokens.
LENGTHS = {5: PIECE, 7: PIECE + 1, 2: 2 * PIECE + 3, 8: 1, 11: 4}
VOCABULARY = 12


def batch(lengths: dict[int, int]) -> Tensor:
    """Each token as many times as told, in random order."""
    tokens = torch.tensor(
        [token for token, length in lengths.items() for _ in range(length)], dtype=torch.long
    )
    return tokens[torch.randperm(len(tokens), generator=torch.Generator().manual_seed(0))].to(DEVICE)


def random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    draw = torch.Generator().manual_seed(len(shape))
    return torch.randn(*shape, generator=draw).to(dtype).to(DEVICE)


def rounded(x: Tensor, dtype: torch.dtype) -> Tensor:
    """fp32 ``x`` as the kernels store it: Triton's interpreter cuts off the bits that bf16 has not."""
    if dtype == torch.bfloat16 and DEVICE.type == "cpu":
        x = (x.view(torch.int32) & -65536).view(torch.float32)
    return x.to(dtype)


def in_order(dy: Tensor, tokens: Tensor, first: int, rows: int, start: Tensor | None = None) -> Tensor:
    """fp32 sums of each row's gradients: pieces in the order of tokens, then the pieces, then ``start``."""
    found = torch.zeros(rows, dy.shape[-1], device=dy.device) if start is None else start.clone()
    for row in range(rows):
        own, total = dy[tokens == first + row].float(), torch.zeros_like(found[0])
        for piece in own.split(PIECE):
            partial = torch.zeros_like(total)
            for slope in piece:
                partial += slope
            total += partial
        found[row] += total
    return found


def test_the_reference_follows_the_definition() -> None:
    tokens, whole = torch.arange(VOCABULARY).view(3, 4).to(DEVICE), random(VOCABULARY, 5)
    assert torch.equal(reference.embedding(tokens, whole, 0, VOCABULARY), whole.view(3, 4, 5))
    shards = [reference.embedding(tokens, whole[4 * n : 4 * n + 4], 4 * n, VOCABULARY) for n in range(3)]
    for rank, shard in enumerate(shards):
        assert torch.equal(shard[rank], whole[4 * rank : 4 * rank + 4])
    assert torch.equal(torch.stack(shards).sum(0), whole.view(3, 4, 5))
    unknown = reference.embedding(torch.tensor([-1, 12, 0], device=DEVICE), whole[:4], 0, VOCABULARY)
    assert unknown[:2].isnan().all()
    assert torch.equal(unknown[2], whole[0])


@pytest.mark.skipif(DEVICE.type != "cpu", reason="of torch on a CPU")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_on_a_cpu_a_gradient_is_added_token_by_token_on_any_number_of_threads(dtype: torch.dtype) -> None:
    tokens, dy = batch(LENGTHS), random(sum(LENGTHS.values()), 24, dtype=dtype)
    wanted = torch.zeros(6, 24, dtype=dtype)
    for token, slope in zip(tokens.tolist(), dy, strict=True):
        if 4 <= token < 10:
            wanted[token - 4] += slope
    before = torch.get_num_threads()
    for threads in (1, 2):
        torch.set_num_threads(threads)
        table = torch.zeros(6, 24, dtype=dtype, requires_grad=True)
        main = WeightGradient(table)
        op.embedding(tokens, table, 4, VOCABULARY, main).backward(dy)
        assert table.grad is not None
        assert torch.equal(table.grad, wanted), f"{threads} threads"
        assert not main.filled
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("first", "rows", "width"), [(0, VOCABULARY, 40), (4, 4, 33), (8, 4, 1)])
def test_kernels_look_up_and_add_in_order(
    first: int, rows: int, width: int, dtype: torch.dtype, poisoned_memory: None
) -> None:
    tokens = batch(LENGTHS)
    table, dy = random(rows, width, dtype=dtype), random(len(tokens), width, dtype=dtype)
    leaf = table.clone().requires_grad_()
    found = op.by_kernels(tokens, leaf, first, VOCABULARY)
    assert torch.equal(found, reference.embedding(tokens, table, first, VOCABULARY))
    found.backward(dy)
    assert leaf.grad is not None
    assert torch.equal(leaf.grad, rounded(in_order(dy, tokens, first, rows), dtype))
    true = table.double().requires_grad_()
    reference.embedding(tokens, true, first, VOCABULARY).backward(dy.double())
    assert true.grad is not None
    rounding = torch.finfo(dtype).eps  # of a cut; rounded to nearest it is half of it
    torch.testing.assert_close(leaf.grad.double(), true.grad, rtol=rounding, atol=1e-5)


def test_rows_wider_than_a_program_have_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    columns = 16
    monkeypatch.setattr(kernels, "_FINISH_COLUMNS", columns)
    tokens, dy, table = batch(LENGTHS), random(sum(LENGTHS.values()), 40), random(VOCABULARY, 40)
    gradient = torch.zeros_like(table)
    kernels.backward(dy, tokens, 0, gradient, False, columns)
    assert torch.equal(gradient, in_order(dy, tokens, 0, VOCABULARY))
    assert torch.equal(kernels.forward(tokens, table, 0, VOCABULARY, columns), table[tokens])


def test_sums_of_several_micro_batches_touch_the_rows_that_tokens_name_alone(poisoned_memory: None) -> None:
    table = random(VOCABULARY, 40, dtype=torch.bfloat16).requires_grad_()
    main = WeightGradient(table)
    assert main.total.isnan().all(), "memory of the last step's gradient"
    wanted = torch.zeros(VOCABULARY, 40, device=DEVICE)
    for lengths in (LENGTHS, {2: PIECE + 9, 7: 3}, {}, {9: 1}):
        tokens = batch(lengths)
        dy = random(len(tokens), 40, dtype=torch.bfloat16)
        op.by_kernels(tokens, table, 0, VOCABULARY, main).backward(dy)
        wanted = in_order(dy, tokens, 0, VOCABULARY, wanted)
        assert torch.equal(main.total, wanted)
    assert table.grad is None
    main.total[0] = 7.0  # of no token: it is neither read nor written
    tokens = batch({3: 2})
    op.by_kernels(tokens, table, 0, VOCABULARY, main).backward(random(2, 40, dtype=torch.bfloat16))
    assert (main.total[0] == 7.0).all()
    main.clear()
    op.by_kernels(tokens, table, 0, VOCABULARY, main).backward(random(2, 40, dtype=torch.bfloat16))
    assert not main.total[0].any()
    with torch.no_grad():
        assert not op.by_kernels(tokens, table, 0, VOCABULARY, main).requires_grad


def test_a_rows_bits_depend_on_its_own_tokens_alone() -> None:
    """Not on what else is in the batch, nor on how many ranks the vocabulary is cut for."""
    tokens, dy = batch(LENGTHS), random(sum(LENGTHS.values()), 24)
    whole = op.gradient_kernels(dy, tokens, 0, VOCABULARY)
    shards = [op.gradient_kernels(dy, tokens, first, 4) for first in (0, 4, 8)]
    assert torch.equal(torch.cat(shards), whole)
    for token in LENGTHS:
        alone = op.gradient_kernels(dy[tokens == token], tokens[tokens == token], token, 1)
        assert torch.equal(alone[0], whole[token])


@pytest.mark.parametrize("lengths", [{}, {3: 1}, {3: 5 * PIECE + 1}, {0: 2}, {20: 2 * PIECE, -7: 3}])
def test_no_tokens_one_token_alone_and_tokens_of_no_row(
    lengths: dict[int, int], poisoned_memory: None
) -> None:
    tokens, table = batch(lengths), random(6, 16, dtype=torch.float16)
    dy = random(len(tokens), 16, dtype=torch.float16)
    assert torch.equal(op.gradient_kernels(dy, tokens, 1, 6), in_order(dy, tokens, 1, 6).half())
    found = op.lookup_kernels(tokens, table, 1, VOCABULARY)
    wanted = reference.embedding(tokens, table, 1, VOCABULARY)
    torch.testing.assert_close(found, wanted, rtol=0, atol=0, equal_nan=True)
    whole = op.lookup_kernels(tokens, table, 0, 6)
    assert torch.equal(whole.isnan().all(-1), (tokens < 0) | (tokens >= 6))


def test_kernels_take_slices_and_columns_apart() -> None:
    tokens = batch(LENGTHS).int()[:40].view(20, 2)
    table, dy = random(VOCABULARY, 24), random(20, 2, 24)
    wanted = op.lookup_kernels(tokens, table, 0, VOCABULARY), op.gradient_kernels(dy, tokens, 0, VOCABULARY)
    wide = torch.cat([table, table], dim=-1)[:, :24]
    slopes = torch.cat([dy, dy], dim=-1)[..., :24], dy.mT.contiguous().mT
    turned = tokens.t().contiguous().t()
    for other in (wide, table.t().contiguous().t()):
        assert torch.equal(op.lookup_kernels(turned, other, 0, VOCABULARY), wanted[0])
    for other in slopes:
        assert torch.equal(op.gradient_kernels(other, turned, 0, VOCABULARY), wanted[1])
    summed = op.gradient_kernels(torch.ones((), device=DEVICE).expand(20, 2, 24), tokens, 0, VOCABULARY)
    assert torch.equal(summed[:, 0], tokens.flatten().bincount(minlength=VOCABULARY).float())


def test_the_op_passes_opcheck() -> None:
    table = random(4, 24).requires_grad_()
    torch.library.opcheck(op.lookup_kernels.traced, (batch({3: 2, 5: 1}), table, 2, VOCABULARY))


def test_what_is_no_table_or_no_tokens_is_refused() -> None:
    for tokens, table in ((torch.zeros(2), torch.zeros(3, 4)), (torch.zeros(2).long(), torch.zeros(3))):
        with pytest.raises(UserError, match=r"tokens are int64 or int32, the table is \[rows, H\]"):
            op.embedding(tokens, table)
