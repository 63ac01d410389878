"""Run a function on several local ranks and bring back what each returned.

Ranks are forked from a server that has imported torch and flashtrain once, so a rank starts in a fraction of
a second and inherits no thread pool of the test process.
"""

import multiprocessing
import os
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
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
    store: str,
    args: tuple[Any, ...],
    results: Any,
    received: Any,
) -> None:
    torch.set_num_threads(1)
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), LOCAL_WORLD_SIZE=str(world)
    )
    try:
        dist.init_process_group(
            "gloo", init_method=f"file://{store}", rank=rank, world_size=world, timeout=timedelta(seconds=60)
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


def run_distributed(fn: Callable[..., Any], world: int, *args: Any, timeout: float = 120) -> list[Any]:
    """Call ``fn(rank, world, *args)`` on ``world`` gloo ranks; return the results in rank order.

    ``fn`` must be a module-level function and results must pickle; it may end the group. The
    first failing rank's traceback is raised as AssertionError; ranks still alive after ``timeout`` seconds
    are killed.
    """
    with tempfile.TemporaryDirectory() as folder:
        results, received = context.Queue(), context.Event()
        store = os.path.join(folder, "store")
        ranks = [
            context.Process(target=_rank_main, args=(fn, rank, world, store, args, results, received))
            for rank in range(world)
        ]
        for process in ranks:
            process.start()
        returned: dict[int, Any] = {}
        try:
            while len(returned) < world:
                rank, fine, value = results.get(timeout=timeout)
                assert fine, f"rank {rank} of {world} failed:\n{value}"
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
