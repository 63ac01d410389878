"""Attention's backends on a GPU: against fp64, gradients too; bits of the deterministic ones."""

import pytest
import torch
from torch import Tensor

from flashtrain.nn import attend as attention
from flashtrain.nn.attend import Documents, Heads

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
SHAPES = [(1, 8, 2, 1024, 128), (2, 4, 4, 517, 64), (3, 6, 2, 300, 128)]


def make(shape: tuple[int, ...], dtype: torch.dtype = torch.bfloat16) -> tuple[Heads, Tensor]:
    """Heads as a projection of [S, B, hidden] lays them out, and a gradient from above."""
    batch, query_heads, kv_heads, sequence, width = shape
    torch.manual_seed(0)

    def one(count: int) -> Tensor:
        made = torch.randn(sequence, batch, count, width, device="cuda", dtype=dtype)
        return made.permute(1, 2, 0, 3).requires_grad_()

    return Heads(one(query_heads), one(kv_heads), one(kv_heads)), one(query_heads).detach()


def documents_of(shape: tuple[int, ...]) -> Documents:
    """Ragged documents, some of a single token."""
    batch, sequence = shape[0], shape[3]
    cuts = sorted({row * sequence + c for row in range(batch) for c in (0, 1, 130, sequence - 1)})
    bounds = torch.tensor([*cuts, batch * sequence], dtype=torch.int32)
    return Documents(bounds.cuda(), int(bounds.diff().max()))


def wanted(heads: Heads, upstream: Tensor, documents: Documents | None) -> list[Tensor]:
    """Output and gradients in fp64 on the CPU."""
    exact = Heads(*(part.detach().double().cpu().requires_grad_() for part in heads))
    on_cpu = None if documents is None else Documents(documents.bounds.cpu(), documents.longest)
    out = attention.attend(exact, on_cpu)
    return [out.detach(), *torch.autograd.grad(out, exact, upstream.double().cpu())]


def got(name: str, heads: Heads, upstream: Tensor, documents: Documents | None, fixed: bool) -> list[Tensor]:
    out = attention.run(name, heads, documents, fixed)
    return [out.detach(), *torch.autograd.grad(out, heads, upstream)]


def cases() -> list[tuple[str, bool, bool, torch.dtype]]:
    half, single = torch.bfloat16, torch.float32
    return [
        ("cudnn", False, False, half),
        ("cudnn", False, True, half),
        ("cudnn", False, True, torch.float16),
        ("flash", False, False, half),
        ("flash", False, True, half),
        ("flash", True, True, half),
        ("fa", False, False, half),
        ("fa", False, True, half),
        ("fa", True, True, half),
        ("triton", False, True, half),
        ("efficient", False, True, half),
        ("efficient", False, True, single),
        ("math", False, True, single),
        ("math", True, True, single),
    ]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("name", "with_documents", "fixed", "dtype"), cases())
def test_values_and_gradients_against_fp64(
    name: str, with_documents: bool, fixed: bool, dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    heads, upstream = make(shape, dtype)
    reason = attention.why_not(name, heads, with_documents, fixed)
    if reason is not None:
        pytest.skip(reason)
    documents = documents_of(shape) if with_documents else None
    found = got(name, heads, upstream, documents, fixed)
    bound = {torch.bfloat16: 2e-2, torch.float16: 3e-3}.get(dtype, 1e-5)
    for label, mine, exact in zip("oqkv", found, wanted(heads, upstream, documents), strict=True):
        error = (mine.double().cpu() - exact).norm() / exact.norm()
        assert error < bound, f"{label}: relative error {error:.2e}"


@pytest.mark.parametrize("first", [1, 128, 200])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    ("name", "fixed", "dtype"),
    [
        ("flash", True, torch.bfloat16),
        ("flash", False, torch.bfloat16),
        ("fa", True, torch.bfloat16),
        ("triton", True, torch.bfloat16),
        ("math", True, torch.float32),
    ],
)
def test_queries_of_the_last_tokens_against_fp64(
    name: str, fixed: bool, dtype: torch.dtype, shape: tuple[int, ...], first: int
) -> None:
    """As ranks have them that hold a later segment of a sequence; twice, for the bits."""
    whole, upstream = make(shape, dtype)
    query = whole.query[:, :, first:].detach().requires_grad_()
    heads, upstream = whole._replace(query=query), upstream[:, :, first:]
    reason = attention.why_not(name, heads, False, fixed)
    if reason is not None:
        pytest.skip(reason)
    found = got(name, heads, upstream, None, fixed)
    again = got(name, heads, upstream, None, fixed)
    bound = 2e-2 if dtype == torch.bfloat16 else 1e-5
    for label, mine, twice, exact in zip("oqkv", found, again, wanted(heads, upstream, None), strict=True):
        error = (mine.double().cpu() - exact).norm() / exact.norm()
        assert error < bound, f"{label}: relative error {error:.2e}"
        assert not fixed or torch.equal(mine, twice), label


@pytest.mark.parametrize(
    ("name", "with_documents"),
    [*((name, False) for name in ("cudnn", "flash", "fa", "triton", "efficient")), ("flash", True)],
)
def test_a_deterministic_backward_repeats_its_bits(name: str, with_documents: bool) -> None:
    shape = (2, 8, 2, 4096, 128)
    heads, upstream = make(shape)
    reason = attention.why_not(name, heads, with_documents, True)
    if reason is not None:
        pytest.skip(reason)
    documents = documents_of(shape) if with_documents else None
    first = got(name, heads, upstream, documents, True)
    for _ in range(20):
        for mine, before in zip(got(name, heads, upstream, documents, True), first, strict=True):
            assert torch.equal(mine, before)


@pytest.mark.parametrize("name", ["cudnn", "flash", "triton"])
def test_kv_heads_are_not_copied_for_each_query_head(name: str) -> None:
    shape = (1, 32, 1, 4096, 128)
    heads, _ = make(shape)
    with torch.no_grad():
        attention.run(name, heads, None, False)  # warm: plans and workspaces
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        out = attention.run(name, heads, None, False)
    expanded = 32 * heads.key.numel() * heads.key.element_size()
    assert torch.cuda.max_memory_allocated() - before < out.numel() * out.element_size() + expanded
