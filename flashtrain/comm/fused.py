"""A schedule and its products in one kernel (tier T1): nvlink on Hopper GPUs, bf16 and fp16.

The kernel of a gather waits for each chunk's flag itself; that of a scatter signals each chunk and adds what
has arrived to its own rows. The host makes one call into C++ an operation, which enqueues all copies, flags
and the kernel. The bits of a product do not depend on tiles, sub-chunks or arrival.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from torch import Tensor

from flashtrain.comm.schedule import Schedule
from flashtrain.comm.transport import settings
from flashtrain.comm.transport.base import Transport, clock

if TYPE_CHECKING:
    from flashtrain.comm.transport.nvlink import NvlinkTransport
    from flashtrain.kernels.overlapped_matmul.config import Config

_TMA_BYTES = 16  # bases and row pitches are multiples of it
_MOST_RANKS = 32  # one warp polls the peers' flags
_MOST_PREPARED = 4096


def fits(mover: Transport, plan: Schedule, x: Tensor, w: Tensor) -> "TypeGuard[NvlinkTransport]":
    """Whether ``x [rows, K]`` · ``w [N, K]ᵀ`` runs fused on ``mover``.

    By facts that all ranks share, so all say the same.
    """
    return (
        getattr(mover, "has_kernels", False)
        and settings().fused
        and plan.kind == "direct"
        and x.dtype in (torch.bfloat16, torch.float16)
        and plan.rows > 0
        and w.numel() > 0
        and x.shape[1] * x.itemsize % _TMA_BYTES == 0
        and w.shape[0] * w.itemsize % _TMA_BYTES == 0
        and plan.world <= _MOST_RANKS
    )


@dataclass(frozen=True)
class _Prepared:
    """An operation for fixed shapes: what C++ runs, and what must live as long."""

    product: Any  # of flashtrain._core
    nbytes: int  # of the landing buffer
    keeps: tuple[Any, ...]


def gather_matmul(
    mover: "NvlinkTransport",
    plan: Schedule,
    x_shard: Tensor,
    w: Tensor,
    y: Tensor,
    site: str,
    config: "Config | None" = None,
    landed: Callable[[Tensor], None] | None = None,
) -> None:
    """``y [M, N] = AG(x_shard [M/W, K]) · w [N, K]ᵀ``.

    ``landed(buffer [M, K])`` may enqueue work that reads the gathered rows or writes the own ones, which are
    not in it. Raises TransportError if a peer has failed, UserError if the landing buffer passes its budget.
    """
    x_shard, w = _aligned(x_shard.contiguous()), _weight(w)
    key = (id(plan), w.shape[0], w.stride(), x_shard.shape[1], w.dtype, config)
    prepared = mover.prepared.get(key)
    if prepared is None:
        prepared = _keep(mover, key, _prepare_gather(mover, plan, x_shard, w, y, config))
    # An empty shard has no address; nothing reads the one that stands for it.
    given = [x_shard.data_ptr() or w.data_ptr(), w.data_ptr(), y.data_ptr()]
    with _running(mover, prepared, given, site) as epoch:
        if landed is not None:
            landed(mover.arena.view(epoch, x_shard.dtype, (plan.rows, x_shard.shape[1])))


def matmul_scatter(
    mover: "NvlinkTransport",
    plan: Schedule,
    x: Tensor,
    w: Tensor,
    site: str,
    config: "Config | None" = None,
) -> Tensor:
    """``RS(x [M, K] · w [N, K]ᵀ)``: the own rows ``[M/W, N]``. Errors as above."""
    x, w = _aligned(x.contiguous()), _weight(w)
    own = plan.own_rows
    partials = x.new_empty(plan.rows, w.shape[0])
    out = x.new_empty(own.stop - own.start, w.shape[0])
    key = (id(plan), w.shape[0], w.stride(), x.shape[1], w.dtype, config)
    prepared = mover.prepared.get(key)
    if prepared is None:
        prepared = _keep(mover, key, _prepare_scatter(mover, plan, x, w, partials, out, config))
    given = [x.data_ptr(), w.data_ptr(), partials.data_ptr(), out.data_ptr() or partials.data_ptr()]
    with _running(mover, prepared, given, site):
        pass
    return out


@contextmanager
def _running(mover: "NvlinkTransport", prepared: _Prepared, given: list[int], site: str) -> Iterator[int]:
    started = clock()
    epoch = mover.start(prepared.product, prepared.nbytes, given, site)
    try:
        yield epoch
    except BaseException:
        mover.abandon()
        raise
    mover.finish(site)
    mover.traffic.operating += clock() - started


def _keep(mover: "NvlinkTransport", key: tuple[Any, ...], prepared: _Prepared) -> _Prepared:
    # Ragged batches bring ever new shapes; preparing costs little once a kernel is compiled.
    if len(mover.prepared) >= _MOST_PREPARED:
        mover.prepared.clear()
    mover.prepared[key] = prepared
    return prepared


def _aligned(x: Tensor) -> Tensor:
    return x.clone() if x.data_ptr() % _TMA_BYTES else x


def _weight(w: Tensor) -> Tensor:
    """``w`` where one of its dimensions is contiguous and the other's pitch suits TMA, else a copy."""
    pitch = w.stride(0) if w.stride(1) == 1 else w.stride(1) if w.stride(0) == 1 else 1
    return w.contiguous() if pitch * w.itemsize % _TMA_BYTES or w.data_ptr() % _TMA_BYTES else w


def _prepare_gather(
    mover: "NvlinkTransport",
    plan: Schedule,
    x_shard: Tensor,
    w: Tensor,
    y: Tensor,
    config: "Config | None",
) -> _Prepared:
    from flashtrain.kernels.overlapped_matmul.plan import Part
    from flashtrain.kernels.overlapped_matmul.prepared import GatherMatmul

    row_bytes = x_shard.shape[1] * x_shard.itemsize
    messages = mover.plan(plan, row_bytes)
    columns = mover.core.flag_columns
    parts = []
    for step in plan.steps:
        owner, offset, rows = plan.chunks[step.compute]
        # The flag of a chunk is where its owner raises it: its row of the table, its place among the sends.
        number = owner * columns + step.compute % plan.subchunks
        parts.append(Part(number, offset, rows, owner == plan.rank))
    landing = x_shard.new_empty(plan.rows, x_shard.shape[1])  # for its shape alone
    kernel = GatherMatmul(x_shard, landing, w, y, tuple(parts), config=config, spare_sms=1)
    names = kernel.names.index
    # Without own rows nothing is read through their descriptor, which must be valid all the same.
    empty = x_shard.shape[0] == 0
    first = plan.own_rows.start
    offsets = [(plan.chunks[send.chunk].offset - first) * row_bytes for send in messages.sends]
    product = mover.core.FusedProduct(
        program=messages.program,
        launch=kernel.launch,
        blocks=kernel.blocks,
        values=kernel.template(flags=mover.flags, stop=mover.stop_word),
        places=[[] if empty else [names("own_desc")], [names("w_desc")], [names("out")]],
        landing=[names("full_desc"), *([names("own_desc")] if empty else [])],
        epoch=[names("epoch")],
        source=0,
        offsets=offsets,
        early=True,
    )
    return _Prepared(product, messages.nbytes, (plan, messages, kernel))


def _prepare_scatter(
    mover: "NvlinkTransport",
    plan: Schedule,
    x: Tensor,
    w: Tensor,
    partials: Tensor,
    out: Tensor,
    config: "Config | None",
) -> _Prepared:
    from flashtrain.kernels.overlapped_matmul.plan import Part
    from flashtrain.kernels.overlapped_matmul.prepared import MatmulScatter

    row_bytes = w.shape[0] * w.itemsize
    messages = mover.plan(plan, row_bytes)
    columns = mover.core.flag_columns
    parts = []
    for number, step in enumerate(plan.steps):
        # Every step but the own chunks' sends what it computes, so its number is that of its signal.
        owner, offset, rows = plan.chunks[step.compute]
        parts.append(Part(number, offset, rows, owner == plan.rank))
    slots = partials.new_empty(plan.world, out.shape[0], w.shape[0])  # for its shape alone
    kernel = MatmulScatter(
        x,
        w,
        partials,
        slots,
        out,
        tuple(parts),
        plan.rank,
        arrived_stride=columns,
        config=config,
        spare_sms=1,
    )
    names = kernel.names.index
    counters = mover.counters(x.device)
    product = mover.core.FusedProduct(
        program=messages.program,
        launch=kernel.launch,
        blocks=kernel.blocks,
        values=kernel.template(
            counters=counters.data_ptr(), ready=mover.signals, arrived=mover.flags, stop=mover.stop_word
        ),
        places=[[names("x_desc")], [names("w_desc")], [names("store"), names("partials")], [names("out")]],
        landing=[names("slots")],
        epoch=[names("epoch")],
        source=2,
        offsets=[plan.chunks[send.chunk].offset * row_bytes for send in messages.sends],
        early=False,
    )
    return _Prepared(product, messages.nbytes, (plan, messages, kernel, counters))
