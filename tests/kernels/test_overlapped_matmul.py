"""The fused kernels against fp64 references: natively on a GPU, in Triton's interpreter elsewhere.

The interpreter runs blocks one after the other and has no bf16 products, so flags are set beforehand here;
late flags, bf16 and full-size tiles are tested in ``test_overlapped_matmul_gpu.py``.
"""

import itertools
import threading
import time
from typing import Any

import pytest
import torch
from torch import Tensor

from flashtrain.comm import schedule
from flashtrain.errors import UserError
from tests.kernels.interpreter import DEVICE, ON_GPU, load

modules = load()
kernels, reference, Part, Config = (
    modules.kernels,
    modules.reference,
    modules.plan.Part,
    modules.config.Config,
)

TILES = [Config(64, 64, 32, 2, 4, group=2), Config(64, 128, 32, 3, 4, group=3, split=True)]
if not ON_GPU:
    TILES = [Config(16, 32, 16, 2, 4, group=2), Config(32, 32, 16, 3, 4, group=3, split=True)]
DTYPES = [torch.float16, torch.float32]
EPOCH = 7
UNIT = TILES[0].block_m


def parts_of(op: str, rows: list[int], rank: int, subchunks: int = 1) -> tuple[Any, ...]:
    build = schedule.all_gather if op == "gather" else schedule.reduce_scatter
    plan = build(rows, rank, subchunks=subchunks)
    order = [(step.compute, plan.chunks[step.compute]) for step in plan.steps]
    return tuple(Part(number, chunk.offset, chunk.rows, chunk.owner == rank) for number, chunk in order)


def random(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(*shape).to(dtype).to(DEVICE)


def exact(*shape: int, dtype: torch.dtype) -> Tensor:
    """Values for tests of bits: on the CPU small integers, since BLAS adds in an order of its own."""
    return random(*shape, dtype=dtype) if ON_GPU else torch.randint(-8, 9, shape).to(dtype)


def poison(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.full(shape, float("nan"), dtype=dtype, device=DEVICE)


def words(*shape: int, value: int = 0) -> Tensor:
    return torch.full(shape, value, dtype=torch.int32, device=DEVICE)


def weight(columns: int, inner: int, dtype: torch.dtype, transposed: bool, draw: Any = random) -> Tensor:
    return draw(inner, columns, dtype=dtype).t() if transposed else draw(columns, inner, dtype=dtype)


def close(actual: Tensor, expected: Tensor, roundings: int = 1) -> None:
    """Equal but for ``roundings`` of the output's dtype and the order of an fp32 sum."""
    assert not actual.isnan().any(), "an element was not written"
    torch.testing.assert_close(
        actual.double(), expected.double(), rtol=2 * roundings * torch.finfo(actual.dtype).eps, atol=2e-4
    )


class Gather:
    """Operands of a gather on ``rank``: others' rows in the buffer, own rows of the buffer poisoned."""

    def __init__(
        self,
        rows: list[int],
        rank: int,
        columns: int,
        inner: int,
        dtype: torch.dtype,
        transposed: bool = False,
        draw: Any = random,
    ) -> None:
        self.rows, self.rank, self.total = rows, rank, sum(rows)
        start = sum(rows[:rank])
        self.full = draw(self.total, inner, dtype=dtype)
        self.own = self.full[start : start + rows[rank]].clone()
        self.buffer = self.full.clone()
        self.buffer[start : start + rows[rank]] = float("nan")
        self.w = weight(columns, inner, dtype, transposed, draw)
        self.expected = poison(self.total, columns, dtype=dtype)
        reference.matmul(self.full, self.w, self.expected)

    def run(self, subchunks: int = 1, config: Any = None, epoch: int = EPOCH, flag: int = EPOCH) -> Tensor:
        parts = parts_of("gather", self.rows, self.rank, subchunks)
        out = poison(*self.expected.shape, dtype=self.expected.dtype)
        flags = words(len(parts), value=flag)
        kernels.gather_matmul(
            self.own, self.buffer, self.w, flags, epoch, parts, out, config=config or TILES[0]
        )
        return out


class Scatter:
    """Operands of a scatter on ``rank`` with random partials of the peers; the own slot is poisoned."""

    def __init__(
        self,
        rows: list[int],
        rank: int,
        columns: int,
        inner: int,
        dtype: torch.dtype,
        transposed: bool = False,
        wire: torch.dtype | None = None,
        draw: Any = random,
    ) -> None:
        self.rows, self.rank, self.wire = rows, rank, wire or dtype
        self.x = draw(sum(rows), inner, dtype=dtype)
        self.w = weight(columns, inner, dtype, transposed, draw)
        self.slots = random(len(rows), rows[rank], columns, dtype=self.wire)
        self.slots[rank] = float("nan")

    def run(
        self, kernel: Any, subchunks: int = 1, epoch: int = EPOCH, **options: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        """``(out, partials, ready)``; counters must come back as zeros."""
        columns, total, world = self.w.shape[0], self.x.shape[0], len(self.rows)
        parts = parts_of("scatter", self.rows, self.rank, subchunks)
        partials = poison(total, columns, dtype=self.wire)
        out = poison(self.rows[self.rank], columns, dtype=self.x.dtype)
        counters, ready = words(len(parts)), words(len(parts))
        arrived = words(world, subchunks, value=EPOCH)
        arrived[self.rank] = 0
        kernel(
            self.x,
            self.w,
            partials,
            counters,
            ready,
            self.slots,
            arrived,
            epoch,
            parts,
            self.rank,
            out,
            **options,
        )
        assert not counters.any()
        return out, partials, ready


RAGGED = [
    [4 * UNIT] * 2,
    [2 * UNIT + 1, 2 * UNIT, 2 * UNIT],
    [UNIT, 0, 3 * UNIT - 1],
    [UNIT + 5, UNIT, 3, UNIT - 1],
    [0, 2 * UNIT, 0],
    [1, 1],
]


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "columns", "inner"), [(64, 64, 64), (45, 24, 40), (1, 8, 8), (70, 72, 88)])
def test_plain_product(rows: int, columns: int, inner: int, dtype: torch.dtype, transposed: bool) -> None:
    x, w = random(rows, inner, dtype=dtype), weight(columns, inner, dtype, transposed)
    expected = poison(rows, columns, dtype=dtype)
    reference.matmul(x, w, expected)
    for config in TILES:
        out = poison(rows, columns, dtype=dtype)
        kernels.matmul(x, w, out, config=config)
        close(out, expected)


@pytest.mark.parametrize(("rows", "dtype"), [*itertools.product(RAGGED, DTYPES)])
def test_gather_equals_the_product_of_all_rows(rows: list[int], dtype: torch.dtype) -> None:
    for rank in range(len(rows)):
        operands = Gather(rows, rank, 40, 24, dtype, transposed=rank % 2 == 1)
        for config in TILES:
            close(operands.run(config=config), operands.expected)


def test_gather_bits_do_not_depend_on_chunks_or_rank() -> None:
    rows = [2 * UNIT + 3, 2 * UNIT + 3, 2 * UNIT + 2]
    seen = []
    for rank in range(3):
        torch.manual_seed(3)
        operands = Gather(rows, rank, 40, 56, torch.float16, draw=exact)
        seen += [operands.run(subchunks) for subchunks in (1, 2, 3)]
    plain = torch.empty_like(seen[0])
    kernels.matmul(operands.full, operands.w, plain, config=TILES[0])
    assert all(torch.equal(plain, other) for other in seen)


def test_gather_reads_own_rows_in_place_and_no_flag_for_them() -> None:
    operands = Gather([UNIT, UNIT], 1, 16, 16, torch.float32)
    parts = parts_of("gather", operands.rows, 1)
    flags, out = words(2), poison(2 * UNIT, 16, dtype=torch.float32)
    flags[0] = EPOCH
    kernels.gather_matmul(
        operands.own, operands.buffer, operands.w, flags, EPOCH, parts, out, config=TILES[0]
    )
    close(out, operands.expected)


@pytest.mark.parametrize(("epoch", "flag"), [(5, 9), (2**31 + 2, 2**31 + 2), (2**32 - 1, 1), (0, 0)])
def test_a_flag_is_up_from_its_epoch_on_and_epochs_wrap(epoch: int, flag: int) -> None:
    operands = Gather([UNIT, UNIT], 0, 16, 16, torch.float32)
    wrapped = (flag + 2**31) % 2**32 - 2**31
    close(operands.run(epoch=epoch, flag=wrapped), operands.expected)


@pytest.mark.skipif(ON_GPU, reason="the GPU tests set flags from a second stream")
def test_tiles_wait_until_their_chunk_has_arrived() -> None:
    """Another thread fills the buffer and only then raises the flag."""
    operands = Gather([UNIT, UNIT], 0, 16, 16, torch.float32)
    arriving = operands.buffer.clone()
    operands.buffer[UNIT:] = float("nan")
    parts, flags = parts_of("gather", operands.rows, 0), words(2, value=EPOCH - 1)
    out = poison(2 * UNIT, 16, dtype=torch.float32)

    def deliver() -> None:
        time.sleep(0.3)
        operands.buffer[UNIT:] = arriving[UNIT:]
        flags[1] = EPOCH

    courier = threading.Thread(target=deliver)
    courier.start()
    kernels.gather_matmul(
        operands.own, operands.buffer, operands.w, flags, EPOCH, parts, out, config=TILES[0]
    )
    courier.join()
    close(out, operands.expected)


@pytest.mark.parametrize(("rows", "dtype"), [*itertools.product(RAGGED, DTYPES)])
def test_scatter_adds_in_rank_order_and_raises_every_flag(rows: list[int], dtype: torch.dtype) -> None:
    for rank in range(len(rows)):
        operands = Scatter(rows, rank, 40, 24, dtype, transposed=rank % 2 == 1)
        expected, expected_partials, _ = operands.run(reference.matmul_scatter)
        start = sum(rows[:rank])
        others = [row for row in range(sum(rows)) if not start <= row < start + rows[rank]]
        for config in TILES:
            out, partials, ready = operands.run(kernels.matmul_scatter, config=config)
            close(out, expected, roundings=2)
            close(partials[others], expected_partials[others])
            # Empty chunks signal as well: whoever waits for them must not wait for ever.
            assert ready.tolist() == [0 if chunk == rank else EPOCH for chunk in range(len(rows))]


def test_scatter_bits_are_those_of_an_ordered_sum_of_rounded_partials() -> None:
    rows = [2 * UNIT + 1, 2 * UNIT, UNIT + 3]
    half, single = torch.float16, torch.float32
    for rank, (dtype, wire) in itertools.product(range(3), ((half, half), (half, single), (single, single))):
        operands = Scatter(rows, rank, 40, 56, dtype, wire=wire, draw=exact)
        mine = poison(sum(rows), 40, dtype=wire)
        kernels.matmul(operands.x, operands.w, mine, config=TILES[0])
        start = sum(rows[:rank])
        slots = operands.slots.float()
        slots[rank] = mine[start : start + rows[rank]].float()
        expected = slots[0].clone()
        for slot in slots[1:]:
            expected += slot
        for subchunks in (1, 2):
            out, partials, _ = operands.run(kernels.matmul_scatter, subchunks, config=TILES[0])
            assert torch.equal(out, expected.to(out.dtype))
            assert torch.equal(partials[:start], mine[:start])
            assert torch.equal(partials[start + rows[rank] :], mine[start + rows[rank] :])


def test_scatter_keeps_the_sign_of_negative_zeros() -> None:
    """The own partial is too small for fp16 and negative, the peer's is -0.0, so the sum is -0.0 as well."""
    operands = Scatter([UNIT, UNIT], 1, 16, 16, torch.float16)
    operands.slots[0] = -0.0
    operands.x.fill_(-(2.0**-24))
    operands.w.fill_(2.0**-24)
    out, _, _ = operands.run(kernels.matmul_scatter, config=TILES[0])
    assert not out.any()
    assert out.signbit().all()


def test_counters_serve_the_next_epoch_without_a_reset() -> None:
    operands = Scatter([UNIT, 2 * UNIT], 0, 48, 16, torch.float32)
    parts, counters, ready = parts_of("scatter", operands.rows, 0), words(2), words(2)
    arrived, out = words(2, 1, value=9), poison(UNIT, 48, dtype=torch.float32)
    partials = poison(3 * UNIT, 48, dtype=torch.float32)
    for epoch in (7, 8, 9):
        kernels.matmul_scatter(
            operands.x, operands.w, partials, counters, ready, operands.slots, arrived, epoch, parts, 0, out,
            config=TILES[0],
        )  # fmt: skip
        assert ready.tolist() == [0, epoch]


def test_refusals_name_the_culprit() -> None:
    x, w, out = (random(*shape, dtype=torch.float16) for shape in ((16, 20), (16, 20), (16, 16)))
    with pytest.raises(UserError, match=r"x \[16, 20\].* 20 elements are no multiple of 16 bytes"):
        kernels.matmul(x, w, out)
    with pytest.raises(UserError, match="do not multiply"):
        kernels.matmul(x[:, :8], w, out)
    with pytest.raises(UserError, match="only bfloat16, float16 and float32"):
        kernels.matmul(x.double(), w.double(), out.double())
    memory = random(8 * 16 + 1, dtype=torch.float16)
    with pytest.raises(UserError, match="address that is no multiple of 16 bytes"):
        kernels.matmul(memory[1:].view(16, 8), random(16, 8, dtype=torch.float16), out)
    assert (
        modules.config.refusal(random(4, 8, dtype=torch.float16), random(8, 8, dtype=torch.float16)) is None
    )


@pytest.mark.parametrize(
    ("parts", "complaint"),
    [
        ([(0, 0, 4, False), (1, 2, 4, True)], "chunk 1 starts at row 2"),
        ([(0, 0, 4, False), (0, 4, 4, True)], "chunk numbers must be distinct"),
        ([(0, 0, 4, True), (1, 4, 4, False), (2, 8, 4, True)], "own chunks must be contiguous"),
    ],
)
def test_impossible_chunks_are_refused(parts: list[tuple[Any, ...]], complaint: str) -> None:
    with pytest.raises(UserError, match=complaint):
        modules.plan.tile_plan(tuple(Part(*part) for part in parts), 16, gathers=True, device=DEVICE)


def test_the_default_is_the_large_tile_unless_its_last_wave_is_mostly_idle() -> None:
    choose, half = modules.config.default_config, torch.bfloat16
    assert str(choose([2048] * 4, 7168, half, 132)).startswith("128x256")
    assert str(choose([1024] * 4, 1536, half, 132)).startswith("128x128")
    assert choose([1], 8, torch.float32, 1) in modules.config.configs(torch.float32)


def test_own_chunks_come_last_in_a_scatter() -> None:
    with pytest.raises(UserError, match="own chunks come last"):
        modules.plan.tile_plan((Part(0, 0, 4, True), Part(1, 4, 4, False)), 16, gathers=False, device=DEVICE)


def test_tensors_that_do_not_fit_the_chunks_are_refused() -> None:
    operands = Gather([UNIT, UNIT], 0, 16, 16, torch.float32)
    out, parts = poison(2 * UNIT, 16, dtype=torch.float32), parts_of("gather", [UNIT, UNIT], 0)
    with pytest.raises(UserError, match="flags must be 2 contiguous"):
        kernels.gather_matmul(operands.own, operands.buffer, operands.w, words(1), 1, parts, out)
    with pytest.raises(UserError, match="own and"):
        kernels.gather_matmul(operands.own, operands.buffer, operands.w, words(2), 1, parts, out[:UNIT])
