"""Imports Triton kernels so that they run on the CPU where there is no GPU.

The interpreter is chosen when a kernel is defined, so this must be imported before the kernels.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib import import_module
from types import SimpleNamespace
from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton", reason="triton is not installed")

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda", 0) if ON_GPU else torch.device("cpu")


@cache
def _mend_indices() -> None:
    """NumPy 2.4 refuses ``int()`` of arrays of one element, which is what Triton 3.6 has for scalars."""
    from triton.runtime import interpreter

    original = interpreter._patch_lang_tensor

    def patched(tensor: Any, scope: Any) -> None:
        original(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patched


@cache
def _mend_library() -> None:
    """Triton's own functions, such as ``tl.sum``, were defined for a compiler if Triton came in before."""
    from triton import language
    from triton.runtime.interpreter import InterpretedFunction
    from triton.runtime.jit import JITFunction

    import_module("triton.experimental.gluon")  # comes in at the first launch, and wants the compiled ones
    mended = {
        name: InterpretedFunction(value.fn)
        for name, value in vars(language.standard).items()
        if isinstance(value, JITFunction)
    }
    for name, function in mended.items():
        for module in (language, language.standard):
            if hasattr(module, name):
                setattr(module, name, function)


@contextmanager
def interpreted() -> Iterator[None]:
    """Kernels that are imported inside run in the interpreter where there is no GPU."""
    before = os.environ.get("TRITON_INTERPRET")
    if not ON_GPU:
        os.environ["TRITON_INTERPRET"] = "1"
        _mend_indices()
        _mend_library()
    try:
        yield
    finally:
        if before is None:
            os.environ.pop("TRITON_INTERPRET", None)
        else:
            os.environ["TRITON_INTERPRET"] = before


def load() -> SimpleNamespace:
    """The modules of ``overlapped_matmul``, and carriers: in the interpreter where there is no GPU."""
    with interpreted():
        from flashtrain.comm import carried
        from flashtrain.kernels import launch
        from flashtrain.kernels.overlapped_matmul import carry, config, plan, prepared, reference
        from flashtrain.kernels.overlapped_matmul import triton as kernels
    return SimpleNamespace(
        carried=carried,
        carry=carry,
        config=config,
        launch=launch,
        plan=plan,
        prepared=prepared,
        reference=reference,
        kernels=kernels,
    )
