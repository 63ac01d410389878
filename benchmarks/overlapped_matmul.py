"""Do the fused kernels cost more than the products they replace? One GPU, arrivals simulated.

    python benchmarks/overlapped_matmul.py [--out benchmarks/results] [--rounds 15] [--quick]

At the local shapes of Llama-8B and 70B under four-way tensor parallelism, interleaved in one run and
launch-free (the GPU sleeps while the host enqueues), medians in milliseconds on random data that rotates
beyond the cache:

    AG sites   torch.mm; the plain persistent kernel; gather_matmul with all flags up ("ready"); the same with
               flags that come up at the pace of a link ("paced"); each with 1, 2 and 4 sub-chunks
    RS sites   torch.mm; torch.mm and an ordered sum; the plain kernel; matmul_scatter with all slots in
               ("ready"); the same with slots that arrive a link's time after the chunk of the same step is
               ready ("paced"); the same with no own chunk ("signals only")

Each way with the configuration (and number of sub-chunks) that is the fastest for it. Also weights [K, N],
and the host's time of a launch. ``bound`` is max(T, T/W + (W-1) t_m), T the time of torch.mm. Writes
``overlapped-matmul.json``.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import machine
import torch
import triton
import triton.language as tl
from torch import Tensor

from flashtrain.comm import schedule
from flashtrain.kernels.launch import compile_kernel
from flashtrain.kernels.ordered_sum.triton import ordered_sum
from flashtrain.kernels.overlapped_matmul.config import Config, configs
from flashtrain.kernels.overlapped_matmul.plan import Part
from flashtrain.kernels.overlapped_matmul.prepared import GatherMatmul, MatmulScatter
from flashtrain.kernels.overlapped_matmul.product import Product
from flashtrain.kernels.overlapped_matmul.signals import raise_flag, wait_flag

WORLD, RANK = 4, 1
LINK = 370.0  # bytes per nanosecond that a peer delivers
WAYS = ("plain", "ready", "paced")
BEYOND_CACHE = 160 << 20
SLEEP_CYCLES = 800_000

Call = Callable[[int], Any]


class Shape(NamedTuple):
    """One local product: ``[M, K] · [N, K]ᵀ``."""

    site: str
    gathers: bool
    rows: int
    columns: int
    inner: int


def shapes(quick: bool) -> list[Shape]:
    found = []
    for rows in (2048,) if quick else (2048, 4096, 8192, 16384):
        for model, hidden, qkv, mlp in (("8B", 4096, 6144, 14336), ("70B", 8192, 10240, 28672)):
            found += [
                Shape(f"{model} qkv", True, rows, qkv // WORLD, hidden),
                Shape(f"{model} gate_up", True, rows, 2 * mlp // WORLD, hidden),
                Shape(f"{model} o", False, rows, hidden, hidden // WORLD),
                Shape(f"{model} down", False, rows, hidden, mlp // WORLD),
            ]
    return found


@triton.jit
def now():  # type: ignore[no-untyped-def]
    return tl.inline_asm_elementwise(
        "mov.u64 $0, %globaltimer;", "=l", [], dtype=tl.int64, is_pure=False, pack=1
    )


@triton.jit
def deliver(ready, flags, stop, sources, targets, count, epoch, step_ns, WAITS: tl.constexpr):  # type: ignore[no-untyped-def]
    """A link: raise ``flags[targets[i]]`` one transfer after the last, or after ``ready[sources[i]]``."""
    free = now()
    for index in range(count):
        if WAITS:
            free += wait_flag(ready + tl.load(sources + index), epoch, stop, 1)
            free = tl.maximum(free, now())
        free += step_ns
        while now() < free:
            pass
        raise_flag(flags + tl.load(targets + index), epoch)


def parts_of(shape: Shape, subchunks: int) -> tuple[Part, ...]:
    rows = schedule.split_rows(shape.rows, WORLD)
    build = schedule.all_gather if shape.gathers else schedule.reduce_scatter
    plan = build(rows, RANK, subchunks=subchunks)
    order = [(step.compute, plan.chunks[step.compute]) for step in plan.steps]
    return tuple(Part(number, chunk.offset, chunk.rows, chunk.owner == RANK) for number, chunk in order)


class Bench:
    """All systems of one shape. Every call takes the number of the input set that it works on."""

    def __init__(self, shape: Shape, dtype: torch.dtype) -> None:
        self.shape, self.dtype, self.epoch = shape, dtype, 0
        m, n, k = shape.rows, shape.columns, shape.inner
        per_set = (m * k + n * k + m * n * (1 if shape.gathers else 2)) * 2
        self.sets = max(2, -(-BEYOND_CACHE // per_set))
        self.x = [self.random(m, k) for _ in range(self.sets)]
        self.w = [self.random(n, k) for _ in range(self.sets)]
        self.out = [torch.empty(m, n, device="cuda", dtype=dtype) for _ in range(self.sets)]
        self.own = slice(RANK * m // WORLD, (RANK + 1) * m // WORLD)
        self.side = torch.cuda.Stream(priority=-1)
        names = ("flags", "counters", "ready", "arrived", "stop")
        self.words = {name: self.integers([0] * 64) for name in names}
        self.keep: list[Tensor] = []
        self.slots, self.sum = [], []
        if not shape.gathers:
            self.slots = [self.random(WORLD, m // WORLD, n) for _ in range(self.sets)]
            self.sum = [torch.empty(m // WORLD, n, device="cuda", dtype=dtype) for _ in range(self.sets)]

    def random(self, *size: int) -> Tensor:
        return torch.randn(*size, device="cuda", dtype=self.dtype)

    def integers(self, values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, device="cuda")

    def mm(self, index: int) -> None:
        torch.mm(self.x[index], self.w[index].t(), out=self.out[index])

    def mm_transposed(self, index: int) -> None:
        torch.mm(self.x[index], self.w[index].view(self.shape.inner, -1), out=self.out[index])

    def plain(self, config: Config, spare: int, transposed: bool = False) -> Call:
        parts = (Part(0, 0, self.shape.rows, True),)
        weights = [w.view(self.shape.inner, -1).t() for w in self.w] if transposed else self.w
        product = GatherMatmul(
            self.x[0], None, weights[0], self.out[0], parts, waits=False, config=config, spare_sms=spare
        )
        return lambda i: product(self.x[i], None, weights[i], None, 0, self.out[i])

    def link(
        self, pairs: list[tuple[int, int]], bytes_each: float, waits: bool, flags: Tensor
    ) -> Callable[[], None]:
        """What plays the peers: started on the side stream once the main stream has got here."""
        sources, targets = (self.integers([pair[side] for pair in pairs]) for side in (0, 1))
        self.keep += [sources, targets]
        step_ns = round(bytes_each / LINK)

        def start() -> None:
            self.side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.side):
                deliver[(1,)](
                    self.words["ready"], flags, self.words["stop"], sources, targets, len(pairs),
                    self.epoch, step_ns, WAITS=waits, num_warps=1,
                )  # fmt: skip

        return start

    def gather(self, config: Config, subchunks: int, paced: bool) -> tuple[Call, Callable[[], None]]:
        """The call, and what is to be enqueued just before it."""
        shape, flags = self.shape, self.words["flags"]
        parts = parts_of(shape, subchunks)
        product = GatherMatmul(
            self.x[0][self.own], self.x[0], self.w[0], self.out[0], parts, config=config, spare_sms=1
        )
        pairs = [(0, part.chunk) for part in parts if not part.own]
        size = shape.rows // WORLD // subchunks * shape.inner * 2
        start = self.link(pairs, size, False, flags)

        def prepare() -> None:
            self.epoch += 1
            if paced:
                start()
            else:
                flags.fill_(self.epoch)

        return lambda i: product(
            self.x[i][self.own], self.x[i], self.w[i], flags, self.epoch, self.out[i]
        ), prepare

    def scatter(
        self, config: Config, subchunks: int, paced: bool, keep: bool = True
    ) -> tuple[Call, Callable[[], None]]:
        """``keep`` off sends the own chunk away as well: what is left is the product with its signals."""
        shape, words = self.shape, self.words
        parts, kept = parts_of(shape, subchunks), shape.rows // WORLD
        if not keep:
            parts, kept = tuple(part._replace(own=False) for part in parts), 0
        slots, sums = [slot[:, :kept] for slot in self.slots], [total[:kept] for total in self.sum]
        product = MatmulScatter(
            self.x[0], self.w[0], self.out[0], slots[0], sums[0], parts, RANK,
            arrived_stride=subchunks, config=config, spare_sms=1,
        )  # fmt: skip
        # What a peer computes at step i for this rank leaves when this rank's chunk of step i does.
        steps = [part.chunk for part in parts if part.chunk // subchunks != RANK]
        places = [
            (RANK - 1 - step) % WORLD * subchunks + sub
            for step in range(WORLD - 1)
            for sub in range(subchunks)
        ]
        size = shape.rows // WORLD // subchunks * shape.columns * 2
        start = self.link(list(zip(steps, places, strict=True)), size, True, words["arrived"])

        def prepare() -> None:
            self.epoch += 1
            if paced:
                start()
            else:
                words["arrived"].fill_(self.epoch)

        def call(i: int) -> None:
            product(
                self.x[i], self.w[i], self.out[i], words["counters"], words["ready"], slots[i],
                words["arrived"], self.epoch, sums[i],
            )  # fmt: skip

        return call, prepare

    def mm_and_sum(self, index: int) -> None:
        self.mm(index)
        ordered_sum(self.slots[index])


def measure(
    calls: dict[str, Call], prepare: dict[str, Callable[[], None]], sets: int, rounds: int
) -> dict[str, float]:
    """Median milliseconds of each call; A B C A B C ..., a fresh input set each time."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    number = 0
    for turn in range(rounds + 2):
        for name, call in calls.items():
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda._sleep(SLEEP_CYCLES)
            if name in prepare:
                prepare[name]()
            begin.record()
            call(number % sets)
            end.record()
            number += 1
            end.synchronize()
            if turn >= 2:
                times[name].append(begin.elapsed_time(end))
    return {name: round(statistics.median(values), 4) for name, values in times.items()}


def host_time(call: Call, sets: int) -> float:
    """Microseconds of the host for one call, in bursts that the GPU's queue takes without blocking."""
    found = []
    for _ in range(10):
        torch.cuda.synchronize()
        torch.cuda._sleep(40_000_000)
        start = time.perf_counter()
        for number in range(20):
            call(number % sets)
        found.append((time.perf_counter() - start) / 20 * 1e6)
    torch.cuda.synchronize()
    return round(statistics.median(found), 2)


def bench(shape: Shape, rounds: int) -> dict[str, Any]:
    run = Bench(shape, torch.bfloat16)
    build = run.gather if shape.gathers else run.scatter
    names = {str(config): config for config in configs(torch.bfloat16)}
    calls: dict[str, Call] = {"mm": run.mm}
    prepare: dict[str, Callable[[], None]] = {}
    for name, config in names.items():
        calls[f"plain {name}"] = run.plain(config, 0)
        for way, subchunks in (("ready", 1), ("paced", 1), ("paced", 2), ("paced", 4)):
            key = f"{way} m{subchunks} {name}"
            calls[key], prepare[key] = build(config, subchunks, way == "paced")
    first = measure(calls, prepare, run.sets, max(rounds // 2, 3))
    chosen = {way: min((key for key in first if key.startswith(way)), key=first.__getitem__) for way in WAYS}
    calls = {"mm": run.mm, "mm, w [K, N]": run.mm_transposed} | {
        way: calls[key] for way, key in chosen.items()
    }
    prepare = {way: prepare[key] for way, key in chosen.items() if key in prepare}
    plain = names[chosen["plain"].removeprefix("plain ")]
    calls |= {"plain spare": run.plain(plain, 1), "plain, w [K, N]": run.plain(plain, 0, transposed=True)}
    if not shape.gathers:
        calls["mm + sum"] = run.mm_and_sum
        best = names[chosen["ready"].removeprefix("ready m1 ")]
        calls["signals only"], prepare["signals only"] = run.scatter(best, 1, False, keep=False)
    found = measure(calls, prepare, run.sets, rounds)
    width = shape.inner if shape.gathers else shape.columns
    transfer = shape.rows / WORLD * width * 2 / LINK * 1e-6
    bound = max(found["mm"], found["mm"] / WORLD + (WORLD - 1) * transfer)
    report = {"bound": round(bound, 4), "chosen": chosen, "ms": found, "candidates": first, "sets": run.sets}
    return shape._asdict() | report


def host(rows: int = 2048) -> dict[str, float]:
    """Host time of one launch by each way."""
    from flashtrain.kernels.overlapped_matmul.triton import gather_matmul

    shape = Shape("8B qkv", True, rows, 1536, 4096)
    config = configs(torch.bfloat16)[0]
    run = Bench(shape, torch.bfloat16)
    call, prepare = run.gather(config, 1, False)
    prepare()
    parts, flags, own = parts_of(shape, 1), run.words["flags"], run.own
    scatter = Bench(Shape("8B o", False, rows, 4096, 1024), torch.bfloat16)
    scattered, arrive = scatter.scatter(config, 1, False)
    arrive()
    launcher = GatherMatmul(run.x[0][own], run.x[0], run.w[0], run.out[0], parts, config=config)
    jitted = _jitted(launcher, run, flags)
    stream = torch.cuda.current_stream().cuda_stream
    values = launcher.template(
        own_desc=run.x[0][own].data_ptr(), full_desc=run.x[0].data_ptr(), w_desc=run.w[0].data_ptr(),
        out=run.out[0].data_ptr(), flags=flags.data_ptr(), stop=run.words["stop"].data_ptr(), epoch=run.epoch,
    )  # fmt: skip
    return {
        "torch.mm": host_time(run.mm, run.sets),
        "prepared gather, fresh addresses": host_time(call, run.sets),
        "prepared gather, same addresses": host_time(lambda _: call(0), run.sets),
        "prepared scatter, fresh addresses": host_time(scattered, scatter.sets),
        "gather_matmul": host_time(
            lambda i: gather_matmul(run.x[i][own], run.x[i], run.w[i], flags, run.epoch, parts, run.out[i]),
            run.sets,
        ),
        "driver call alone": host_time(
            lambda _: launcher.launch.start(launcher.blocks, stream, values), run.sets
        ),
        "JIT call with tensor descriptors": host_time(jitted, run.sets),
    }


def _jitted(product: Product, run: Bench, flags: Tensor) -> Call:
    """The same launch by Triton's own call, for comparison."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    config, plan = product.config, product.plan
    x_block, w_block = [config.block_m, config.block_k], [config.block_n, config.block_k]
    out_block = [config.block_m, config.block_n // 2 if config.split else config.block_n]

    def call(i: int) -> None:
        x, w, out = run.x[i], run.w[i], run.out[i]
        product.kernel[(product.blocks,)](
            TensorDescriptor.from_tensor(x[run.own], x_block), TensorDescriptor.from_tensor(x, x_block),
            TensorDescriptor.from_tensor(w, w_block), TensorDescriptor.from_tensor(out, out_block),
            flags, run.words["stop"], plan.records, run.epoch, product.tiles, product.column_tiles,
            product.steps, product.columns, **product._constants,
            num_warps=config.warps, num_stages=config.stages,
        )  # fmt: skip

    return call


def _compile(job: tuple[Any, ...]) -> None:
    name, *rest = job
    from flashtrain.kernels.overlapped_matmul import prepared

    compile_kernel(getattr(prepared, name), *rest)


def compile_all() -> float:
    """Fill Triton's cache in parallel, since every launch compiles on its own otherwise; seconds."""
    start, jobs = time.perf_counter(), []
    original = Product._build

    def record(self: Product, arguments: dict[str, Any], **constants: Any) -> None:
        self.blocks = 1
        config = self.config
        merged = {**self.constants(), **constants}
        name = "gather_kernel" if isinstance(self, GatherMatmul) else "scatter_kernel"
        jobs.append((name, arguments, merged, config.warps, config.stages, 90))

    Product._build = record
    try:
        for shape in shapes(True)[:1] + shapes(True)[2:3]:
            run = Bench(shape, torch.bfloat16)
            for config in configs(torch.bfloat16):
                run.plain(config, 0)
                (run.gather if shape.gathers else run.scatter)(config, 1, False)
    finally:
        Product._build = original
    with ProcessPoolExecutor(8, mp_context=get_context("spawn")) as pool:
        list(pool.map(_compile, jobs))
    return round(time.perf_counter() - start, 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    torch.manual_seed(0)
    print(f"compiled in {compile_all()} s", flush=True)
    report: dict[str, Any] = {
        "machine": {**machine.facts(), "gpu": torch.cuda.get_device_name(), "driver": _driver_version()},
        "versions": {**machine.versions(), "triton": triton.__version__, "cuda": torch.version.cuda},
        "date": machine.date(), "world": WORLD, "link_gb_per_s": LINK, "host_us": host(), "shapes": [],
    }  # fmt: skip
    print(json.dumps(report["host_us"], indent=1), flush=True)
    print("site            M      mm     over mm: plain  [K,N]  ready  bound   over paced", flush=True)
    for shape in shapes(options.quick):
        row = bench(shape, options.rounds)
        report["shapes"].append(row)
        ms = row["ms"]
        ratios = [ms["mm"] / ms["plain"], ms["mm, w [K, N]"] / ms["plain, w [K, N]"], ms["mm"] / ms["ready"]]
        extra = [f"{name} {ms['mm'] / ms[name]:.3f}" for name in ("mm + sum", "signals only") if name in ms]
        print(
            f"{row['site']:12} {row['rows']:6} {ms['mm']:.4f}  ", *(f"{ratio:.3f}" for ratio in ratios),
            f" {row['bound']:.4f} {row['bound'] / ms['paced']:.3f} ", *extra,
            " | ".join(row["chosen"].values()), flush=True,
        )  # fmt: skip
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "overlapped-matmul.json").write_text(json.dumps(report, indent=1) + "\n")
        torch.cuda.empty_cache()


def _driver_version() -> str:
    import subprocess

    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return subprocess.run(query, capture_output=True, text=True, check=False).stdout.strip().split("\n")[0]


if __name__ == "__main__":
    main()
