"""A schedule and its products in one kernel (tier T1): nvlink on Hopper GPUs, bf16 and fp16.

The kernel of a gather waits for each chunk's flag itself; that of a scatter signals each chunk, and adds what
has arrived to its own rows. Chunks are moved by copy engines, or by carriers: a
kernel beside the product, on multiprocessors of its own (``kernels/overlapped_matmul/carry``). The host makes
one call into C++ an operation, which enqueues all copies, flags and kernels. The bits of a product do not
depend on tiles, sub-chunks, arrival or who moves them.
"""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from flashtrain.comm import transport
from flashtrain.comm.chunked import Landed
from flashtrain.comm.schedule import Schedule
from flashtrain.comm.transport.base import clock

if TYPE_CHECKING:
    from flashtrain.comm.transport.nvlink import NvlinkTransport
    from flashtrain.kernels.overlapped_matmul.carry import Cargo
    from flashtrain.kernels.overlapped_matmul.config import Config

_TMA_BYTES = 16  # bases and row pitches are multiples of it
_MOST_RANKS = 32  # one warp polls the peers' flags


def refusal(plan: Schedule, x: Tensor, w: Tensor) -> str | None:
    """Why ``x [rows, K]`` · ``w [N, K]ᵀ`` cannot run fused, or None; the same on all ranks."""
    if plan.kind != "direct":
        return "a ring adds from rank to rank"
    if x.dtype not in (torch.bfloat16, torch.float16):
        return f"{x.dtype} operands are multiplied by cuBLAS"
    if not (plan.rows and w.numel()):
        return "there is nothing to multiply"
    for name, columns in (("K", x.shape[1]), ("N", w.shape[0])):
        if columns * x.itemsize % _TMA_BYTES:
            return f"{name} = {columns} elements are no multiple of {_TMA_BYTES} bytes"
    if plan.world > _MOST_RANKS:
        return f"{plan.world} ranks are more than {_MOST_RANKS}"
    return None


class _Fused:
    """An operation prepared for fixed shapes, strides and chunks; without ``carriers`` copy engines push."""

    product: Any  # of flashtrain._core
    _kernel: Any

    def __init__(
        self,
        mover: "NvlinkTransport",
        plan: Schedule,
        columns: int,
        x: Tensor,
        w: Tensor,
        carriers: int = 0,
        parts: int = 1,
    ) -> None:
        self.mover, self.plan, self.rows = mover, plan, plan.rows
        self.row_bytes = columns * x.itemsize
        self.own_offset = plan.own_rows.start * self.row_bytes
        self.messages = mover.plan(plan, self.row_bytes, parts, engines=not carriers)
        self.carriers, self.parts, self.spare = carriers, parts, transport.spare_sms() + carriers
        pitch = w.stride(0) if w.stride(1) == 1 else w.stride(1) if w.stride(0) == 1 else 1
        self._copies_weight = pitch * w.itemsize % _TMA_BYTES != 0

    def _operands(self, x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        """What TMA can read: copies where an address or pitch is not a multiple of 16 bytes."""
        if not x.is_contiguous():
            x = x.contiguous()
        if x.data_ptr() % _TMA_BYTES:
            x = x.clone()
        if self._copies_weight or w.data_ptr() % _TMA_BYTES:
            w = w.clone(memory_format=torch.contiguous_format)
        return x, w

    def on(self, mover: "NvlinkTransport", x: Tensor, w: Tensor) -> "_Fused":
        """The same on another transport, for ``x [rows, K]`` and ``w [N, K]`` as those before."""
        again: Any = type(self)  # of which this is the base
        options = {"carriers": self.carriers} | ({"parts": self.parts} if self.parts > 1 else {})
        made: _Fused = again(mover, self.plan, x, w, self._kernel.config, **options)
        return made

    def _carried(self, cargos: "list[Cargo]", source: int, given: int, device: torch.device) -> Any:
        """What carries ``cargos`` of address number ``source`` among ``given``."""
        from flashtrain.comm.carried import Carriers

        self._keep = Carriers(self.mover, self.plan, cargos, self.carriers, source, given, device)
        return self._keep.call

    def _start(self, given: list[int], site: str) -> None:
        self.mover.hold(self)
        self.mover.start(self.product, self.messages.nbytes, given, site)


class FusedGather(_Fused):
    """``y [M, N] = AG(x_shard [M/W, K]) · w [N, K]ᵀ`` for operands shaped as those that it is made with."""

    def __init__(
        self,
        mover: "NvlinkTransport",
        plan: Schedule,
        x_shard: Tensor,
        w: Tensor,
        config: "Config | None" = None,
        *,
        carriers: int = 0,
        parts: int = 1,
    ) -> None:
        from flashtrain.comm import carried
        from flashtrain.kernels.overlapped_matmul.plan import Part
        from flashtrain.kernels.overlapped_matmul.prepared import GatherMatmul

        super().__init__(mover, plan, x_shard.shape[1], x_shard, w, carriers, parts)
        x_shard, w = self._operands(x_shard, w)
        self.columns, own = w.shape[0], plan.own_rows
        # For their shapes alone.
        landing, y = (
            x_shard.new_empty(plan.rows, x_shard.shape[1]),
            x_shard.new_empty(plan.rows, self.columns),
        )
        chunks = []
        for step in plan.steps:
            owner, offset, rows = plan.chunks[step.compute]
            # A chunk's flag is where its owner raises it: its row of the table, its place among the sends.
            number = owner * mover.core.flag_columns + step.compute % plan.subchunks * parts
            chunks.append(Part(number, offset, rows, owner == plan.rank))
        kernel = GatherMatmul(
            x_shard, landing, w, y, tuple(chunks), parts=parts, config=config, spare_sms=self.spare
        )
        place = kernel.names.index
        # Without own rows nothing is read through their descriptor, which must be valid all the same.
        empty = own.start == own.stop
        self._kernel = kernel
        product = mover.core.KernelCall(
            launch=kernel.launch,
            blocks=kernel.blocks,
            values=kernel.template(stop=mover.stop_word),
            places=[[] if empty else [place("own_desc")], [place("w_desc")], [place("out")]],
            landing=[place("full_desc"), *([place("own_desc")] if empty else [])],
            flags=[place("flags")],
            epoch=[place("epoch")],
        )
        carrier = None
        if carriers:
            cargos = carried.gathered(plan, self.row_bytes, kernel.column_ranges(parts))
            carrier = self._carried(cargos, 0, 3, x_shard.device)
        self.product = mover.core.FusedProduct(
            program=self.messages.program,
            product=product,
            carrier=carrier,
            source=0,
            offsets=[
                (plan.chunks[send.chunk].offset - own.start) * self.row_bytes for send in self.messages.sends
            ],
            early=True,
        )

    def __call__(self, x_shard: Tensor, w: Tensor, site: str, landed: Landed | None = None) -> Tensor:
        """``y [M, N]``; ``landed`` gets the gathered rows. Raises TransportError if a peer has failed."""
        started, mover = clock(), self.mover
        x_shard, w = self._operands(x_shard, w)
        y = x_shard.new_empty(self.rows, self.columns)
        self._start([x_shard.data_ptr(), w.data_ptr(), y.data_ptr()], site)
        if landed is not None:
            try:
                # Beside the kernel, which has it already.
                mover.keep(x_shard.data_ptr(), self.own_offset, x_shard.nbytes, site)
                mover.wait_for_all(site)
                landed(mover.landed(x_shard.dtype, (self.rows, x_shard.shape[1])), False)
            except BaseException:
                mover.abandon()
                raise
        mover.finish(site)
        mover.traffic.operating += clock() - started
        return y


class FusedScatter(_Fused):
    """``RS(x [M, K] · w [N, K]ᵀ)``, the own rows ``[M/W, N]``, for operands as those that it is made with."""

    def __init__(
        self,
        mover: "NvlinkTransport",
        plan: Schedule,
        x: Tensor,
        w: Tensor,
        config: "Config | None" = None,
        *,
        carriers: int = 0,
    ) -> None:
        from flashtrain.comm import carried
        from flashtrain.kernels.overlapped_matmul.plan import Part
        from flashtrain.kernels.overlapped_matmul.prepared import MatmulScatter

        super().__init__(mover, plan, w.shape[0], x, w, carriers)
        x, w = self._operands(x, w)
        self.columns, own = w.shape[0], plan.own_rows
        self.own_rows = own.stop - own.start
        # Every step but the own chunks' sends what it computes, so its number is that of its signal.
        numbered = [(number, *plan.chunks[step.compute]) for number, step in enumerate(plan.steps)]
        kernel = self._kernel = MatmulScatter(
            x,
            w,
            x.new_empty(self.rows, self.columns),  # this and what follows for their shapes alone
            x.new_empty(plan.world, self.own_rows, self.columns),
            x.new_empty(self.own_rows, self.columns),
            tuple(Part(number, offset, rows, owner == plan.rank) for number, owner, offset, rows in numbered),
            plan.rank,
            arrived_stride=mover.core.flag_columns,
            config=config,
            spare_sms=self.spare,
        )
        place, counters = kernel.names.index, mover.counters(x.device)
        given = [[place("x_desc")], [place("w_desc")], [place("out")], [place("store"), place("partials")]]
        product = mover.core.KernelCall(
            launch=kernel.launch,
            blocks=kernel.blocks,
            values=kernel.template(counters=counters.data_ptr(), ready=mover.signals, stop=mover.stop_word),
            places=given,
            landing=[place("slots")],
            flags=[place("arrived")],
            epoch=[place("epoch")],
            # Copy engines wait for words in memory of the host.
            signals=[place("ready")] if carriers else [],
        )
        carrier = None
        if carriers:
            carrier = self._carried(carried.scattered(plan, self.row_bytes), 3, len(given), x.device)
        self.product = mover.core.FusedProduct(
            program=self.messages.program,
            product=product,
            carrier=carrier,
            source=3,
            offsets=[plan.chunks[send.chunk].offset * self.row_bytes for send in self.messages.sends],
            early=False,
        )

    def __call__(self, x: Tensor, w: Tensor, site: str) -> Tensor:
        """The own rows ``[M/W, N]``. Raises TransportError if a peer has failed."""
        started, mover = clock(), self.mover
        x, w = self._operands(x, w)
        out = x.new_empty(self.own_rows, self.columns)
        partials = x.new_empty(self.rows, self.columns)
        self._start([tensor.data_ptr() for tensor in (x, w, out, partials)], site)
        mover.finish(site)
        mover.traffic.operating += clock() - started
        return out
