"""How the ranks of a group come to share their GPUs' memory: the nvlink transport, made and tried out."""

import logging
from collections.abc import Callable
from importlib import import_module

import torch
import torch.distributed as dist

from flashtrain.comm.transport import symmetric
from flashtrain.comm.transport.messages import clear_flags
from flashtrain.comm.transport.nvlink import DRIVER, NvlinkTransport
from flashtrain.comm.transport.pages import SharedPages
from flashtrain.comm.transport.symmetric import SymmetricBuffer
from flashtrain.errors import first_line

log = logging.getLogger("flashtrain.comm")


def connect(
    group: dist.ProcessGroup,
    device: torch.device,
    timeout: float,
    arena_bytes: int,
    exchange: Callable[[str], list[str]],
    graphs: bool = False,
    buffers: int = 2,
) -> tuple[NvlinkTransport | None, str]:
    """The transport of ``group``, tried out, or None and why not; the same on all ranks. Collective.

    ``timeout`` in seconds; ``exchange`` gathers one string from every rank of the group. With ``graphs`` it
    has another for captured operations; ``buffers`` are its landing buffers.
    """
    if device.index is None:
        device = torch.device(device.type, torch.cuda.current_device())

    def agree(failure: str) -> str:
        """What one rank cannot do, none does: every rank takes part in every round."""
        return next((f"rank {rank}: {text}" for rank, text in enumerate(exchange(failure)) if text), "")

    def allocate(nbytes: int) -> SymmetricBuffer:
        return symmetric.allocate(nbytes, device, group)

    def quiesce() -> None:
        torch.cuda.synchronize(device)

    try:
        import_module("flashtrain._core").load_driver(DRIVER)
        facts = symmetric.facts(device)
    except (ImportError, OSError, RuntimeError) as error:
        facts = f"error:{first_line(error)}"
    why_not = symmetric.refusal(exchange(facts))
    if why_not:
        return None, why_not
    kernels = exchange(_without_kernels(device))
    for rank, reason in enumerate(kernels):
        if reason:
            log.info("products and transfers of this group are not fused: rank %d: %s", rank, reason)
            break

    def make(in_graphs: bool) -> tuple[NvlinkTransport | None, str]:
        core, world = import_module("flashtrain._core"), group.size()
        table, made, failure = None, None, ""
        with SharedPages(world * core.flag_table_words(world), group.rank(), exchange) as pages:
            try:
                table = allocate(core.flag_table_words(world) * 4)
                clear_flags(table.memory.view(torch.int32), world)
                quiesce()
            except RuntimeError as error:
                failure = first_line(error)
            why_not = agree(failure or pages.problem)
        if why_not or table is None or pages.words is None:
            return None, why_not
        try:
            made = NvlinkTransport(
                group.rank(),
                world,
                timeout,
                host_tables=pages.words,
                device_table=table,
                allocate=allocate,
                exchange=exchange,
                quiesce=quiesce,
                # What torch.cuda.current_stream asks, without the object that it makes of the answer.
                stream=lambda: torch._C._cuda_getCurrentRawStream(device.index),
                arena_bytes=arena_bytes,
                has_kernels=not any(kernels),
                in_graphs=in_graphs,
                buffers=2 if in_graphs else buffers,
            )
        except RuntimeError as error:
            failure = first_line(error)
        return made, agree(failure)

    transport, why_not = make(in_graphs=False)
    if not why_not and transport is not None:
        failure = ""
        try:
            transport.trial(device)
        except RuntimeError as error:
            failure = first_line(error)
        why_not = agree(failure)
    if graphs and not why_not and transport is not None:
        transport.captured, why_not = make(in_graphs=True)
    if why_not and transport is not None:
        transport.shutdown()
        transport = None
    return transport, why_not


def _without_kernels(device: torch.device) -> str:
    """Why the fused products cannot run on this rank, or nothing."""
    if torch.cuda.get_device_capability(device)[0] != 9:
        return f"{torch.cuda.get_device_name(device)} is no Hopper GPU"
    try:
        import_module("flashtrain.kernels.overlapped_matmul.prepared")
    except ImportError as error:
        return first_line(error)
    return ""
