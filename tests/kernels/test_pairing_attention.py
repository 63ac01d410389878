"""Pairing attention: reference against torch's own, kernels against fp64, sums in one order."""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from flashtrain.errors import UserError
from flashtrain.kernels.pairing_attention import config, op, reference
from flashtrain.kernels.pairing_attention.config import gradients_section_of, section_of, splits_of
from tests.kernels.interpreter import DEVICE, interpreted

with interpreted():
    from flashtrain.kernels.pairing_attention import triton as kernels

FULL = ((0, 1, 0, 1, 0, 1), (0, 0, 1, 1, 2, 2))  # 2 query heads with 3 KV heads, j-major
LISTED = ((2, 0, 2, 1), (0, 1, 1, 0))
GROUPED = ((0, 1, 2, 3), (0, 0, 1, 1))


def inputs(
    tokens: tuple[int, int], width: int, pairs: tuple[tuple[int, ...], tuple[int, ...]] = FULL, batch: int = 2
) -> list[Tensor]:
    """Query, key and value in fp32, as views of a packed projection ``[S, B, heads, D]``."""
    draw = torch.Generator().manual_seed(tokens[0])
    queries, keys = max(pairs[0]) + 1, max(pairs[1]) + 1
    packed = torch.randn(tokens[0], batch, queries + 1, width, generator=draw, dtype=torch.float64)
    both = torch.randn(2, tokens[1], batch, keys, width, generator=draw, dtype=torch.float64)
    given = [packed[:, :, :queries], *both]
    return [x.permute(1, 2, 0, 3).float().to(DEVICE) for x in given]


def outcome(function: Any, given: list[Tensor], *arguments: Any) -> list[Tensor]:
    """Both outputs, and the gradients that slopes of both make."""
    leaves = [x.detach().requires_grad_() for x in given]
    outputs = function(*leaves, *arguments)
    draw = torch.Generator().manual_seed(1)
    slopes = [
        torch.randn(y.shape, generator=draw, dtype=torch.float64).to(y.dtype).to(DEVICE) for y in outputs
    ]
    return [*(y.detach() for y in outputs), *torch.autograd.grad(outputs, leaves, slopes)]


@pytest.mark.parametrize("causal", [True, False])
def test_reference_is_attention_of_each_pair(causal: bool) -> None:
    query, key, value = (x.double() for x in inputs((5, 5), 8, LISTED))
    out, logsumexp = reference.pairing_attention(query, key, value, *LISTED, causal)
    for pair, (i, j) in enumerate(zip(*LISTED, strict=True)):
        wanted = scaled_dot_product_attention(query[:, i], key[:, j], value[:, j], is_causal=causal)
        torch.testing.assert_close(out[:, pair], wanted)
    assert logsumexp.shape == (2, 4, 5)


@pytest.mark.parametrize(
    ("tokens", "width", "pairs", "causal"),
    [
        ((70, 70), 16, FULL, True),
        ((70, 70), 16, FULL, False),
        ((33, 75), 24, LISTED, True),
        ((64, 40), 8, LISTED, False),
        ((1, 37), 8, FULL, True),
        ((96, 96), 8, ((0,) * 4, (0, 1, 2, 3)), True),
        ((40, 40), 8, ((0, 1, 2, 3), (0,) * 4), True),
    ],
)
def test_kernels_equal_fp64(
    tokens: tuple[int, int], width: int, pairs: Any, causal: bool, poisoned_memory: None
) -> None:
    given = inputs(tokens, width, pairs)
    true = outcome(reference.pairing_attention, [x.double() for x in given], *pairs, causal)
    for found, other in zip(outcome(op.pairing_kernels, given, *pairs, causal), true, strict=True):
        assert found.isfinite().all(), "an element was not written"
        torch.testing.assert_close(found.double(), other, rtol=1e-4, atol=1e-5)


def test_sums_that_are_split_among_blocks_equal_whole_ones(
    monkeypatch: pytest.MonkeyPatch, poisoned_memory: None
) -> None:
    given = inputs((40, 40), 8)
    monkeypatch.setattr(kernels, "splits_of", lambda *_: 1)
    whole = outcome(op.pairing_kernels, given, *FULL, True)
    for splits in (2, 3):
        monkeypatch.setattr(kernels, "splits_of", lambda *_, splits=splits: splits)
        for found, other in zip(outcome(op.pairing_kernels, given, *FULL, True), whole, strict=True):
            torch.testing.assert_close(found, other, rtol=1e-5, atol=1e-6)


def test_sections_change_no_bit(monkeypatch: pytest.MonkeyPatch, poisoned_memory: None) -> None:
    given = inputs((40, 40), 8)
    whole = outcome(op.pairing_kernels, given, *FULL, True)
    monkeypatch.setattr(kernels, "section_of", lambda *_: 1)
    for found, other in zip(outcome(op.pairing_kernels, given, *FULL, True), whole, strict=True):
        assert torch.equal(found, other)


@pytest.mark.parametrize(("pairs", "unit"), [(GROUPED, 1), (FULL, 6)])
def test_sections_of_the_gradients_change_no_bit(
    pairs: tuple[tuple[int, ...], tuple[int, ...]],
    unit: int,
    monkeypatch: pytest.MonkeyPatch,
    poisoned_memory: None,
) -> None:
    """The last one smaller, too. Heads that add to one gradient stay together: else blocks wait for ever."""
    given = inputs((70, 70), 8, pairs, batch=3)
    monkeypatch.setattr(kernels, "splits_of", lambda *_: 2)
    asked = []

    def whole_of(units: int, own: int, *_: int) -> int:
        asked.append((units, own))
        return units * own

    monkeypatch.setattr(kernels, "gradients_section_of", whole_of)
    whole = outcome(op.pairing_kernels, given, *pairs, True)
    assert set(asked) == {(len(set(pairs[1])) * 2 * 3 // unit, unit)}
    for count in (1, 2, 5):
        monkeypatch.setattr(kernels, "gradients_section_of", lambda _, own, *__, count=count: count * own)
        for found, other in zip(outcome(op.pairing_kernels, given, *pairs, True), whole, strict=True):
            assert torch.equal(found, other)


def test_keys_beyond_the_last_weigh_nothing_however_low_the_scores(poisoned_memory: None) -> None:
    query, key, value = inputs((20, 20), 16)
    given = [query.abs() * 30, -key.abs() * 30, value]
    true = outcome(reference.pairing_attention, [x.double() for x in given], *FULL, False)
    assert true[1].max() < -200, "scores that would not overflow"
    for found, other in zip(outcome(op.pairing_kernels, given, *FULL, False), true, strict=True):
        assert found.isfinite().all()
        torch.testing.assert_close(found.double(), other, rtol=1e-3, atol=1e-2)


def test_gradients_that_are_expanded_views_are_taken(poisoned_memory: None) -> None:
    given = [x.requires_grad_() for x in inputs((20, 20), 8)]
    out, _ = op.pairing_kernels(*given, *FULL, True)
    found = torch.autograd.grad(out.sum(), given)
    wanted = torch.autograd.grad(reference.pairing_attention(*given, *FULL, True)[0].sum(), given)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_outputs_lie_as_the_next_projection_reads_them() -> None:
    out, _ = op.pairing_kernels(*inputs((20, 20), 8), *FULL, True)
    assert out.permute(2, 0, 1, 3).is_contiguous()


def test_the_op_passes_opcheck() -> None:
    given = tuple(x.requires_grad_() for x in inputs((8, 8), 8))
    torch.library.opcheck(op.pairing_kernels.traced, (*given, *map(list, FULL), True))


def test_sections_and_splits_divide_the_work() -> None:
    assert section_of(32, 4096, 64, 2) == 16
    assert section_of(32, 1 << 20, 128, 2) == 1
    assert section_of(6, 128, 64, 2) == 6
    assert gradients_section_of(128, 1, 128, 132) == 32
    assert gradients_section_of(37, 1, 128, 132) == 19
    assert gradients_section_of(4, 8, 128, 132) == 32
    assert gradients_section_of(4, 40, 128, 132) == 40
    assert gradients_section_of(64, 1, 64, 132) == 16
    assert splits_of(128, 8, 132) == 2
    assert splits_of(1, 8, 132) == 8
    assert splits_of(1, 5, 132) == 4
    assert splits_of(256, 8, 132) == 1


def test_a_turn_that_is_not_the_blocks_own_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU a block would wait for it for ever; here its addition goes astray."""
    given, maps = inputs((40, 40), 8), kernels.maps_of

    def muddled(*arguments: Any) -> Any:
        found = maps(*arguments)
        visits = found.visits.clone()
        visits[4:10] += 1 << 48  # one visitor too many
        return found._replace(visits=visits)

    wanted = outcome(op.pairing_kernels, given, *FULL, True)
    monkeypatch.setattr(kernels, "maps_of", muddled)
    found = outcome(op.pairing_kernels, given, *FULL, True)
    assert torch.equal(found[3], wanted[3])
    assert not torch.allclose(found[2], wanted[2])


def test_heads_without_a_pair_have_gradients_of_zero(poisoned_memory: None) -> None:
    given = inputs((20, 20), 8)
    _, _, d_query, d_key, d_value = outcome(op.pairing_kernels, given, (0, 0), (2, 0), True)
    for gradient, head in ((d_query, 1), (d_key, 1), (d_value, 1)):
        assert not gradient[:, head].any()
        assert gradient[:, 0].any()


COMPILED = """
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from flashtrain.kernels.pairing_attention.backward import attention_gradient_kernel
from flashtrain.kernels.pairing_attention.config import config_of
from flashtrain.kernels.pairing_attention.forward import attention_kernel
import torch

for kernel, name, width in ((attention_kernel, "forward", 64), (attention_gradient_kernel, "backward", 64),
                            (attention_gradient_kernel, "backward", 128)):
    tiles = getattr(config_of(torch.bfloat16, width), name)
    rows, columns = (tiles.rows, tiles.columns)[:: 1 if name == "forward" else -1]
    given = {"BM": rows, "BN": columns, "D": width, "CAUSAL": True, "PRECISION": "tf32",
             "STAGES": tiles.stages}
    kinds = dict.fromkeys(p.name for p in kernel.params) | dict.fromkeys(given, "constexpr")
    queries, keys = (f"tensordesc<bf16[1,1,{tokens},{width}]>" for tokens in (rows, columns))
    for name in kinds:
        kinds[name] = kinds[name] or {
            "q_desc": queries, "do_desc": queries, "k_desc": keys, "v_desc": keys,
            "dq_desc": f"tensordesc<fp32[{width},{rows}]>",
            "logsumexp": "*fp32", "norms": "*fp32", "means": "*fp32", "out": "*bf16", "d_key": "*bf16",
            "d_value": "*bf16", "query_of": "*i32", "key_of": "*i32", "counters": "*i32", "visits": "*i64",
            "scale": "fp32",
        }.get(name, "i32")
    names = list(kinds)
    aligned = {(names.index(name),): [["tt.divisibility", 16]] for name in names if "*" in kinds[name]}
    source = ASTSource(kernel, kinds, {(names.index(name),): value for name, value in given.items()}, aligned)
    made = compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": tiles.warps})
    text = made.asm["ttgir"]
    print(*(text.count(one) for one in ("tt.dot ", "warp_group_dot ", "tt.trans", "async_tma_reduce add")),
          made.metadata.shared <= 227 << 10)
"""


def test_compiled_for_hopper_every_product_is_of_the_tensor_cores_and_none_is_transposed_in_registers() -> (
    None
):
    """Two loops each, of 2 products forward, 5 backward; what is added to dQ goes through TMA."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    ran = subprocess.run(
        [sys.executable, "-c", COMPILED], env=environment, capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.split("\n")[:3] == ["0 4 0 0 True", "0 10 0 2 True", "0 10 0 2 True"]


PARTITIONED = """
import itertools
import subprocess
from pathlib import Path
import re
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import compile
from triton.experimental.gluon._runtime import GluonASTSource
from flashtrain.kernels.pairing_attention.hopper import attention_gradient_hopper, gl
from flashtrain.kernels.pairing_attention.hopper_forward import attention_hopper

KINDS = {"d_key": "*bf16", "d_value": "*bf16", "counters": "*i32", "counter": "*i32", "visits": "*i64",
         "query_of": "*i32", "key_of": "*i32", "logsumexp": "*fp32", "scale": "fp32"}

def tensor(kind, bits, *block):
    layout = gl.NVMMASharedLayout(128 if len(block) > 1 else 0, bits, len(block))
    return f"tensordesc<{kind}{list(block)},{layout!r}>"

def made(kernel, given, special):
    known = KINDS | special | dict.fromkeys(given, "constexpr")
    kinds = {p.name: known.get(p.name, "i32") for p in kernel.params}
    names = list(kinds)
    even = [(names.index(name),) for name in names if "*" in kinds[name] or name.startswith("out_")]
    constants = {(names.index(name),): value for name, value in given.items()}
    source = GluonASTSource(kernel, kinds, constants, {place: [["tt.divisibility", 16]] for place in even})
    found = compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4})
    text = found.asm["ttgir"]
    print("FOUND", *(text.count(one) for one in ("warp_group_dot ", "async_tma_reduce add")),
          found.metadata.num_warps, found.metadata.shared <= 227 << 10)
    return found

for width, causal in itertools.product((64, 128), (True, False)):
    rows = 8192 // width
    queries, keys = (tensor("bf16", 16, 1, 1, tokens, width) for tokens in (rows, 64))
    made(attention_gradient_hopper, {"BM": rows, "D": width, "CAUSAL": causal}, {
        "q_desc": queries, "do_desc": queries, "k_desc": keys, "v_desc": keys,
        "dq_desc": tensor("fp32", 32, 64, 64), "norm_desc": tensor("fp32", 32, rows),
        "mean_desc": tensor("fp32", 32, rows),
    })
for width, causal in ((64, True), (128, True)):
    queries, keys = (tensor("bf16", 16, 1, 1, tokens, width) for tokens in (64, 128))
    found = made(attention_hopper, {"BN": 128, "D": width, "STAGES": 2, "CAUSAL": causal}, {
        "q_desc": queries, "o_desc": queries, "k_desc": keys, "v_desc": keys,
    })
    folder = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    Path("kernel.cubin").write_bytes(found.asm["cubin"])
    code = subprocess.check_output([folder / "cuobjdump", "-sass", "kernel.cubin"], text=True)
    # From the end of the scores to that of the values of the tile before.
    between = re.findall(r"DEPBAR.LE gsb0, 0x1(.*?)DEPBAR.LE gsb0, 0x0", code, re.DOTALL)
    print("BETWEEN", *(part.count("MUFU.EX2") // 64 for part in between), "LDL" in between[0])
"""


def test_partitions_of_warps_have_the_registers_for_products_that_run_beside_other_work(
    tmp_path: Path,
) -> None:
    """Two consumers: backward of 6 products a step and 2 at the end, forward of 2 in two loops and 2 beside.

    ptxas says which products it lines up. Forward, it must leave the exponentials beside products.
    """
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    # Compiled anew, for ptxas to speak.
    environment |= {"TRITON_DUMP_PTXAS_LOG": "1", "TRITON_CACHE_DIR": str(tmp_path)}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    ran = subprocess.run(
        [sys.executable, "-c", PARTITIONED],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    assert re.findall("FOUND (.*)", ran.stdout) == ["16 2 12 True"] * 4 + ["12 0 12 True"] * 2
    # Two loops, over whole tiles of keys and over others, of two consumers.
    assert re.findall("BETWEEN (.*)", ran.stdout) == ["1 1 1 1 False"] * 2
    assert "serialized" not in ran.stdout
    spilled = [int(found) for found in re.findall(r"(\d+) bytes spill stores", ran.stdout)]
    assert len(spilled) == 6
    assert max(spilled[:4]) < 128


@pytest.mark.parametrize(
    ("capability", "version", "partitioned"),
    [((9, 0), "3.6.0", True), ((9, 0), "3.7.1", False), ((10, 0), "3.6.0", False)],
)
def test_partitions_are_for_hopper_and_the_version_of_gluon_that_they_are_written_in(
    capability: tuple[int, int],
    version: str,
    partitioned: bool,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
    monkeypatch.setattr(config, "version", lambda _: version)
    config._knows_gluon.cache_clear()
    for width in (40, 64, 128):
        assert config.config_of(torch.bfloat16, width).partitioned == partitioned
    assert not config.config_of(torch.bfloat16, 32).partitioned
    assert not config.config_of(torch.float32, 128).partitioned
    told = [record.message for record in caplog.records]
    assert len(told) == (version != "3.6.0")
    assert all("with Triton 3.7.1 as with 3.6.x" in line for line in told)
    config._knows_gluon.cache_clear()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"key": torch.zeros(2, 3, 4, 16)}, "must be"),
        ({"key": torch.zeros(2, 3, 4, 8).double(), "value": torch.zeros(2, 3, 4, 8).double()}, "one dtype"),
        ({"key": torch.zeros(2, 3, 3, 8), "value": torch.zeros(2, 3, 3, 8)}, "need as many keys"),
        ({"query_of": (0, 1)}, "2 query heads and 6 KV heads make no pairs"),
        ({"query_of": (0, 2) * 3}, "query heads 0 to 2; there are 2"),
        ({"key_of": (-1,) * 6}, "KV heads -1 to -1; there are 3"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(change: dict[str, Any], message: str) -> None:
    names = ("query", "key", "value")
    given = dict(zip(names, (torch.zeros(2, n, 4, 8) for n in (2, 3, 3)), strict=True))
    with pytest.raises(UserError) as raised:
        op.pairing_attention(**({**given, "query_of": FULL[0], "key_of": FULL[1]} | change))
    assert message in str(raised.value)
