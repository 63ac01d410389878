"""Triton kernels that are launched without Triton's binder once a variant of them has been compiled.

Triton binds, specialises and hashes all arguments of each call in Python, 40 microseconds of host time.
``kernel`` takes the place of ``triton.jit`` for kernels that are launched: the first call of its kind goes
Triton's own way and compiles, later ones find what it compiled, in C++ (``csrc/launcher``), and hand it the
same parameters.
"""

from collections.abc import Callable
from functools import cached_property, partial
from importlib import import_module
from typing import Any

import torch
import triton
from triton.runtime.jit import JITFunction

from flashtrain.kernels.launch import DRIVER

TENSORS = (torch.Tensor, torch.nn.Parameter)
_BYTES = {"constexpr": 0, "i32": 4, "fp32": 4, "i64": 8, "u64": 8}  # of a parameter; pointers have 8


def kernel(function: Callable[..., Any]) -> Any:
    """Decorator: ``function`` as a JIT kernel, called as ``kernel[grid](*arguments, **constants)``.

    Constants and options of the launch go by name, all other arguments by position. In the interpreter it is
    ``triton.jit``. Hooks on launches are not called, and knobs are read when a variant is compiled.
    """
    return triton.jit(function) if triton.knobs.runtime.interpret else Kernel(function)


class Kernel(JITFunction[Any]):
    """A JIT function that keeps how to launch what it has compiled."""

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return partial(self._launch, grid)

    @cached_property
    def _launch(self) -> Any:
        # Without the extension or a driver it is for Triton to launch, or to say that it cannot.
        try:
            core = import_module("flashtrain._core")
            device, stream = torch._C._cuda_getDevice, torch._C._cuda_getCurrentRawStream
            # Of two threads that come here at once each has a launcher that knows its own variants.
            launcher: Any = core.Launcher(
                DRIVER,
                lambda *given, **named: self._compile(launcher, *given, **named),
                device,
                stream,
                TENSORS,
            )
        except (ImportError, AttributeError, RuntimeError):
            return self._through_triton
        return launcher.launch

    def _through_triton(self, grid: tuple[int, ...], /, *arguments: Any, **constants: Any) -> Any:
        return self.run(*arguments, grid=grid, warmup=False, **constants)

    def _compile(self, launcher: Any, grid: tuple[int, ...], /, *arguments: Any, **constants: Any) -> Any:
        compiled = self._through_triton(grid, *arguments, **constants)
        sizes = self._sizes(compiled, len(arguments))
        if sizes is not None:
            meta = compiled.metadata
            found = (compiled.function, meta.name, meta.shared, 32 * meta.num_warps)
            launcher.add(*found, sizes, compiled, arguments, constants)
        return compiled

    def _sizes(self, compiled: Any, count: int) -> list[int] | None:
        """Bytes of the first ``count`` parameters, 0 if compiled in; None: Triton has to launch it."""
        meta = compiled.metadata
        if meta.num_ctas != 1 or meta.launch_cooperative_grid or meta.launch_pdl:
            return None
        if meta.global_scratch_size or meta.profile_scratch_size:
            return None
        given, named = self.params[:count], self.params[count:]
        if any(p.is_constexpr or p.annotation or p.do_not_specialize for p in given):
            return None
        if any(p.do_not_specialize_on_alignment for p in given) or not all(p.is_constexpr for p in named):
            return None
        types = [compiled.src.signature[parameter.name] for parameter in given]
        sizes = [8 if kind.startswith("*") else _BYTES.get(kind) for kind in types]
        return None if None in sizes else sizes  # type: ignore[return-value]
