"""Run a function on several local ranks and bring back what each returned.

Ranks are forked from a server that has imported torch and flashtrain once, so a rank starts in a fraction of
a second and inherits no thread pool of the test process.
"""

import faulthandler
import multiprocessing
import os
import queue
import signal
import tempfile
import time
import traceback
from collections.abc import Callable, Container, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(
    [
        "torch",
        "torch._dynamo",
        "torch.distributed.tensor",
        "torch.distributed.fsdp",
        "flashtrain.recipes",
        "pytest",
        "tests.offline",
    ]
)


def _rank_main(
    fn: Callable[..., Any],
    rank: int,
    world: int,
    folder: Path,
    args: tuple[Any, ...],
    results: Any,
    received: Any,
) -> None:
    stack = (folder / f"stack{rank}").open("w")
    faulthandler.register(signal.SIGUSR1, file=stack)
    faulthandler.enable(file=stack)
    torch.set_num_threads(1)
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), LOCAL_WORLD_SIZE=str(world)
    )
    try:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{folder / 'store'}",
            rank=rank,
            world_size=world,
            timeout=timedelta(seconds=60),
        )
        results.put((rank, True, fn(rank, world, *args)))
        # Tensors travel as file descriptors, which this process must hand over while it lives.
        received.wait(60)
        if dist.is_initialized():
            dist.destroy_process_group()
    except BaseException:
        results.put((rank, False, traceback.format_exc()))
        results.close()
        results.join_thread()
        os._exit(1)


def _stacks(ranks: Sequence[Any], ended: Container[int], folder: Path) -> str:
    """Where the ranks are, or died, that have given no result: the others may have waited for one of them."""
    others = [(rank, process) for rank, process in enumerate(ranks) if rank not in ended]
    for rank, process in others:
        if process.is_alive() and (folder / f"stack{rank}").exists():
            os.kill(process.pid, signal.SIGUSR1)
    time.sleep(0.5)
    found = []
    for rank, process in others:
        stack = folder / f"stack{rank}"
        place = "is at" if process.is_alive() else f"has ended with exit code {process.exitcode}, and was at"
        found.append(f"\nrank {rank} {place}\n{stack.read_text() if stack.exists() else ''}")
    return "".join(found)


def run_distributed(fn: Callable[..., Any], world: int, *args: Any, timeout: float = 120) -> list[Any]:
    """Call ``fn(rank, world, *args)`` on ``world`` gloo ranks; return the results in rank order.

    ``fn`` must be a module-level function and results must pickle; it may end the group. The first failing
    rank's traceback is raised as AssertionError, and so is a silence of ``timeout`` seconds, with where the
    ranks are that still run; those are killed.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        results, received = context.Queue(), context.Event()
        ranks = [
            context.Process(target=_rank_main, args=(fn, rank, world, folder, args, results, received))
            for rank in range(world)
        ]
        for process in ranks:
            process.start()
        returned: dict[int, Any] = {}
        try:
            while len(returned) < world:
                try:
                    rank, fine, value = results.get(timeout=timeout)
                except queue.Empty:
                    silence = f"{world - len(returned)} of {world} ranks gave no result within {timeout} s"
                    raise AssertionError(silence + _stacks(ranks, returned, folder)) from None
                if not fine:
                    others = _stacks(ranks, {rank, *returned}, folder)
                    raise AssertionError(f"rank {rank} of {world} failed:\n{value}{others}")
                returned[rank] = value
            received.set()
            for process in ranks:
                process.join(timeout=30)
        finally:
            for process in ranks:
                if process.is_alive():
                    process.kill()
                    process.join()
        return [returned[rank] for rank in range(world)]
