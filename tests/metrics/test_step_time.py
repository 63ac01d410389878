"""Where a step's time goes: names, and records that overlap."""

import ast
import random
from pathlib import Path

import pytest

import flashtrain
from flashtrain.metrics import step_time
from flashtrain.metrics.step_time import (
    ATTENTION,
    EXPOSED,
    GEMM,
    IDLE,
    KINDS,
    LOSS,
    OPTIMIZER,
    POINTWISE,
    Record,
)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("nvjet_hsh_128x256_64x4_1x2_h_bz_coopA_NTN", GEMM),
        ("void cutlass::Kernel2<cutlass_80_wmma_tensorop_bf16_s161616gemm_bf16>", GEMM),
        ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64", GEMM),
        ("gather_kernel", GEMM),
        ("scatter_kernel", GEMM),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma_f16_knob_7", ATTENTION),
        ("void pytorch_flash::flash_bwd_dq_dk_dv_loop_seqk_parallel_kernel<...>", ATTENTION),
        ("fmha_cutlassF_bf16_aligned_64x128_rf_sm80", ATTENTION),
        ("ncclDevKernel_AllGather_RING_LL(ncclDevKernelArgsStorage<4096ul>)", EXPOSED),
        ("Memcpy PtoP (Device -> Device)", EXPOSED),
        ("void multi_tensor_apply_kernel<..., FusedAdamMathFunctor<float, 4>>", OPTIMIZER),
        ("void at::native::(anonymous namespace)::cunn_SoftMaxForward<LogSoftMaxForwardEpilogue>", LOSS),
        ("void at::native::vectorized_elementwise_kernel<4, silu_kernel>", POINTWISE),
        ("forward_kernel", POINTWISE),
        ("void at::native::vectorized_gather_kernel<16, long>", POINTWISE),
        ("attention_gradient_kernel", ATTENTION),
        ("update_kernel", OPTIMIZER),
        ("Memset (Device)", POINTWISE),
    ],
)
def test_kernels_are_told_apart_by_their_names(name: str, kind: str) -> None:
    assert step_time.kind_of(name) == kind


# What every kernel that a folder of ours launches counts as.
KERNELS = {
    "adamw": OPTIMIZER,
    "causal_conv": POINTWISE,
    "cross_entropy": LOSS,
    "embedding": POINTWISE,
    "gated_norm": POINTWISE,
    "ordered_sum": EXPOSED,
    "overlapped_matmul": GEMM,
    "pairing_attention": ATTENTION,
    "rms_norm": POINTWISE,
    "rotary": POINTWISE,
    "shared_attention": ATTENTION,
    "ssd": POINTWISE,
    "swiglu": POINTWISE,
}


def _launched(folder: Path) -> set[str]:
    """The Triton functions of a folder that no other uses."""
    nodes = [node for file in folder.glob("*.py") for node in ast.walk(ast.parse(file.read_text()))]
    jitted = [
        node
        for node in nodes
        if isinstance(node, ast.FunctionDef)
        and any(
            ast.unparse(one).startswith(("triton.jit", "gluon.jit", "kernel")) for one in node.decorator_list
        )
    ]
    used = {
        one.id for node in jitted for part in node.body for one in ast.walk(part) if isinstance(one, ast.Name)
    }
    return {node.name for node in jitted} - used


def test_every_kernel_of_ours_counts_as_what_its_folder_computes() -> None:
    folders = {path.parent for path in Path(flashtrain.__path__[0], "kernels").glob("*/*.py")}
    launched = {folder.name: names for folder in folders if (names := _launched(folder))}
    found = {(folder, name): step_time.kind_of(name) for folder, names in launched.items() for name in names}
    assert found.pop(("overlapped_matmul", "carry_kernel")) == EXPOSED  # it moves what others compute
    assert found == {(folder, name): KERNELS[folder] for folder, name in found}
    assert {"carry_kernel", "gather_kernel", "scatter_kernel"} == launched["overlapped_matmul"]
    assert launched.keys() == KERNELS.keys()


def test_an_instant_counts_once_and_communication_only_where_nothing_else_runs() -> None:
    records = [
        Record("nvjet", 0, 100),
        Record("Memcpy PtoP", 50, 130),
        Record("forward_kernel", 90, 110),
        Record("nccl", 150, 160),
    ]
    account = step_time.account(records, 0, 200)
    seconds = {kind: round(value * 1e9) for kind, value in account.kinds.items()}
    assert seconds == dict.fromkeys(KINDS, 0) | {GEMM: 100, POINTWISE: 10, EXPOSED: 30, IDLE: 60}
    assert account.moving == pytest.approx(90e-9)
    assert account.hidden == pytest.approx(1 - 30 / 90)


def test_random_records_against_counting_every_instant() -> None:
    dice = random.Random(0)
    names = ["nvjet", "fmha", "nll_loss", "adam", "silu", "nccl"]
    records = []
    for _ in range(60):
        start = dice.randrange(-20, 300)
        records.append(Record(dice.choice(names), start, start + dice.randrange(0, 25)))
    wanted = dict.fromkeys(KINDS, 0)
    for instant in range(250):
        ranks = [KINDS.index(step_time.kind_of(r.name)) for r in records if r.start <= instant < r.end]
        wanted[KINDS[min(ranks, default=len(KINDS) - 1)]] += 1
    account = step_time.account(records, 0, 250)
    assert {kind: round(value * 1e9) for kind, value in account.kinds.items()} == wanted
    assert account.seconds == pytest.approx(sum(account.kinds.values()))


def test_without_records_all_is_idle() -> None:
    account = step_time.account([], 5, 25)
    assert account.kinds[IDLE] == pytest.approx(20e-9)
    assert account.hidden is None


def test_operators_of_the_cpu() -> None:
    own = {
        "aten::mm": 1.0,
        "aten::silu": 0.5,
        "flashtrain::all_gather_matmul": 0.25,
        "aten::_fused_adamw_": 0.25,
    }
    kinds = step_time.account_of_operators(own, 3.0)
    assert kinds[GEMM] == 1.0
    assert kinds[EXPOSED] == kinds[OPTIMIZER] == 0.25
    assert kinds[IDLE] == pytest.approx(1.0)
