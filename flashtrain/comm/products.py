"""The ways in which an overlapped product can be computed, and the choice among them.

    fused      one kernel that waits and signals, beside copy engines or carriers (``fused``): nvlink on
               Hopper GPUs
    chunked    a product a chunk between the transfers (``chunked``): everywhere
    whole      the transfers first, or last, and one product beside none of them

A way is made for fixed shapes and called with operands. All ways of a product take its partials in the
operands' dtype and add them in rank order in fp32; the fused ways of all configurations share their bits.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from flashtrain.comm import fused, groups, schedule, transport, tune
from flashtrain.comm.bulk import WholeGather, WholeScatter
from flashtrain.comm.chunked import ChunkedGather, ChunkedScatter, Landed
from flashtrain.comm.schedule import Schedule, split_rows
from flashtrain.comm.streamed import StreamedGather
from flashtrain.comm.transport.base import Transport, capturing
from flashtrain.errors import UserError

# Into how many sub-chunks a tuner cuts a rank's rows, and of how many rows at the least.
_SUBCHUNKS, _FEWEST_ROWS = (1, 2, 4), 128
# How many blocks carry: twelve fill the links, and where tiles leave many multiprocessors idle, more are
# better. They take multiprocessors from the product, so none where it has so many operations a byte that it
# is twice as long as its transfers (700 TFLOP/s, 390 GB/s), which copy engines then hide for nothing.
_CARRIERS, _MOST_OPERATIONS = (12, 33), 4000
# Into how many sub-chunks they cut partials, and into how many column ranges what is gathered.
_CARRIED_SUBCHUNKS, _COLUMN_RANGES = (2, 4, 8), (4, 8)


class Gather(Protocol):
    """``y [M, N] = AG(x_shard [M/W, K]) · w [N, K]ᵀ``."""

    def __call__(self, x_shard: Tensor, w: Tensor, site: str, landed: Landed | None = None) -> Tensor: ...


class Scatter(Protocol):
    """``RS(x [M, K] · w [N, K]ᵀ)``, the own rows ``[M/W, N]``."""

    def __call__(self, x: Tensor, w: Tensor, site: str) -> Tensor: ...


def rows_per_rank(shard: Tensor, group: str, rows: int | None) -> tuple[int, ...]:
    """How many rows each rank holds, for a shard ``[rows, ...]``. Raises UserError if it does not fit."""
    process_group = groups.resolve(group)
    world, rank = process_group.size(), process_group.rank()
    counts = split_rows(world * shard.shape[0] if rows is None else rows, world)
    if counts[rank] != shard.shape[0]:
        raise UserError(
            f"rank {rank} of {world} holds {shard.shape[0]} rows, but its share of {rows} rows is "
            f"{counts[rank]}; shard with torch.tensor_split and pass rows="
        )
    return counts


def plan_of(
    op: str, counts: tuple[int, ...], group: str, subchunks: int | None = None, in_turn: bool = False
) -> Schedule:
    """The schedule of ``op`` on this rank; ``subchunks`` as in the settings unless given."""
    chosen = transport.settings()
    build = schedule.all_gather if op == "all_gather" else schedule.reduce_scatter
    rank = groups.resolve(group).rank()
    return build(counts, rank, kind=chosen.kind, subchunks=subchunks or chosen.subchunks, in_turn=in_turn)


def gather_way(x_shard: Tensor, w: Tensor, group: str, rows: int | None, site: str) -> Gather:
    """How ``AG(x_shard [M/W, K]) · w [N, K]ᵀ`` is computed; chosen at the first call for these shapes.

    Raises UserError for operands that do not multiply, a shard that does not fit ``rows``, or another device
    than the transport's.
    """
    mover = transport.of(group, x_shard.device)
    key = ("all_gather", rows, *_form(x_shard, w))
    found: Gather | None = mover.ways.get(key)
    if found is None:
        _check_operands(x_shard, w)
        check_device(mover, site, x_shard, w)
        counts = rows_per_rank(x_shard, group, rows)
        plan = plan_of("all_gather", counts, group)
        found = _keep(
            mover, key, _choose(mover, "all_gather", counts, group, plan, x_shard, w, site), x_shard, w
        )
    return found


def scatter_way(x: Tensor, w: Tensor, group: str, site: str) -> Scatter:
    """How ``RS(x [M, K] · w [N, K]ᵀ)`` is computed; chosen at the first call for these shapes.

    Raises UserError for operands that do not multiply or are on another device than the transport's.
    """
    mover = transport.of(group, x.device)
    key = ("reduce_scatter", None, *_form(x, w))
    found: Scatter | None = mover.ways.get(key)
    if found is None:
        _check_operands(x, w)
        check_device(mover, site, x, w)
        counts = split_rows(x.shape[0], groups.resolve(group).size())
        plan = plan_of("reduce_scatter", counts, group)
        found = _keep(mover, key, _choose(mover, "reduce_scatter", counts, group, plan, x, w, site), x, w)
    return found


def _keep(mover: Transport, key: tuple[Any, ...], way: Any, x: Tensor, w: Tensor) -> Any:
    """Remember ``way``, and the same for captured operations: nothing can be made during a capture."""
    if mover.captured is not None:
        again = getattr(way, "on", None)  # what does not ask for its transport at every call
        mover.captured.keep_way(key, again(mover.captured, x, w) if again else way)
    return mover.keep_way(key, way)


def _form(x: Tensor, w: Tensor) -> tuple[Any, ...]:
    return x.shape, x.dtype, w.shape, w.dtype, w.stride()


def _check_operands(x: Tensor, w: Tensor) -> None:
    if x.dim() != 2 or w.dim() != 2 or x.shape[1] != w.shape[1]:
        raise UserError(
            f"operands {list(x.shape)} and {list(w.shape)} do not multiply: both must be matrices, "
            "[rows, K] and [columns, K]"
        )
    if x.dtype != w.dtype:
        raise UserError(f"operands have dtypes {x.dtype} and {w.dtype}; cast one to the other")


def check_device(mover: Transport, site: str, *operands: Tensor) -> None:
    """Raise UserError for an operand on another device than ``mover``'s: the driver's error says less."""
    for operand in operands:
        if mover.device not in (None, operand.device):
            raise UserError(
                f"{site or 'unnamed site'}: an operand {list(operand.shape)} is on {operand.device}, but "
                f"rank {mover.rank} moves what is on {mover.device} ({mover.name}): move it with "
                f'.to("{mover.device}"), or call torch.cuda.set_device before the first tensor is made'
            )


def _carried(
    mover: Any, op: str, counts: tuple[int, ...], group: str, x: Tensor, w: Tensor
) -> dict[str, Callable[[], Any]]:
    """Ways with carriers, one of which may be the fastest for ``x [rows, K]`` and ``w [N, K]``."""
    from flashtrain.kernels.overlapped_matmul.config import configs

    world, gathers, config = len(counts), op == "all_gather", configs(x.dtype)[0]
    width = x.shape[1] if gathers else w.shape[0]
    if 2 * w.numel() * world > _MOST_OPERATIONS * (world - 1) * width * x.itemsize:
        return {}
    found: dict[str, Callable[[], Any]] = {}
    sms = torch.cuda.get_device_properties(x.device).multi_processor_count - transport.spare_sms()
    tiles = sum(-(-rows // config.block_m) for rows in counts) * -(-w.shape[0] // config.block_n)
    for fewest in _CARRIERS:
        # Those of a scatter share out the peers, evenly.
        carriers = fewest if gathers else -(-fewest // (world - 1)) * (world - 1)
        name = f"fused carried by {carriers} {config} in"
        for ranges in _COLUMN_RANGES if gathers and tiles <= sms - carriers else ():
            plan = plan_of(op, counts, group, 1, in_turn=True)
            found[f"{name} {ranges} columns"] = partial(
                fused.FusedGather, mover, plan, x, w, config, carriers=carriers, parts=ranges
            )
        for subchunks in () if gathers else _CARRIED_SUBCHUNKS:
            if max(counts) >= subchunks * _FEWEST_ROWS:
                plan = plan_of(op, counts, group, subchunks, in_turn=True)
                found[f"{name} {subchunks}"] = partial(
                    fused.FusedScatter, mover, plan, x, w, config, carriers=carriers
                )
    return found


def _choose(
    mover: Transport,
    op: str,
    counts: tuple[int, ...],
    group: str,
    plan: Schedule,
    x: Tensor,
    w: Tensor,
    site: str,
) -> Any:
    """A way to compute ``op`` of ``x [rows, K]`` and ``w [N, K]``."""
    if x.is_cuda and capturing():
        raise mover.uncaptured(site)
    by_chunks = ChunkedGather if plan.gathers else ChunkedScatter
    chosen = transport.settings()
    if not (mover.has_kernels and chosen.fused) or fused.refusal(plan, x, w) is not None:
        return by_chunks(plan, group)
    by_kernel: Any = fused.FusedGather if plan.gathers else fused.FusedScatter
    if not chosen.tune:
        return by_kernel(mover, plan, x, w)
    from flashtrain.kernels.overlapped_matmul.config import configs, default_config

    sms = torch.cuda.get_device_properties(x.device).multi_processor_count
    usual = default_config(
        [chunk.rows for chunk in plan.chunks], w.shape[0], x.dtype, sms - transport.spare_sms()
    )
    listed = sorted(configs(x.dtype), key=lambda config: config != usual)
    candidates: dict[str, Callable[[], Any]] = {}
    for subchunks in _SUBCHUNKS:
        if subchunks > 1 and max(counts) < subchunks * _FEWEST_ROWS:
            continue
        cut = plan_of(op, counts, group, subchunks)
        for config in listed:
            candidates[f"fused {config} in {subchunks}"] = partial(by_kernel, mover, cut, x, w, config)
        if plan.gathers:
            candidates[f"chunked in {subchunks}"] = partial(StreamedGather, mover, cut, x, w)  # type: ignore[arg-type]
            continue
        candidates[f"chunked in {subchunks}"] = partial(ChunkedScatter, cut, group)
    candidates |= _carried(mover, op, counts, group, x, w)
    candidates["whole"] = partial(WholeGather if plan.gathers else WholeScatter, plan, group)
    layout = "" if w.stride(1) == 1 else " transposed"
    name = f"{op} {tune.bucket(plan.rows)} x {w.shape[0]} x {w.shape[1]} {x.dtype}{layout}"
    exchange = transport.exchange_of(group)
    return tune.choose(name, candidates, lambda way: way(x, w, site), mover, exchange, x.device)
