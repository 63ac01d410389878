"""Products prepared for fixed shapes, one class a kernel; see ``triton`` for what each computes."""

import torch
from torch import Tensor

from flashtrain.kernels.launch import Argument, Pointer
from flashtrain.kernels.overlapped_matmul.config import Config
from flashtrain.kernels.overlapped_matmul.gather import gather_kernel
from flashtrain.kernels.overlapped_matmul.plan import Part, tile_plan
from flashtrain.kernels.overlapped_matmul.product import WORDS, Product, choose
from flashtrain.kernels.overlapped_matmul.scatter import scatter_kernel

_ADDED_ROWS = 32  # at a time: 16 bytes of every slot, four times a thread


class GatherMatmul(Product):
    """``gather_matmul`` prepared for the shapes of its arguments; ``flags`` None waits for nothing.

    With ``parts`` each chunk has as many flags in a row, one for each range of columns of ``column_ranges``.
    """

    kernel = gather_kernel

    def __init__(
        self,
        x_own: Tensor,
        x_buffer: Tensor | None,
        w: Tensor,
        out: Tensor,
        chunks: tuple[Part, ...],
        *,
        waits: bool = True,
        parts: int = 1,
        config: Config | None = None,
        spare_sms: int = 0,
    ) -> None:
        full = x_own if x_buffer is None else x_buffer
        config = config or choose(x_own, w, chunks, spare_sms)
        plan = tile_plan(chunks, config.block_m, gathers=True, device=x_own.device)
        super().__init__(x_own, w, out, plan, config, spare_sms)
        arguments: dict[str, Argument] = {
            "own_desc": self._operand(x_own if x_own.shape[0] else full),
            "full_desc": self._operand(full),
            "w_desc": self._w,
            "out": self._result(out, config.block_n // 2 if config.split else config.block_n),
            **{name: Pointer(torch.int32) for name in ("flags", *WORDS)},
            **dict.fromkeys(("epoch", *self.numbers())),
        }
        # The pipeline that is laid across tiles knows no third loop.
        self._build(arguments, WAITS=waits, PARTS=parts, FLATTEN=self.config.flatten and parts == 1)

    def numbers(self) -> dict[str, int]:
        return {
            "tiles": self.tiles,
            "columns": self.column_tiles,
            "steps": self.steps,
            "width": self.columns,
        }

    def __call__(
        self,
        x_own: Tensor,
        x_buffer: Tensor | None,
        w: Tensor,
        flags: Tensor | None,
        epoch: int,
        out: Tensor,
    ) -> None:
        """Enqueue on the current stream; arguments shaped as those it was built from."""
        if not self.tiles:
            return
        full = x_own if x_buffer is None else x_buffer
        own = x_own if x_own.shape[0] else full
        tensors = {"own_desc": own, "full_desc": full, "w_desc": w, "out": out, "flags": flags}
        self._start(tensors, epoch, w)


class MatmulScatter(Product):
    """``matmul_scatter`` prepared for the shapes of its arguments.

    ``arrived_stride``: distance in words between the flags of two sources.
    """

    kernel = scatter_kernel

    def __init__(
        self,
        x: Tensor,
        w: Tensor,
        partials: Tensor,
        slots: Tensor,
        out: Tensor,
        chunks: tuple[Part, ...],
        rank: int,
        *,
        arrived_stride: int,
        config: Config | None = None,
        spare_sms: int = 0,
    ) -> None:
        config = config or choose(x, w, chunks, spare_sms)
        plan = tile_plan(chunks, config.block_m, gathers=False, device=x.device)
        super().__init__(x, w, out, plan, config, spare_sms)
        self.rank, self.world, self.arrived_stride = rank, slots.shape[0], arrived_stride
        columns = config.block_n // 2 if config.split else config.block_n
        arguments: dict[str, Argument] = {
            "x_desc": self._operand(x),
            "w_desc": self._w,
            "store": self._result(partials, columns),
            "partials": Pointer(partials.dtype, aligned=True),
            "out": Pointer(out.dtype, aligned=True),
            "slots": Pointer(slots.dtype, aligned=True),
            **{name: Pointer(torch.int32) for name in ("counters", "ready", "arrived", *WORDS)},
            **dict.fromkeys(("epoch", *self.numbers())),
        }
        self._build(arguments, WORLD=self.world, PIECE=min(_ADDED_ROWS, config.block_m))

    def numbers(self) -> dict[str, int]:
        plan = self.plan
        return {
            "others": (plan.row_tiles - plan.own_row_tiles) * self.column_tiles,
            "tiles": self.tiles,
            "columns": self.column_tiles,
            "steps": self.steps,
            "width": self.columns,
            "own_rows": plan.own_rows,
            "rank": self.rank,
            "stride": self.arrived_stride,
            "first_own": plan.first_own,
            "row_tiles": plan.row_tiles,
            "empties": plan.empties,
        }

    def __call__(
        self,
        x: Tensor,
        w: Tensor,
        partials: Tensor,
        counters: Tensor,
        ready: Tensor,
        slots: Tensor,
        arrived: Tensor,
        epoch: int,
        out: Tensor,
    ) -> None:
        """Enqueue on the current stream; arguments shaped as those it was built from."""
        if not (self.tiles or self.plan.empties):
            return
        tensors = {
            "x_desc": x, "w_desc": w, "store": partials, "partials": partials, "out": out, "slots": slots,
            "counters": counters, "ready": ready, "arrived": arrived,
        }  # fmt: skip
        self._start(tensors, epoch, w)
