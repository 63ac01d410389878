"""Compile a Triton kernel once and launch it again and again for a few microseconds of host time.

A call of a JIT function binds, specialises and hashes every argument, and encodes every tensor descriptor
anew: tens of microseconds. Here the kernel is compiled ahead for a fixed signature; a launch writes a few
addresses into a parameter block that is kept, and calls the driver. The layout of the block is checked
against the compiled kernel's own, so that another Triton version fails at once and by name.
"""

import ctypes
import struct
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from operator import itemgetter
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

INTERPRETED: bool = triton.knobs.runtime.interpret

_NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.int32: "i32"}
_TENSOR_MAP_BYTES = 128
_INVALID_CONTEXT = 201  # CUDA_ERROR_INVALID_CONTEXT
_MAX_DYNAMIC_SHARED_SIZE = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES


@dataclass(frozen=True)
class Matrix:
    """A TMA operand: ``rows`` x ``columns``, row-major with ``pitch`` elements a row, read in ``block``s."""

    rows: int
    columns: int
    pitch: int
    dtype: torch.dtype
    block: tuple[int, int]

    @property
    def signature(self) -> str:
        return f"tensordesc<{_NAMES[self.dtype]}[{self.block[0]},{self.block[1]}]>"


@dataclass(frozen=True)
class Pointer:
    """A pointer argument; ``aligned`` promises a multiple of 16 bytes, which lets loads be wide."""

    dtype: torch.dtype
    aligned: bool = False

    @property
    def signature(self) -> str:
        return f"*{_NAMES[self.dtype]}"


Argument = Matrix | Pointer | None  # None: a 32-bit integer


@dataclass(frozen=True)
class Form:
    """What of an argument is compiled in; None for an integer."""

    signature: str
    aligned: bool

    @staticmethod
    def of(argument: Matrix | Pointer) -> "Form":
        return Form(argument.signature, isinstance(argument, Pointer) and argument.aligned)


def compile_kernel(
    kernel: Any,
    arguments: "Mapping[str, Argument] | Mapping[str, Form | None]",
    constants: Mapping[str, Any],
    warps: int,
    stages: int,
    arch: int,
) -> Any:
    """Triton's compiled kernel for compute capability ``arch`` (90 for 9.0); needs no GPU."""
    names = kernel.arg_names
    signature = dict.fromkeys(names, "constexpr")
    attributes: dict[tuple[int, ...], list[list[Any]]] = {}
    for name, argument in arguments.items():
        signature[name] = "i32" if argument is None else argument.signature
        if isinstance(argument, Pointer | Form) and argument.aligned:
            attributes[(names.index(name),)] = [["tt.divisibility", 16]]
    constexprs = {(names.index(name),): value for name, value in constants.items()}
    return triton.compile(
        ASTSource(kernel, signature, constexprs, attributes),
        target=GPUTarget("cuda", arch, 32),
        options={"num_warps": warps, "num_stages": stages},
    )


class Launch:
    """One compiled kernel with its parameter block, for one device.

    ``arguments`` in the kernel's order: matrices, pointers and integers. ``start`` takes one value each: an
    address for a matrix or pointer, or an integer, which wraps to 32 bits. Threads may share it.
    """

    def __init__(
        self,
        kernel: Any,
        arguments: Mapping[str, Argument],
        constants: Mapping[str, Any],
        *,
        warps: int,
        stages: int,
        device: torch.device,
    ) -> None:
        self._driver, self._lock, self._device = _driver(), threading.Lock(), device
        forms = tuple((name, argument and Form.of(argument)) for name, argument in arguments.items())
        self.function, metadata = _load(kernel, forms, tuple(constants.items()), warps, stages, device)
        self.shared, self.threads = metadata.shared, 32 * warps
        self._set_up(list(arguments.values()), metadata)

    def _set_up(self, arguments: Sequence[Argument], metadata: Any) -> None:
        """Lay out the parameter block: a descriptor is a tensor map, then its shape and strides."""
        sizes: list[int] = []
        for argument in arguments:
            sizes += (
                [_TENSOR_MAP_BYTES, 4, 4, 8, 8]
                if isinstance(argument, Matrix)
                else [4 if argument is None else 8]
            )
        sizes += [8, 8]  # scratch memory, which these kernels do not use
        if metadata.global_scratch_size:
            raise RuntimeError(f"kernel {metadata.name} wants global scratch memory")
        self._check_layout(sizes)
        matrices = [index for index, argument in enumerate(arguments) if isinstance(argument, Matrix)]
        words = [index for index, argument in enumerate(arguments) if not isinstance(argument, Matrix)]
        # 128 bytes a tensor map, then 8 bytes a pointer, integer, extent or stride.
        self._memory = ctypes.create_string_buffer(
            128 + 128 * len(matrices) + 8 * (len(words) + 4 * len(matrices) + 2)
        )
        base = -(-ctypes.addressof(self._memory) // 128) * 128
        self._words_at = base + 128 * len(matrices) - ctypes.addressof(self._memory)
        word, constant = base + 128 * len(matrices), base + 128 * len(matrices) + 8 * len(words)
        places: list[int] = []
        self._matrices: list[tuple[int, Matrix, Mapping[str, Any]]] = []
        for argument in arguments:
            if isinstance(argument, Matrix):
                place = base + 128 * len(self._matrices)
                meta = metadata.tensordesc_meta[len(self._matrices)]
                self._matrices.append((place, argument, meta))
                places.append(place)
                for value in (argument.rows, argument.columns, argument.pitch, 1):
                    ctypes.c_int64.from_address(constant).value = value
                    places.append(constant)
                    constant += 8
            else:
                places.append(word)
                word += 8
        places += [constant, constant + 8]
        self._parameters = (ctypes.c_void_p * len(sizes))(*places)
        self._pack, self._word_values = struct.Struct(f"={len(words)}Q").pack_into, itemgetter(*words)
        self._matrix_values = itemgetter(*matrices)
        self._bound: tuple[int, ...] = ()
        self._streams: dict[int, ctypes.c_void_p] = {}

    def _check_layout(self, sizes: Sequence[int]) -> None:
        found: list[int] = []
        for index in range(len(sizes)):
            offset, size = ctypes.c_size_t(), ctypes.c_size_t()
            status = self._driver.cuFuncGetParamInfo(
                self.function, ctypes.c_size_t(index), ctypes.byref(offset), ctypes.byref(size)
            )
            found.append(-1 if status else size.value)
        if found != list(sizes):
            raise RuntimeError(
                f"triton {triton.__version__} passes parameters of {found} bytes where {list(sizes)} were "
                "expected; use a version that flashtrain was tested with (3.6)"
            )

    def start(self, blocks: int, stream: int, values: Sequence[int]) -> None:
        """Enqueue ``blocks`` blocks on ``stream`` (a raw handle) of the current device.

        ``values``: an address a matrix or pointer, and integers from 0 to 2**32 - 1, in the kernel's order.
        """
        handle = self._streams.get(stream)
        if handle is None:
            handle = self._streams[stream] = ctypes.c_void_p(stream)
        with self._lock:
            status = self._enqueue(blocks, handle, values)
            if status == _INVALID_CONTEXT:
                # A thread that has not used CUDA before has no current context.
                torch.cuda.set_device(self._device)
                status = self._enqueue(blocks, handle, values)
        if status:
            _check(status)

    def _enqueue(self, blocks: int, stream: ctypes.c_void_p, values: Sequence[int]) -> int:
        addresses = self._matrix_values(values)
        if addresses != self._bound:
            status = self._bind(addresses)
            if status:
                return status
        self._pack(self._memory, self._words_at, *self._word_values(values))
        return self._driver.cuLaunchKernel(
            self.function, blocks, 1, 1, self.threads, 1, 1, self.shared, stream, self._parameters, None
        )

    def _bind(self, addresses: tuple[int, ...]) -> int:
        """Point the tensor maps at ``addresses``; the driver's status."""
        bound, self._bound = self._bound, ()
        for number, (place, matrix, meta) in enumerate(self._matrices):
            address, status = addresses[number], 0
            if not bound:
                status = self._encode(place, address, matrix, meta)
            elif bound[number] != address:
                status = self._driver.cuTensorMapReplaceAddress(place, address)
            if status:
                return status
        self._bound = addresses
        return 0

    def _encode(self, place: int, address: int, matrix: Matrix, meta: Mapping[str, Any]) -> int:
        dimensions = (ctypes.c_uint64 * 2)(matrix.columns, matrix.rows)
        pitch = (ctypes.c_uint64 * 1)(matrix.pitch * matrix.dtype.itemsize)
        box = (ctypes.c_uint32 * 2)(*reversed(meta["block_size"]))
        ones = (ctypes.c_uint32 * 2)(1, 1)
        kind, swizzle = _TENSOR_MAP_TYPES[matrix.dtype], meta["swizzle"]
        return self._driver.cuTensorMapEncodeTiled(
            place, kind, 2, address, dimensions, pitch, box, ones, 0, swizzle, _L2_PROMOTION_128B, 0
        )

    def blocks_per_sm(self) -> int:
        """How many blocks of this kernel a multiprocessor holds at once."""
        blocks = ctypes.c_int()
        _check(
            self._driver.cuOccupancyMaxActiveBlocksPerMultiprocessor(
                ctypes.byref(blocks), self.function, self.threads, ctypes.c_size_t(self.shared)
            )
        )
        return blocks.value


@lru_cache(maxsize=512)
def _load(
    kernel: Any,
    forms: tuple[tuple[str, "Form | None"], ...],
    constants: tuple[tuple[str, Any], ...],
    warps: int,
    stages: int,
    device: torch.device,
) -> tuple[ctypes.c_void_p, Any]:
    """The loaded function and its metadata: shared by all shapes, since none is compiled in."""
    major, minor = torch.cuda.get_device_capability(device)
    compiled = compile_kernel(kernel, dict(forms), dict(constants), warps, stages, major * 10 + minor)
    driver, module, function = _driver(), ctypes.c_void_p(), ctypes.c_void_p()
    shared = compiled.metadata.shared
    with torch.cuda.device(device):
        torch.cuda.current_stream().synchronize()  # makes the context exist and current
        _check(driver.cuModuleLoadData(ctypes.byref(module), compiled.asm["cubin"]))
        _check(driver.cuModuleGetFunction(ctypes.byref(function), module, compiled.metadata.name.encode()))
        if shared > 48 << 10:
            _check(driver.cuFuncSetAttribute(function, _MAX_DYNAMIC_SHARED_SIZE, shared))
    return function, compiled.metadata


def _check(status: int) -> None:
    if status:
        text = ctypes.c_char_p()
        _driver().cuGetErrorString(status, ctypes.byref(text))
        raise RuntimeError(f"CUDA driver: {(text.value or b'unknown error').decode()} ({status})")


_TENSOR_MAP_TYPES = {torch.float16: 6, torch.float32: 7, torch.bfloat16: 9}  # CUtensorMapDataType
_L2_PROMOTION_128B = 2


@cache
def _driver() -> ctypes.CDLL:
    # CDLL lets go of the interpreter lock: a launch blocks while the queue is full, and what would empty it
    # may be another thread that has copies or flags to enqueue.
    driver = ctypes.CDLL("libcuda.so.1")
    # cuLaunchKernel gets no types: its arguments are ready as they are, and checking them takes time.
    pointer, number = ctypes.c_void_p, ctypes.c_uint
    driver.cuTensorMapReplaceAddress.argtypes = [pointer, pointer]
    driver.cuTensorMapEncodeTiled.argtypes = [
        pointer, ctypes.c_int, number, pointer, pointer, pointer, pointer, pointer, *[ctypes.c_int] * 4
    ]  # fmt: skip
    return driver
