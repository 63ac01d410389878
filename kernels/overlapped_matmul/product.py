"""What every prepared product shares: compiled and planned once, launched for the cost of a launch."""

from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from flashtrain.errors import UserError
from flashtrain.kernels.launch import INTERPRETED, Argument, Matrix, Pointer, launch
from flashtrain.kernels.overlapped_matmul.config import Config, default_config
from flashtrain.kernels.overlapped_matmul.plan import Part, TilePlan

# The interpreter runs blocks one after the other; a few show that the work is shared out.
_INTERPRETED_BLOCKS = 3
# Parameters that every kernel has beside its operands.
WORDS = ("stop", "plan")


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
        self.launch: Any = None  # of flashtrain._core; none under the interpreter
        self._sms = 0
        if not INTERPRETED:
            self._sms = torch.cuda.get_device_properties(x.device).multi_processor_count - spare_sms
            if self._sms < 1:
                raise UserError(f"spare_sms={spare_sms} leaves no multiprocessor of {x.device}; lower it")

    def column_ranges(self, parts: int) -> list[tuple[int, int]]:
        """Columns ``[begin, end)`` of the operand that the kernel reads in each of ``parts``."""
        cuts = [part * self.steps // parts * self.config.block_k for part in range(parts)]
        return list(zip(cuts, [*cuts[1:], self.inner], strict=True))

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
        self.blocks = _INTERPRETED_BLOCKS
        if not INTERPRETED:
            self.launch, residents = launch(
                self.kernel, arguments, self._constants,
                warps=self.config.warps, stages=self.config.stages, device=self.device,
            )  # fmt: skip
            self.blocks = max(1, min(self._sms * residents, self.tiles))

    @property
    def names(self) -> list[str]:
        """Of the kernel's parameters, in the order in which ``launch`` takes their values."""
        return list(self._arguments)

    def numbers(self) -> dict[str, int]:
        """The parameters that are numbers, but for the epoch."""
        raise NotImplementedError

    def template(self, **addresses: int) -> list[int]:
        """A value for each of ``names``: the numbers, the plan, and what is given; all else 0."""
        known = {**self.numbers(), "plan": self.plan.records.data_ptr(), **addresses}
        return [known.get(name, 0) for name in self._arguments]

    def _start(self, tensors: Mapping[str, Tensor | None], epoch: int, anchor: Tensor) -> None:
        """Launch on the current stream; absent and empty tensors point to ``anchor``."""
        present = {name: tensor for name, tensor in tensors.items() if tensor is not None}
        present |= {"plan": self.plan.records, "stop": _never(self.device)}
        number = epoch & 0xFFFFFFFF
        if self.launch is None:
            self._interpret(present, {"epoch": number, **self.numbers()}, anchor)
            return
        fallback = anchor.data_ptr()
        values = {name: tensor.data_ptr() or fallback for name, tensor in present.items()}
        values |= {"epoch": number, **self.numbers()}
        stream = torch._C._cuda_getCurrentRawStream(self.device.index)
        self.launch.start(self.blocks, stream, [values.get(name, fallback) for name in self._arguments])

    def _interpret(self, tensors: Mapping[str, Tensor], numbers: Mapping[str, int], anchor: Tensor) -> None:
        values: list[Any] = []
        for name, argument in self._arguments.items():
            if argument is None:
                values.append((numbers[name] + 2**31) % 2**32 - 2**31)
                continue
            tensor = tensors.get(name)
            if tensor is None or not tensor.numel():
                # A tensor of the right type that no tile touches.
                shape = (argument.rows, argument.pitch) if isinstance(argument, Matrix) else (4,)
                tensor = torch.empty(shape, dtype=argument.dtype)
            if isinstance(argument, Matrix):
                extents, strides = [argument.rows, argument.columns], [argument.pitch, 1]
                values.append(TensorDescriptor(tensor, extents, strides, list(argument.block)))
            else:
                values.append(tensor)
        self.kernel[(self.blocks,)](*values, **self._constants)


@cache
def _never(device: torch.device) -> Tensor:
    """A word that stops nobody."""
    return torch.zeros(1, dtype=torch.int32, device=device)


def choose(x: Tensor, w: Tensor, chunks: tuple[Part, ...], spare_sms: int) -> Config:
    """The configuration to take unmeasured for ``x [rows, K]`` and ``w [N, K]``."""
    sms = 132 if INTERPRETED else torch.cuda.get_device_properties(x.device).multi_processor_count
    return default_config([part.rows for part in chunks], w.shape[0], x.dtype, max(sms - spare_sms, 1))
