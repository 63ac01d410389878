"""The overlapped products on NVLink, chunked cuBLAS between copies (tier T0), against NCCL around cuBLAS.

    python benchmarks/nvlink.py [--world 2] [--rows 2048 8192] [--models 8B] [--out benchmarks/results]

Starts one rank a GPU and measures the forward products of Llama's sites, all systems in turn on the same
tensors. Times are milliseconds of the slowest rank, median over calls. Two modes: host-issued, where each
call starts at a barrier with nothing prepared, and launch-free, where the device sleeps while the host issues
a burst, of which the first calls are dropped. ``host`` is the host's time to issue one call of a burst.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from torch import Tensor

from flashtrain.comm import ops, transport

# (inputs, outputs) of the whole product; AG sites gather the input, RS sites scatter the output.
MODELS = {
    "8B": {"qkv": (4096, 6144), "o": (4096, 4096), "gate_up": (4096, 28672), "down": (14336, 4096)},
    "70B": {"qkv": (8192, 10240), "o": (8192, 8192), "gate_up": (8192, 57344), "down": (28672, 8192)},
}
GATHERS = ("qkv", "gate_up")
SETS = 4  # of inputs, so that no call finds its operands in the cache
BURST, DROPPED = 8, 2
SLEEP_CYCLES = 20_000_000  # about 12 ms
Call = Callable[[int], Any]


class Site:
    """One product: its tensors and the systems that compute it."""

    def __init__(
        self, name: str, rows: int, inputs: int, outputs: int, group: str, nccl: dist.ProcessGroup
    ) -> None:
        rank, world = nccl.rank(), nccl.size()
        self.gathers = name in GATHERS

        def draw(number: int, *size: int) -> Tensor:
            generator = torch.Generator("cuda").manual_seed(1000 * rank + number)
            return torch.randn(*size, generator=generator, device="cuda", dtype=torch.bfloat16)

        local = (outputs // world, inputs) if self.gathers else (outputs, inputs // world)
        w = [draw(number, *local) * inputs**-0.5 for number in range(SETS)]
        x = [draw(9 + number, rows // world if self.gathers else rows, local[1]) for number in range(SETS)]
        self.x, self.w, self.rows, self.group = x, w, rows, group
        whole = [draw(20 + number, rows, local[1]) for number in range(SETS)] if self.gathers else x

        def gather(number: int) -> Tensor:
            full = x[number].new_empty(rows, local[1])
            dist.all_gather_into_tensor(full, x[number], group=nccl)
            return full

        def scatter(partial: Tensor) -> Tensor:
            own = partial.new_empty(rows // world, partial.shape[1])
            dist.reduce_scatter_tensor(own, partial, group=nccl)
            return own

        self.calls: dict[str, Call] = {"gemm": lambda n: torch.mm(whole[n], w[n].t())}
        if self.gathers:
            self.calls |= {
                "collective": gather,
                "nccl": lambda n: torch.mm(gather(n), w[n].t()),
                "nvlink": lambda n: self.gathered(n, False),
                "nvlink and x_full": lambda n: self.gathered(n, True),
            }
        else:
            self.calls |= {
                "collective": lambda n: scatter(ready),
                "nccl": lambda n: scatter(torch.mm(x[n], w[n].t())),
                "nvlink": lambda n: ops.matmul_reduce_scatter(x[n], w[n], group, name),
            }
            ready = torch.mm(x[0], w[0].t())
        self.width = inputs if self.gathers else outputs

    def gathered(self, number: int, whole: bool) -> Tensor:
        return ops.all_gather_matmul(self.x[number], self.w[number], self.group, "", self.rows, False, whole)[
            0
        ]

    def error(self) -> float:
        """Largest difference between the op and NCCL around cuBLAS, over the largest value."""
        ours, theirs = self.calls["nvlink"](0).float(), self.calls["nccl"](0).float()
        return float((ours - theirs).abs().max() / theirs.abs().max())


def host_issued(calls: dict[str, Call], repeats: int, barrier: Callable[[], None]) -> dict[str, Tensor]:
    """Milliseconds ``[repeats]`` of each call on this rank."""
    times = {name: torch.zeros(repeats, dtype=torch.float64) for name in calls}
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    for repeat in range(repeats):
        for name, call in calls.items():
            torch.cuda.synchronize()
            barrier()
            begin.record()
            result = call(repeat % SETS)
            end.record()
            torch.cuda.synchronize()
            del result
            times[name][repeat] = begin.elapsed_time(end)
    return times


def launch_free(
    calls: dict[str, Call], rounds: int, align: Callable[[], None]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Milliseconds of each kept call on this rank, and the host's milliseconds a call."""
    kept = BURST - DROPPED
    times = {name: torch.zeros(rounds * kept, dtype=torch.float64) for name in calls}
    issuing = {name: torch.zeros(rounds, dtype=torch.float64) for name in calls}
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(BURST + 1)]
    for number in range(rounds):
        for name, call in calls.items():
            torch.cuda.synchronize()
            torch.cuda._sleep(SLEEP_CYCLES)
            align()
            marks[0].record()
            started = time.perf_counter()
            for index in range(BURST):
                call(index % SETS)
                marks[index + 1].record()
            issuing[name][number] = (time.perf_counter() - started) * 1e3 / BURST
            torch.cuda.synchronize()
            spans = [marks[i].elapsed_time(marks[i + 1]) for i in range(DROPPED, BURST)]
            times[name][number * kept : (number + 1) * kept] = torch.tensor(spans, dtype=torch.float64)
    return times, issuing


def slowest(times: dict[str, Tensor]) -> dict[str, float]:
    """Median over calls of the maximum over ranks."""
    found = {}
    for name, values in times.items():
        dist.all_reduce(values, dist.ReduceOp.MAX)
        found[name] = round(float(values.median()), 4)
    return found


def rank_main(rank: int, options: argparse.Namespace, folder: str) -> None:
    """Measure everything; rank 0 writes what came out to ``folder``."""
    torch.cuda.set_device(rank)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=options.world)
    nccl = dist.new_group(backend="nccl")
    transport.configure(transport.Settings(transport="nvlink"))
    group = dist.new_group().group_name
    token = torch.zeros(1, device="cuda")
    rows_of_table = []
    for model in options.models:
        for name, (inputs, outputs) in MODELS[model].items():
            for rows in options.rows:
                site = Site(name, rows, inputs, outputs, group, nccl)
                error = site.error()
                for call in site.calls.values():
                    for number in range(SETS):
                        call(number)
                issued = slowest(host_issued(site.calls, options.repeats, dist.barrier))
                free, issuing = launch_free(
                    site.calls, options.rounds, lambda: dist.all_reduce(token, group=nccl)
                )
                row: dict[str, Any] = {
                    "model": model, "site": name, "rows": rows, "error": error,
                    "host_issued": issued, "launch_free": slowest(free), "host": slowest(issuing),
                    "bytes_received": (options.world - 1) * rows // options.world * site.width * 2,
                }  # fmt: skip
                rows_of_table.append(row)
                if rank == 0:
                    print(line(row), flush=True)
                del site
    if rank == 0:
        mover = transport.of(group, torch.device("cuda", rank))
        report = {"rows": rows_of_table, "arena_bytes": mover.arena.nbytes}  # type: ignore[attr-defined]
        Path(folder, "result.json").write_text(json.dumps(report))
    dist.barrier()
    transport.shutdown()
    dist.destroy_process_group()


def line(row: dict[str, Any]) -> str:
    """One row of the table: times, G, the factor over NCCL, host time."""
    parts = [f"{row['model']} {row['site']:8} {row['rows']:6} err {row['error']:.4f}"]
    for mode in ("host_issued", "launch_free"):
        times = row[mode]
        parts.append(
            f"{mode}: gemm {times['gemm']:.3f} nccl {times['nccl']:.3f} nvlink {times['nvlink']:.3f} "
            f"(G {times['gemm'] / times['nvlink']:.2f}, x{times['nccl'] / times['nvlink']:.2f})"
        )
    return " | ".join([*parts, f"host {row['host']['nvlink']:.3f} (nccl {row['host']['nccl']:.3f})"])


def main() -> None:
    parser = argparse.ArgumentParser(description="Overlapped products on NVLink against NCCL around cuBLAS.")
    parser.add_argument("--world", type=int, default=torch.cuda.device_count())
    parser.add_argument("--rows", type=int, nargs="+", default=[2048, 8192])
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=["8B"])
    parser.add_argument("--repeats", type=int, default=50)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--name", default="nvlink-t0")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.spawn(rank_main, args=(options, folder), nprocs=options.world)
        report = json.loads(Path(folder, "result.json").read_text())
    report = {
        "what": __doc__.splitlines()[0] if __doc__ else "",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": f"{options.world} x {torch.cuda.get_device_name(0)}",
        "versions": {
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
            "nccl": ".".join(map(str, torch.cuda.nccl.version())),
        },
        "multicast": "off",
        "repeats": options.repeats, "rounds": options.rounds, "world": options.world,
        **report,
    }  # fmt: skip
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / f"{options.name}.json").write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
