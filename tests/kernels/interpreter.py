"""Imports Triton kernels so that they run on the CPU where there is no GPU.

The interpreter is chosen when a kernel is defined, so this must be imported before the kernels.
"""

import os
from types import SimpleNamespace
from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton", reason="triton is not installed")

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda", 0) if ON_GPU else torch.device("cpu")


def _mend_indices() -> None:
    """NumPy 2.4 refuses ``int()`` of arrays of one element, which is what Triton 3.6 has for scalars."""
    from triton.runtime import interpreter

    original = interpreter._patch_lang_tensor

    def patched(tensor: Any, scope: Any) -> None:
        original(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patched


def load() -> SimpleNamespace:
    """The modules of ``overlapped_matmul``: kernels under the interpreter where there is no GPU."""
    before = os.environ.get("TRITON_INTERPRET")
    if not ON_GPU:
        os.environ["TRITON_INTERPRET"] = "1"
        _mend_indices()
    try:
        from flashtrain.kernels.overlapped_matmul import config, launch, plan, reference
        from flashtrain.kernels.overlapped_matmul import triton as kernels
    finally:
        if before is None:
            os.environ.pop("TRITON_INTERPRET", None)
        else:
            os.environ["TRITON_INTERPRET"] = before
    return SimpleNamespace(config=config, launch=launch, plan=plan, reference=reference, kernels=kernels)
