"""The kernels of norm, gate and positions, compiled for Hopper at a Llama's sizes, which needs no GPU."""

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton", reason="triton is not installed")

COMPILED = """
import re
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from flashtrain.kernels.rms_norm import triton as norm
from flashtrain.kernels.rotary import triton as rotary
from flashtrain.kernels.swiglu import triton as swiglu

FP32 = {"table", "d_weight", "parts", "epsilon"}
STRIDES = {"width", "x_row", "residual_row", "dy_row", "d_total_row", "total_row", "packed_row", "table_kind",
           "table_position", *(f"{head}_{of}" for head in ("query", "key", "value")
                               for of in ("batch", "head", "position"))}
NUMBERS = {"rows", "blocks", "pairs", "batch"}

def ptx(kernel, warps, registers=None, **given):
    names = [p.name for p in kernel.params]
    kinds = {n: "constexpr" if n in given else "i32" if n in STRIDES | NUMBERS else
             "fp32" if n == "epsilon" else "*fp32" if n in FP32 else "*bf16" for n in names}
    even = {(names.index(n),): [["tt.divisibility", 16]] for n in names
            if n in STRIDES or kinds[n].startswith("*")}
    source = ASTSource(kernel, kinds, {(names.index(n),): value for n, value in given.items()}, even)
    options = {"num_warps": warps, "maxnreg": registers}
    return compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["ptx"]

found = {}
for way in ("forward", "backward"):
    launch = getattr(norm, f"{way}_launch")(4096, 2, True)
    found[f"norm {way}"] = ptx(getattr(norm, f"{way}_kernel"), launch.warps, launch.registers,
                               ADD=True, STAGES=launch.stages, BLOCK=4096)
    found[f"swiglu {way}"] = ptx(getattr(swiglu, f"{way}_kernel"), 4, PAIRS=32, PACKING=64)
    found[f"rotary {way}"] = ptx(getattr(rotary, f"{way}_kernel"), 4, UNITS=8, QUERIES=4, KEYS=1, VALUES=1,
                                 **rotary._tile(48, 64, 1024))
ptx(norm.finish_kernel, 4, ROWS=64, COLUMNS=32)
for name, text in found.items():
    narrow = len(re.findall(r"(?:ld|st)\\.global(?!\\S*\\.v4)", text))
    ahead = len(re.findall(r"cp\\.async\\.cg", text))
    print(f"{name}: {narrow} narrow, {'some' if ahead else 'none'} ahead")
"""


def test_all_accesses_are_16_bytes_wide_and_the_norms_load_rows_ahead() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    ran = subprocess.run(
        [sys.executable, "-c", COMPILED], env=environment, capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stderr
    assert sorted(ran.stdout.splitlines()) == [
        f"{kernel} {way}: 0 narrow, {'some' if kernel == 'norm' else 'none'} ahead"
        for kernel in ("norm", "rotary", "swiglu")
        for way in ("backward", "forward")
    ]
