"""Products that run while their operand arrives or their result leaves (tier T1), for Hopper GPUs.

    gather_matmul    y [M, N] = x_full [M, K] · wᵀ; rows of other ranks are read once their flag is up
    matmul_scatter   y_own [M/W, N] = sum over ranks of x · wᵀ; partials of other ranks' rows leave by chunk
    matmul           the same kernel with everything at hand

``w`` is ``[N, K]``; a weight ``[K, N]`` (dgrad: dy · w) goes in as its transposed view, without a copy.
fp32 operands are multiplied in IEEE fp32, since fp32 runs are for comparing; bf16 and fp16 on the tensor
cores with fp32 accumulation along K in one order, whatever the tiles, the chunks and the time of arrival.

Flags are 32-bit words, up when ``(int)(flag - epoch) >= 0``; a CUDA graph keeps the ``epoch`` that it was
captured with. Enqueue the copies that raise flags before the kernel that waits, or on a stream that does not
depend on it. A wait has no deadline of its own: whoever gives up writes the flags.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from flashtrain.errors import UserError
from flashtrain.kernels.launch import INTERPRETED
from flashtrain.kernels.overlapped_matmul.config import Config, refusal
from flashtrain.kernels.overlapped_matmul.plan import Part, TilePlan
from flashtrain.kernels.overlapped_matmul.prepared import GatherMatmul, MatmulScatter

_MOST_RANKS = 32  # one warp polls the peers' flags


def _form(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.device


_prepared: dict[tuple[Any, ...], Any] = {}
_MOST_PREPARED = 4096


def _keep(key: tuple[Any, ...], product: Any) -> None:
    """Ragged batches bring ever new shapes; a prepared product is cheap to build again."""
    if len(_prepared) >= _MOST_PREPARED:
        _prepared.clear()
    _prepared[key] = product


@lru_cache(maxsize=256)
def _whole(rows: int) -> tuple[Part, ...]:
    return (Part(0, 0, rows, True),)


def _check(x: Tensor, w: Tensor, *others: Tensor) -> None:
    if x.dim() != 2 or w.dim() != 2 or x.shape[1] != w.shape[1] or x.dtype != w.dtype:
        raise UserError(
            f"operands {list(x.shape)} {x.dtype} and {list(w.shape)} {w.dtype} do not multiply: they must be "
            "[rows, K] and [N, K] of one dtype"
        )
    if not INTERPRETED and not all(t.is_cuda for t in (x, w, *others)):
        raise UserError("these kernels run on the GPU; on the CPU use the functions of reference.py")
    for tensor in others:
        if tensor.shape[-1] not in (x.shape[1], w.shape[0]) or not tensor.is_contiguous():
            raise UserError(f"a buffer of shape {list(tensor.shape)} must be contiguous and K or N wide")
    reason = refusal(x, w, *others)
    if reason:
        raise UserError(reason)


def _check_words(needed: int, **words: Tensor) -> None:
    for name, word in words.items():
        if word.dtype not in (torch.int32, torch.uint32) or word.numel() < needed or not word.is_contiguous():
            raise UserError(
                f"{name} must be {needed} contiguous int32 or uint32 words, not {list(word.shape)} "
                f"{word.dtype}"
            )


def matmul(x: Tensor, w: Tensor, out: Tensor, *, config: Config | None = None, spare_sms: int = 0) -> None:
    """``out [M, N] = x [M, K] · w [N, K]ᵀ`` by the persistent kernel; UserError where it refuses."""
    key = ("matmul", _form(x), _form(w), _form(out), config, spare_sms)
    product = _prepared.get(key)
    if product is None:
        _check(x, w, out)
        parts = _whole(x.shape[0])
        product = GatherMatmul(x, None, w, out, parts, waits=False, config=config, spare_sms=spare_sms)
        _keep(key, product)
    product(x, None, w, None, 0, out)


def gather_matmul(
    x_own: Tensor,
    x_buffer: Tensor,
    w: Tensor,
    flags: Tensor,
    epoch: int,
    chunks: Sequence[Part],
    out: Tensor,
    *,
    config: Config | None = None,
    spare_sms: int = 1,
) -> None:
    """``out [M, N] = x_full [M, K] · w [N, K]ᵀ``, where x_full's own rows are ``x_own`` and others arrive.

    ``chunks`` in the order of computation; tiles of a chunk that is not own read its rows of ``x_buffer``
    ``[M, K]`` once ``flags[chunk]`` is up for ``epoch``. Rows of ``x_buffer`` in the own block are not read.
    ``spare_sms`` multiprocessors are left to other kernels while this one spins. Raises UserError
    for operands that do not fit, with the reason of ``config.refusal``.
    """
    chunks = tuple(chunks)
    forms = (_form(x_own), _form(x_buffer), _form(w), _form(out), flags.numel())
    key = ("gather", *forms, chunks, config, spare_sms)
    product = _prepared.get(key)
    if product is None:
        _check(x_own, w, x_buffer, out)
        product = GatherMatmul(x_own, x_buffer, w, out, chunks, config=config, spare_sms=spare_sms)
        _check_fit(product.plan, x_own.shape[0], out.shape[0], x_buffer.shape[0])
        _check_words(product.plan.chunks, flags=flags)
        _keep(key, product)
    product(x_own, x_buffer, w, flags, epoch, out)


def matmul_scatter(
    x: Tensor,
    w: Tensor,
    partials: Tensor,
    counters: Tensor,
    ready: Tensor,
    slots: Tensor,
    arrived: Tensor,
    epoch: int,
    chunks: Sequence[Part],
    rank: int,
    out: Tensor,
    *,
    config: Config | None = None,
    spare_sms: int = 1,
) -> None:
    """``out [own rows, N]`` = sum over ranks of their ``x [M, K] · w [N, K]ᵀ``, own rows; the rest leaves.

    ``chunks`` in the order of computation, own ones last. A chunk of others is written to its rows of
    ``partials`` ``[M, N]``, then ``ready[chunk]`` is set to ``epoch`` (for an empty one at once): push it
    then. ``slots`` ``[W, own rows, N]`` take the peers' partials of the own rows; ``arrived[source, sub]``
    ``[W, own chunks]`` says that own sub-chunk ``sub`` of ``source`` is in. ``out`` is p_0 + ... + p_{W-1} in
    rank order in fp32, each p rounded to the slots' dtype once, and one final rounding; slot ``rank`` is not
    read. The own rows of ``partials`` are scratch. ``counters`` ``[chunks]`` must be 0 before the
    first call and are 0 after each. UserError as above.
    """
    chunks = tuple(chunks)
    forms = (_form(x), _form(w), _form(partials), _form(slots), _form(out))
    words = (counters.numel(), ready.numel(), arrived.numel())
    key = ("scatter", *forms, *words, chunks, rank, config, spare_sms)
    product = _prepared.get(key)
    if product is None:
        _check(x, w, partials, slots, out)
        product = MatmulScatter(
            x,
            w,
            partials,
            slots,
            out,
            chunks,
            rank,
            arrived_stride=arrived.numel() // slots.shape[0],
            config=config,
            spare_sms=spare_sms,
        )
        _check_fit(product.plan, out.shape[0], x.shape[0], partials.shape[0])
        _check_words(product.plan.chunks, counters=counters, ready=ready)
        _check_slots(product, slots, arrived, rank)
        if slots.dtype != partials.dtype:
            raise UserError(
                f"partials are {partials.dtype} but slots {slots.dtype}: both carry the wire's dtype"
            )
        _keep(key, product)
    product(x, w, partials, counters, ready, slots, arrived, epoch, out)


def _check_slots(product: MatmulScatter, slots: Tensor, arrived: Tensor, rank: int) -> None:
    _check_words(slots.shape[0] * product.plan.own_chunks, arrived=arrived)
    if slots.shape[1] != product.plan.own_rows or not 0 <= rank < slots.shape[0] <= _MOST_RANKS:
        raise UserError(
            f"slots {list(slots.shape)} do not fit rank {rank} with {product.plan.own_rows} own rows"
        )


def _check_fit(plan: TilePlan, own_rows: int, *rows: int) -> None:
    if own_rows != plan.own_rows or any(count < plan.total_rows for count in rows):
        raise UserError(
            f"the chunks have {plan.own_rows} own and {plan.total_rows} rows in all, the tensors {own_rows} "
            f"and {rows}"
        )
