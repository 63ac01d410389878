"""Compile a Triton kernel once and launch it again and again for a few microseconds of host time.

A call of a JIT function binds, specialises and hashes every argument, and encodes every tensor descriptor
anew: tens of microseconds. Here the kernel is compiled ahead for a fixed signature; a launch, in C++
(``csrc/kernel``), writes a few addresses into a parameter block that is kept, and calls the driver. The
layout of the block is checked against the compiled kernel's own, so that another Triton version fails at
once and by name.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

INTERPRETED: bool = triton.knobs.runtime.interpret

DRIVER = "libcuda.so.1"

_NAMES = {
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float32: "fp32",
    torch.int32: "i32",
    torch.int64: "i64",
}
_TENSOR_MAP_TYPES = {torch.float16: 6, torch.float32: 7, torch.bfloat16: 9}  # CUtensorMapDataType


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


def launch(
    kernel: Any,
    arguments: Mapping[str, Argument],
    constants: Mapping[str, Any],
    *,
    warps: int,
    stages: int,
    device: torch.device,
) -> tuple[Any, int]:
    """The compiled kernel with a parameter block of its own, and how many blocks a multiprocessor holds.

    ``arguments`` in the kernel's order: matrices, pointers and integers. The first result is a
    ``flashtrain._core.Launch``, whose ``start(blocks, stream, values)`` takes one value each: an address for
    a matrix or pointer, or an integer, which wraps to 32 bits. Threads may share it. Raises RuntimeError
    where this version of Triton lays parameters out in another way, ImportError without the C++ extension.
    """
    core = import_module("flashtrain._core")
    forms = tuple((name, argument and Form.of(argument)) for name, argument in arguments.items())
    loaded, descriptors, residents = _load(kernel, forms, tuple(constants.items()), warps, stages, device)
    parameters, described = [], iter(descriptors)
    for name, argument in arguments.items():
        if isinstance(argument, Matrix):
            meta = next(described)
            parameters.append(
                core.Parameter.matrix(
                    name=name,
                    rows=argument.rows,
                    columns=argument.columns,
                    pitch=argument.pitch,
                    element_bytes=argument.dtype.itemsize,
                    type=_TENSOR_MAP_TYPES[argument.dtype],
                    swizzle=meta["swizzle"],
                    box=list(reversed(meta["block_size"])),
                )
            )
        elif isinstance(argument, Pointer):
            parameters.append(core.Parameter.pointer(name=name, aligned=argument.aligned))
        else:
            parameters.append(core.Parameter.number(name))
    return core.Launch(loaded, parameters), residents


@lru_cache(maxsize=512)
def _load(
    kernel: Any,
    forms: tuple[tuple[str, "Form | None"], ...],
    constants: tuple[tuple[str, Any], ...],
    warps: int,
    stages: int,
    device: torch.device,
) -> tuple[Any, Any, int]:
    """The loaded kernel, its descriptors, blocks a multiprocessor; for all shapes, as none is compiled in."""
    major, minor = torch.cuda.get_device_capability(device)
    compiled = compile_kernel(kernel, dict(forms), dict(constants), warps, stages, major * 10 + minor)
    metadata = compiled.metadata
    if metadata.global_scratch_size:
        raise RuntimeError(f"kernel {metadata.name} wants global scratch memory")
    with torch.cuda.device(device):
        torch.cuda.current_stream().synchronize()  # makes the context exist and current
        loaded = import_module("flashtrain._core").Kernel(
            DRIVER, compiled.asm["cubin"], metadata.name, metadata.shared, 32 * warps
        )
        return loaded, metadata.tensordesc_meta, loaded.blocks_per_multiprocessor()
