"""The kernels of embedding, norm, gate and positions, compiled for Hopper at a Llama's sizes."""

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton", reason="triton is not installed")

COMPILED = """
import re
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from flashtrain.kernels import column_sums as sums
from flashtrain.kernels.embedding import triton as embedding
from flashtrain.kernels.rms_norm import triton as norm
from flashtrain.kernels.rotary import triton as rotary
from flashtrain.kernels.swiglu import triton as swiglu

FP32 = {"table", "d_weight", "parts", "epsilon", "partial"}
INTEGERS = {"tokens": "*i64", "order": "*i64", "keys": "*i32", "begins": "*i32", "ends": "*i32"}
STRIDES = {"width", "x_row", "residual_row", "dy_row", "d_total_row", "total_row", "packed_row", "table_kind",
           "table_position", "table_row", *(f"{head}_{of}" for head in ("query", "key", "value")
                               for of in ("batch", "head", "position"))}
NUMBERS = {"rows", "blocks", "pairs", "batch", "first", "vocabulary", "positions", "steps", "begin_2",
           "begin_3"}

def ptx(kernel, warps, registers=None, fp32=FP32, **given):
    names = [p.name for p in kernel.params]
    kinds = {n: "constexpr" if n in given else "i32" if n in STRIDES | NUMBERS else
             "fp32" if n == "epsilon" else INTEGERS.get(n, "*fp32" if n in fp32 else "*bf16") for n in names}
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
ptx(sums.sums_kernel, 4, fp32={"parts", "out"}, out_3=None, ROWS=64, COLUMNS=32)
for kernel in (embedding.keys_kernel, embedding.runs_kernel):
    ptx(kernel, 4, BLOCK=256)
found["embedding forward"] = ptx(embedding.lookup_kernel, 4, fp32=(), COLUMNS=2048)
for add, fp32 in ((True, ("partial", "gradient")), (False, ("partial",))):
    kind = "fp32 sums" if add else "gradient"
    found[f"embedding {kind}"] = ptx(embedding.pieces_kernel, 4, fp32=fp32, ADD=add, PIECE=64, COLUMNS=2048,
                                     STAGES=4)
    found[f"embedding {kind}, end"] = ptx(embedding.finish_kernel, 4, fp32=fp32, ADD=add, PIECE=64,
                                          COLUMNS=512, STAGES=8)
for name, text in found.items():
    narrow = len(re.findall(r"(?:ld|st)\\.global(?!\\S*\\.v4)", text))
    ahead = len(re.findall(r"cp\\.async\\.cg", text))
    print(f"{name}: {narrow} narrow, {'some' if ahead else 'none'} ahead")
"""


def test_accesses_are_16_bytes_wide_and_norms_and_sums_load_rows_ahead() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    ran = subprocess.run(
        [sys.executable, "-c", COMPILED], env=environment, capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stderr
    # A program reads a token, or a key and where its run lies; 512 columns in bf16 are 8 bytes a thread.
    assert sorted(ran.stdout.splitlines()) == [
        "embedding forward: 1 narrow, none ahead",
        "embedding fp32 sums, end: 3 narrow, some ahead",
        "embedding fp32 sums: 3 narrow, some ahead",
        "embedding gradient, end: 4 narrow, some ahead",
        "embedding gradient: 3 narrow, some ahead",
        *(
            f"{kernel} {way}: 0 narrow, {'some' if kernel == 'norm' else 'none'} ahead"
            for kernel in ("norm", "rotary", "swiglu")
            for way in ("backward", "forward")
        ),
    ]
