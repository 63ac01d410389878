"""What the kernels of ``triton.py`` compute, naively: the oracle of their tests, and the path on a CPU.

Same arguments, same effects on outputs, partials and flags; each product is formed in fp64 and rounded once.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from flashtrain.errors import UserError
from flashtrain.kernels.ordered_sum.reference import ordered_sum
from flashtrain.kernels.overlapped_matmul.plan import Part, own_block


def matmul(x: Tensor, w: Tensor, out: Tensor) -> None:
    """``out [M, N] = x [M, K] · w [N, K]ᵀ``."""
    out.copy_(torch.mm(x.double(), w.double().t()))


def gather_matmul(
    x_own: Tensor,
    x_buffer: Tensor,
    w: Tensor,
    flags: Tensor,
    epoch: int | Tensor,
    chunks: Sequence[Part],
    out: Tensor,
) -> None:
    """``out [M, N] = x_full · wᵀ``, own rows of x_full from ``x_own``, others from ``x_buffer`` ``[M, K]``.

    Nothing raises flags while this runs, so UserError names the first chunk whose flag is not up.
    """
    start, _ = own_block(chunks)
    for part in chunks:
        _expect(part.own or not part.rows or _is_up(flags[part.chunk], epoch), f"chunk {part.chunk}")
        source = x_own if part.own else x_buffer
        first = part.offset - start if part.own else part.offset
        matmul(source[first : first + part.rows], w, out[part.offset : part.offset + part.rows])


def matmul_scatter(
    x: Tensor,
    w: Tensor,
    partials: Tensor,
    counters: Tensor,
    ready: Tensor,
    slots: Tensor,
    arrived: Tensor,
    epoch: int | Tensor,
    chunks: Sequence[Part],
    rank: int,
    out: Tensor,
) -> None:
    """Others' rows into ``partials``; ``out`` = sum over ``slots`` with the own partial at ``rank``.

    Each partial is rounded once to the slots' dtype, the sum is in fp32 in rank order, rounded once.
    """
    start, _ = own_block(chunks)
    sub = 0
    for part in chunks:
        rows = slice(part.offset, part.offset + part.rows)
        if not part.own:
            matmul(x[rows], w, partials[rows])
            ready[part.chunk] = int(epoch)
            continue
        kept = slice(part.offset - start, part.offset - start + part.rows)
        for peer in range(slots.shape[0]):
            here = peer == rank or not part.rows or _is_up(arrived.view(slots.shape[0], -1)[peer, sub], epoch)
            _expect(here, f"own sub-chunk {sub} of rank {peer}")
        mine = torch.mm(x[rows].double(), w.double().t()).to(slots.dtype)
        terms = [mine if peer == rank else slots[peer, kept] for peer in range(slots.shape[0])]
        # In fp32 whatever the wire carries, so that only the last rounding is to the output's dtype.
        out[kept] = ordered_sum(torch.stack(terms).float()).to(out.dtype)
        sub += 1


def _is_up(flag: Tensor, epoch: int | Tensor) -> bool:
    """Whether ``(int)(flag - epoch) >= 0`` in 32 bits."""
    return (int(flag) - int(epoch)) % 2**32 < 2**31


def _expect(arrived: bool, what: str) -> None:
    if not arrived:
        raise UserError(f"{what} has not arrived and the reference does not wait; set its flag first")
