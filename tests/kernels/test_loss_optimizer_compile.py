"""The kernels of loss and optimizer, compiled for Hopper at a Llama's sizes, which needs no GPU."""

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton", reason="triton is not installed")

COMPILED = """
import re
from triton import language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from flashtrain.kernels.adamw import triton as adamw
from flashtrain.kernels.cross_entropy import triton as loss

POINTERS = {"logits": "*bf16", "targets": "*i64", "blocks": "*i32", "tensors": "*i64", "gradients": "*i64",
            "sizes": "*i64", "accepted": "*i1", "partial": "*fp64"}
POINTERS |= dict.fromkeys(("numbers", "everyone", "share", "losses", "factor"), "*fp32")
SCALARS = {"step_size", "correction", "keep", "one_less_beta1", "beta2", "one_less_beta2", "epsilon"}

def ptx(kernel, **given):
    names = [p.name for p in kernel.params]
    others = {n: "fp32" if n in SCALARS else "i32" for n in names}
    kinds = {n: "constexpr" if n in given else POINTERS.get(n, others[n]) for n in names}
    even = {(names.index(n),): [["tt.divisibility", 16]] for n in names
            if kinds[n].startswith("*") or n in ("width", "stride")}
    source = ASTSource(kernel, kinds, {(names.index(n),): value for n, value in given.items()}, even)
    return compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 8}).asm["ptx"]

found = {
    "statistics": ptx(loss.statistics_kernel, LOWEST=loss._LOWEST, BLOCK=loss._READ),
    "slopes": ptx(loss.slopes_kernel, RANKS=4, IGNORE=-100, BLOCK=loss._WRITTEN),
    "squares": ptx(adamw.squares_kernel, GRADIENT=tl.float32, ALIGNED=True, BLOCK=adamw.BLOCK),
    "squares bf16": ptx(adamw.squares_kernel, GRADIENT=tl.bfloat16, ALIGNED=True, BLOCK=adamw.BLOCK),
    "update": ptx(adamw.update_kernel, DTYPE=tl.bfloat16, GRADIENT=tl.float32, WRITES=True, ALIGNED=True,
                  BLOCK=adamw.BLOCK, PART=adamw._PART),
}
for name, text in found.items():
    print(name, *(len(re.findall(rf"{way}\\.global\\S*\\.v4", text)) for way in ("ld", "st")))
"""


def test_whole_blocks_are_read_and_written_16_bytes_at_a_time() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    ran = subprocess.run(
        [sys.executable, "-c", COMPILED], env=environment, capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stderr
    # 16 elements a thread, of the update 4 at once: 4 fp32 tensors read, 3 written, of bf16 weights 8 bytes.
    found = ["slopes 2 2", "squares 4 0", "squares bf16 2 0", "statistics 8 0", "update 4 3"]
    assert sorted(ran.stdout.splitlines()) == found
