"""Products prepared for fixed shapes: compiled, planned, and launched for the cost of a launch."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from flashtrain.errors import UserError
from flashtrain.kernels.overlapped_matmul.config import Config, default_config
from flashtrain.kernels.overlapped_matmul.gather import gather_kernel
from flashtrain.kernels.overlapped_matmul.launch import INTERPRETED, Argument, Launch, Matrix, Pointer
from flashtrain.kernels.overlapped_matmul.plan import Part, TilePlan, tile_plan
from flashtrain.kernels.overlapped_matmul.scatter import scatter_kernel

# The interpreter runs blocks one after the other; a few show that the work is shared out.
_INTERPRETED_BLOCKS = 3
_ADDED_ROWS = 32  # at a time: 16 bytes of every slot, four times a thread


class Product:
    """A compiled product for fixed shapes, strides and chunks; subclasses name the kernel and its arguments.

    Building one compiles; calling one costs a launch. It keeps no tensor alive.
    """

    kernel: Any

    def __init__(
        self, x: Tensor, w: Tensor, out: Tensor, plan: TilePlan, config: Config, spare_sms: int
    ) -> None:
        self.plan, self.config, self.device = plan, config, x.device
        self.columns, self.inner = w.shape
        self.transposed = w.stride(1) != 1
        self.column_tiles = -(-self.columns // config.block_n)
        self.tiles = plan.row_tiles * self.column_tiles
        self.steps = -(-self.inner // config.block_k)
        block = (config.block_k, config.block_n) if self.transposed else (config.block_n, config.block_k)
        stored = w.t() if self.transposed else w
        self._w = Matrix(stored.shape[0], stored.shape[1], stored.stride(0), w.dtype, block)
        self._arguments: dict[str, Argument] = {}
        self._launch: Launch | None = None
        self._sms = 0
        if not INTERPRETED:
            self._sms = torch.cuda.get_device_properties(x.device).multi_processor_count - spare_sms
            if self._sms < 1:
                raise UserError(f"spare_sms={spare_sms} leaves no multiprocessor of {x.device}; lower it")

    def _operand(self, x: Tensor) -> Matrix:
        shape = (self.config.block_m, self.config.block_k)
        return Matrix(max(x.shape[0], 1), x.shape[1], x.stride(0), x.dtype, shape)

    def _result(self, out: Tensor, columns: int) -> Argument:
        if self.plan.masked:
            return Pointer(out.dtype, aligned=True)
        shape = (self.config.block_m, columns)
        return Matrix(max(out.shape[0], 1), out.shape[1], out.stride(0), out.dtype, shape)

    def constants(self) -> dict[str, Any]:
        """Compile-time arguments that all kernels share."""
        config = self.config
        return {
            "BM": config.block_m,
            "BN": config.block_n,
            "BK": config.block_k,
            "GROUP": config.group,
            "SPLIT": config.split,
            "FLATTEN": config.flatten,
            "TRANSPOSED": self.transposed,
            "MASKED": self.plan.masked,
            "PRECISION": "ieee",
        }

    def _build(self, arguments: dict[str, Argument], **constants: Any) -> None:
        self._arguments, self._constants = arguments, self.constants() | constants
        # What TMA reads the driver checks; these addresses nobody else does.
        self._aligned = [
            index
            for index, value in enumerate(arguments.values())
            if isinstance(value, Pointer) and value.aligned
        ]
        self.blocks = _INTERPRETED_BLOCKS
        if not INTERPRETED:
            self._launch = Launch(
                self.kernel, arguments, self._constants,
                warps=self.config.warps, stages=self.config.stages, device=self.device,
            )  # fmt: skip
            self.blocks = max(1, min(self._sms * self._launch.blocks_per_sm(), self.tiles))

    def values(self, tensors: Sequence[Tensor | None], numbers: Sequence[int], anchor: Tensor) -> list[int]:
        """Arguments as ``Launch.start`` takes them; absent and empty tensors point to ``anchor``."""
        fallback = anchor.data_ptr()
        addresses = [fallback if tensor is None else tensor.data_ptr() or fallback for tensor in tensors]
        for index in self._aligned:
            if addresses[index] % 16:
                name = list(self._arguments)[index]
                raise UserError(f"{name} starts at {addresses[index]:#x}, no multiple of 16 bytes; align it")
        return [*addresses, *numbers]

    def _start(self, tensors: Sequence[Tensor | None], numbers: Sequence[int], anchor: Tensor) -> None:
        if self._launch is None:
            self._interpret(tensors, numbers, anchor)
        else:
            stream = torch._C._cuda_getCurrentRawStream(self.device.index)
            self._launch.start(self.blocks, stream, self.values(tensors, numbers, anchor))

    def _interpret(self, tensors: Sequence[Tensor | None], numbers: Sequence[int], anchor: Tensor) -> None:
        values: list[Any] = []
        for argument, tensor in zip(self._arguments.values(), tensors, strict=False):
            if tensor is None or not tensor.numel():
                # A tensor of the right type that no tile touches.
                kind = argument.dtype if isinstance(argument, Matrix | Pointer) else anchor.dtype
                shape = (argument.rows, argument.pitch) if isinstance(argument, Matrix) else (4,)
                tensor = torch.empty(shape, dtype=kind)
            if isinstance(argument, Matrix):
                extents, strides = [argument.rows, argument.columns], [argument.pitch, 1]
                values.append(TensorDescriptor(tensor, extents, strides, list(argument.block)))
            else:
                values.append(tensor)
        wrapped = [(number + 2**31) % 2**32 - 2**31 for number in numbers]
        self.kernel[(self.blocks,)](*values, *wrapped, **self._constants)


def _epoch(epoch: int | Tensor) -> tuple[int, Tensor | None]:
    return (epoch & 0xFFFFFFFF, None) if isinstance(epoch, int) else (0, epoch)


class GatherMatmul(Product):
    """``gather_matmul`` prepared for the shapes of its arguments; ``flags`` None waits for nothing."""

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
        device_epoch: bool = False,
        config: Config | None = None,
        spare_sms: int = 0,
    ) -> None:
        full = x_own if x_buffer is None else x_buffer
        config = config or _choose(x_own, w, chunks, spare_sms)
        plan = tile_plan(chunks, config.block_m, gathers=True, device=x_own.device)
        super().__init__(x_own, w, out, plan, config, spare_sms)
        arguments: dict[str, Argument] = {
            "own_desc": self._operand(x_own if x_own.shape[0] else full),
            "full_desc": self._operand(full),
            "w_desc": self._w,
            "out": self._result(out, config.block_n // 2 if config.split else config.block_n),
            **{name: Pointer(torch.int32) for name in ("flags", "word", "plan")},
            **dict.fromkeys(("epoch", "tiles", "columns", "steps", "width")),
        }
        self._build(arguments, WAITS=waits, WORD=device_epoch)

    def __call__(
        self,
        x_own: Tensor,
        x_buffer: Tensor | None,
        w: Tensor,
        flags: Tensor | None,
        epoch: int | Tensor,
        out: Tensor,
    ) -> None:
        """Enqueue on the current stream; arguments shaped as those it was built from."""
        if not self.tiles:
            return
        number, word = _epoch(epoch)
        full = x_own if x_buffer is None else x_buffer
        tensors = (x_own if x_own.shape[0] else full, full, w, out, flags, word, self.plan.records)
        self._start(tensors, (number, self.tiles, self.column_tiles, self.steps, self.columns), w)


class MatmulScatter(Product):
    """``matmul_scatter`` prepared for the shapes of its arguments."""

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
        device_epoch: bool = False,
        config: Config | None = None,
        spare_sms: int = 0,
    ) -> None:
        config = config or _choose(x, w, chunks, spare_sms)
        plan = tile_plan(chunks, config.block_m, gathers=False, device=x.device)
        super().__init__(x, w, out, plan, config, spare_sms)
        self.rank, self.world = rank, slots.shape[0]
        arguments: dict[str, Argument] = {
            "x_desc": self._operand(x),
            "w_desc": self._w,
            "store": self._result(partials, config.block_n // 2 if config.split else config.block_n),
            "partials": Pointer(partials.dtype, aligned=True),
            "out": Pointer(out.dtype, aligned=True),
            "slots": Pointer(slots.dtype, aligned=True),
            **{name: Pointer(torch.int32) for name in ("counters", "ready", "arrived", "word", "plan")},
            **dict.fromkeys(("epoch", "others", "tiles", "columns", "steps", "width", "own_rows", "rank")),
            **dict.fromkeys(("stride", "first_own", "row_tiles", "empties")),
        }
        self._build(arguments, WORLD=self.world, PIECE=min(_ADDED_ROWS, config.block_m), WORD=device_epoch)

    def __call__(
        self,
        x: Tensor,
        w: Tensor,
        partials: Tensor,
        counters: Tensor,
        ready: Tensor,
        slots: Tensor,
        arrived: Tensor,
        epoch: int | Tensor,
        out: Tensor,
    ) -> None:
        """Enqueue on the current stream; arguments shaped as those it was built from."""
        plan = self.plan
        if not (self.tiles or plan.empties):
            return
        number, word = _epoch(epoch)
        tensors = (x, w, partials, partials, out, slots, counters, ready, arrived, word, plan.records)
        others = (plan.row_tiles - plan.own_row_tiles) * self.column_tiles
        sizes = (number, others, self.tiles, self.column_tiles, self.steps, self.columns)
        rest = (plan.own_rows, self.rank, plan.own_chunks, plan.first_own, plan.row_tiles, plan.empties)
        self._start(tensors, (*sizes, *rest), w)


def _choose(x: Tensor, w: Tensor, chunks: tuple[Part, ...], spare_sms: int) -> Config:
    sms = 132 if INTERPRETED else torch.cuda.get_device_properties(x.device).multi_processor_count
    return default_config([part.rows for part in chunks], w.shape[0], x.dtype, max(sms - spare_sms, 1))
