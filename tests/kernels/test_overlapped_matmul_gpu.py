"""The fused kernels on a Hopper GPU: full tiles, bf16, flags that come up late, launches, graphs."""

import ctypes
import itertools
import random as chance
import threading
import time
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.kernels.interpreter import ON_GPU, load
from tests.kernels.test_overlapped_matmul import parts_of

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not ON_GPU or torch.cuda.get_device_capability()[0] != 9, reason="needs a Hopper GPU"),
]

modules = load()
kernels, reference, configs = modules.kernels, modules.reference, modules.config.configs
HALF = (torch.bfloat16, torch.float16)
LATE = 0.02  # seconds by which arrivals are late


def random(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(*shape, device="cuda", dtype=torch.float32).to(dtype)


def poison(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.full(shape, float("nan"), dtype=dtype, device="cuda")


def words(*shape: int, value: int = 0) -> Tensor:
    return torch.full(shape, value, dtype=torch.int32, device="cuda")


def error(actual: Tensor, expected: Tensor) -> float:
    assert not actual.isnan().any(), "an element was not written"
    return float((actual.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("dtype", [*HALF, torch.float32])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(("rows", "columns", "inner"), [(513, 1032, 1000), (1024, 1536, 512), (96, 264, 72)])
def test_every_configuration_multiplies_to_the_same_bits(
    rows: int, columns: int, inner: int, transposed: bool, dtype: torch.dtype
) -> None:
    x, w = random(rows, inner, dtype=dtype), random(columns, inner, dtype=dtype)
    w = w.t().contiguous().t() if transposed else w
    expected = x.double() @ w.double().t()
    found = []
    for config in configs(dtype):
        found.append(poison(rows, columns, dtype=dtype))
        kernels.matmul(x, w, found[-1], config=config)
        assert error(found[-1], expected) < (2e-6 if dtype == torch.float32 else 4e-3)
    if dtype != torch.float32:
        assert all(torch.equal(found[0], other) for other in found[1:])


class Late:
    """Pinned words and rows that copy engines deliver from the host, chunk by chunk."""

    def __init__(self, epoch: int) -> None:
        self.stream = torch.cuda.Stream()
        self.word = torch.full((1,), epoch, dtype=torch.int32).pin_memory()

    def deliver(self, source: Tensor | None, target: Tensor | None, flag: Tensor) -> None:
        with torch.cuda.stream(self.stream):
            if source is not None and target is not None:
                target.copy_(source, non_blocking=True)
            flag.copy_(self.word, non_blocking=True)


@pytest.mark.parametrize("rows", [[512, 512, 512, 512], [700, 200, 0, 513], [130, 1, 300, 64]])
def test_gathered_tiles_wait_for_copies_in_any_order(rows: list[int]) -> None:
    columns, inner, rank = 1536, 1024, 1
    full, w = random(sum(rows), inner), random(columns, inner)
    start = sum(rows[:rank])
    own = full[start : start + rows[rank]].clone()
    host, plain = full.cpu().pin_memory(), poison(sum(rows), columns)
    kernels.matmul(full, w, plain)
    assert error(plain, full.double() @ w.double().t()) < 4e-3
    for epoch, (subchunks, seed) in enumerate(itertools.product((1, 3), range(3)), start=1):
        parts = parts_of("gather", rows, rank, subchunks)
        flags = words(len(parts), value=epoch - 1)
        late, order = Late(epoch), [part for part in parts if not part.own]
        chance.Random(seed).shuffle(order)
        buffer, out = poison(*full.shape), poison(*plain.shape)
        done = torch.cuda.Event()
        torch.cuda.synchronize()
        kernels.gather_matmul(own, buffer, w, flags, epoch, parts, out)
        done.record()
        for part in order:
            time.sleep(LATE / len(order))
            if part.rows:
                assert not done.query(), "the kernel ended before all chunks had arrived"
            place = slice(part.offset, part.offset + part.rows)
            late.deliver(host[place], buffer[place], flags[part.chunk : part.chunk + 1])
        torch.cuda.synchronize()
        assert torch.equal(out, plain)


class Scatter:
    """Operands of ``matmul_scatter`` on one of four ranks, and what must come out to the bit."""

    def __init__(self, rows: list[int], rank: int, columns: int, inner: int, subchunks: int) -> None:
        self.world, self.rank, self.kept = len(rows), rank, rows[rank]
        self.parts = parts_of("scatter", rows, rank, subchunks)
        self.x, self.w = random(sum(rows), inner), random(columns, inner)
        self.start = sum(rows[:rank])
        self.partial = poison(sum(rows), columns)
        kernels.matmul(self.x, self.w, self.partial)
        self.terms = random(self.world, self.kept, columns)
        self.terms[rank] = self.partial[self.start : self.start + self.kept]
        total = self.terms[0].float()
        for term in self.terms[1:]:
            total += term.float()
        self.expected = total.bfloat16()
        self.slots, self.out = poison(*self.terms.shape), poison(self.kept, columns)
        self.partials = poison(*self.partial.shape)
        self.counters, self.ready = words(len(self.parts)), words(len(self.parts))
        self.arrived = words(self.world, subchunks)

    def start_kernel(self, epoch: Any, **options: Any) -> None:
        kernels.matmul_scatter(
            self.x, self.w, self.partials, self.counters, self.ready, self.slots, self.arrived, epoch,
            self.parts, self.rank, self.out, **options,
        )  # fmt: skip

    def check(self) -> None:
        assert torch.equal(self.out, self.expected)
        for part in self.parts:
            place = slice(part.offset, part.offset + part.rows)
            assert part.own or torch.equal(self.partials[place], self.partial[place])
        assert not self.counters.any()


@pytest.mark.parametrize("config", configs(torch.bfloat16), ids=str)
def test_scattered_sums_have_the_bits_of_an_ordered_sum(config: Any) -> None:
    for rows, rank, subchunks in (([512] * 4, 2, 1), ([700, 300, 0, 513], 0, 2), ([130, 1, 300, 64], 3, 1)):
        case = Scatter(rows, rank, 1032, 512, subchunks)
        case.slots.copy_(case.terms)
        case.slots[rank] = float("nan")
        case.arrived.fill_(3)
        case.start_kernel(3, config=config)
        case.check()
        assert case.ready.tolist() == [
            0 if part.own else 3 for part in sorted(case.parts, key=lambda part: part.chunk)
        ]


@pytest.mark.parametrize("rows", [[512, 512, 512, 512], [700, 300, 0, 513]])
def test_own_tiles_wait_for_slots_in_any_order(rows: list[int]) -> None:
    for subchunks, seed in itertools.product((1, 2), range(3)):
        case = Scatter(rows, 1, 1536, 1024, subchunks)
        host, done, late = case.terms.cpu().pin_memory(), torch.cuda.Event(), Late(1)
        own = [part for part in case.parts if part.own]
        arrivals = [(peer, sub) for peer in range(case.world) if peer != 1 for sub in range(subchunks)]
        chance.Random(seed).shuffle(arrivals)
        torch.cuda.synchronize()
        case.start_kernel(1)
        done.record()
        for peer, sub in arrivals:
            time.sleep(LATE / len(arrivals))
            assert not done.query(), "the kernel ended before all slots had arrived"
            first = own[sub].offset - case.start
            place = slice(first, first + own[sub].rows)
            late.deliver(host[peer, place], case.slots[peer, place], case.arrived[peer, sub : sub + 1])
        torch.cuda.synchronize()
        case.check()


def test_a_ready_flag_covers_every_tile_of_its_chunk() -> None:
    """A stream that waits for the value copies the chunk at once; 200 rounds, each with other contents."""
    driver = ctypes.CDLL("libcuda.so.1")
    case, stream = Scatter([1024] * 4, 0, 2048, 256, 1), torch.cuda.Stream()
    case.slots.copy_(case.terms)
    copied = torch.empty_like(case.partials)
    for epoch in range(1, 201):
        case.partials.fill_(float("nan"))
        case.arrived.fill_(epoch)
        torch.cuda.synchronize()
        case.start_kernel(epoch)
        with torch.cuda.stream(stream):
            for part in case.parts:
                if not part.own:
                    word = case.ready.data_ptr() + 4 * part.chunk
                    assert not driver.cuStreamWaitValue32_v2(
                        ctypes.c_void_p(stream.cuda_stream), ctypes.c_uint64(word), ctypes.c_uint32(epoch), 0
                    )
                    place = slice(part.offset, part.offset + part.rows)
                    copied[place].copy_(case.partials[place], non_blocking=True)
        torch.cuda.synchronize()
        for part in case.parts:
            place = slice(part.offset, part.offset + part.rows)
            assert part.own or torch.equal(copied[place], case.partial[place]), f"epoch {epoch}, {part}"


def test_graph_replays_take_the_inputs_from_the_device_and_flags_that_were_lowered() -> None:
    rows, rank = [256] * 4, 2
    full, w = random(1024, 512), random(768, 512)
    own, buffer, out = full[512:768].clone(), full.clone(), poison(1024, 768)
    parts, flags = parts_of("gather", rows, rank), words(4, value=1)
    case = Scatter(rows, rank, 768, 512, 1)
    case.slots.copy_(case.terms)
    case.arrived.fill_(1)

    def step() -> None:
        kernels.gather_matmul(own, buffer, w, flags, 1, parts, out)
        case.start_kernel(1)

    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for _ in range(3):
        fresh = random(1024, 512)
        buffer.copy_(fresh)
        own.copy_(fresh[512:768])
        out.fill_(float("nan"))
        case.out.fill_(float("nan"))
        case.ready.zero_()
        for word in (flags, case.arrived):
            word.zero_()
        torch.cuda.synchronize()
        late = torch.cuda.Stream()
        graph.replay()
        with torch.cuda.stream(late):
            for word in (flags, case.arrived):
                word.fill_(1)
        late.synchronize()
        expected = torch.empty_like(out)
        kernels.matmul(fresh, w, expected)
        assert torch.equal(out, expected)
        case.check()
        assert case.ready.tolist() == [1, 1, 0, 1]


def test_threads_share_a_prepared_launch() -> None:
    """Autograd launches from a thread of its own; other addresses each time."""
    x, w = [random(512, 256) for _ in range(8)], random(512, 256)
    expected = [torch.empty(512, 512, device="cuda", dtype=torch.bfloat16) for _ in x]
    for index, operand in enumerate(x):
        kernels.matmul(operand, w, expected[index])
    found = [poison(512, 512) for _ in x]

    def run(index: int) -> None:
        for _ in range(50):
            kernels.matmul(x[index], w, found[index])

    threads = [threading.Thread(target=run, args=(index,)) for index in range(len(x))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
