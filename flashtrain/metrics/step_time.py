"""Where the time of a step goes: records of a profiler, sorted by name, laid over each other."""

import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

GEMM, ATTENTION, POINTWISE = "matrix products", "attention", "norms and pointwise"
LOSS, OPTIMIZER = "loss", "optimizer"
EXPOSED, IDLE = "exposed communication", "idle"
# In this order: an instant in which several run counts for the first. A product that computes and waits in
# one kernel counts as a product all the time.
KINDS = (GEMM, ATTENTION, LOSS, OPTIMIZER, POINTWISE, EXPOSED, IDLE)

# Names of kernels, by what a profile of torch 2.11 on Hopper GPUs and our Triton kernels show. The first that
# is found in a name decides, so what names both an operation and its means stands in front.
_KERNELS = (
    (EXPOSED, r"nccl|Memcpy (PtoP|P2P)|Memcpy DtoD|wait_flag|wait_value|_sum_slots|^carry|barrier|signal"),
    (
        ATTENTION,
        r"fmha|flash|sdpa|attention|attn|softmax_warp|^(take_slope|(query|key|value|score)_gradient)_kernel",
    ),
    (LOSS, r"cross_entropy|log_?softmax|nll_loss|statistics_kernel|slopes_kernel|softmax"),
    (OPTIMIZER, r"multi_tensor|adam|l2norm|lpnorm|NormTwoOps|foreach|^(squares|update)_kernel"),
    (GEMM, r"gemm|nvjet|xmma|cutlass|cublas|splitK|^(gather|scatter)_kernel|dot_kernel|gemv"),
)
# Names of torch's operators, for runs on the CPU.
_OPERATORS = (
    (EXPOSED, r"flashtrain::|c10d::|gloo:|send|recv"),
    (ATTENTION, r"scaled_dot_product|flash_attention"),
    (LOSS, r"cross_entropy|log_softmax|nll_loss|_softmax"),
    (OPTIMIZER, r"_fused_adamw|_foreach|linalg_vector_norm|aten::norm|Optimizer"),
    (GEMM, r"aten::(mm|addmm|bmm|baddbmm|linear|matmul)$"),
)
_COMPILED = {
    "kernel": [(kind, re.compile(pattern, re.IGNORECASE)) for kind, pattern in _KERNELS],
    "operator": [(kind, re.compile(pattern, re.IGNORECASE)) for kind, pattern in _OPERATORS],
}


class Record(NamedTuple):
    """A stretch of time in which something called ``name`` ran; in nanoseconds of one clock."""

    name: str
    start: int
    end: int


class Account(NamedTuple):
    """Seconds of each of ``KINDS``, which add up to ``seconds``; ``moving`` in which data moved at all."""

    seconds: float
    kinds: dict[str, float]
    moving: float

    @property
    def hidden(self) -> float | None:
        """Share of the communication time beside which something was computed; None without any."""
        return None if self.moving <= 0 else max(0.0, 1.0 - self.kinds[EXPOSED] / self.moving)


def kind_of(name: str, what: str = "kernel") -> str:
    """Which of ``KINDS`` a kernel (or, on the CPU, an "operator") of that name belongs to."""
    for kind, pattern in _COMPILED[what]:
        if pattern.search(name):
            return kind
    return POINTWISE


def account(records: Iterable[Record], start: int | None = None, end: int | None = None) -> Account:
    """What ran in each instant from ``start`` to ``end`` (default: of the first and last record), once.

    ``records`` are those of one device, of all its streams. An instant counts for the first of ``KINDS``
    that runs in it, for communication if nothing else does, and as idle if nothing does.
    """
    found = [Record(*record) for record in records]
    first = min((r.start for r in found), default=0) if start is None else start
    last = max((r.end for r in found), default=first) if end is None else end
    changes: list[tuple[int, int, int]] = []
    for record in found:
        begin, stop = max(record.start, first), min(record.end, last)
        if stop > begin:
            rank = KINDS.index(kind_of(record.name))
            changes += [(begin, 1, rank), (stop, -1, rank)]
    changes.sort()
    spent, running, moving, now = [0] * len(KINDS), [0] * len(KINDS), 0, first
    idle, exposed = KINDS.index(IDLE), KINDS.index(EXPOSED)
    for moment, change, rank in changes:
        spent[next((i for i, count in enumerate(running) if count), idle)] += moment - now
        moving += moment - now if running[exposed] else 0
        running[rank] += change
        now = moment
    spent[idle] += last - now
    kinds = {kind: spent[rank] * 1e-9 for rank, kind in enumerate(KINDS)}
    return Account((last - first) * 1e-9, kinds, moving * 1e-9)


def account_of_operators(own_seconds: Mapping[str, float], seconds: float) -> dict[str, float]:
    """Seconds of each of ``KINDS`` from the time that operators of one thread spent themselves."""
    kinds = dict.fromkeys(KINDS, 0.0)
    for name, own in own_seconds.items():
        kinds[kind_of(name, "operator")] += own
    kinds[IDLE] = max(0.0, seconds - sum(kinds.values()))
    return kinds
