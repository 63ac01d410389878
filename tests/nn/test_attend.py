"""Attention: backends and what they take, documents that do not see each other."""

from collections.abc import Iterator
from itertools import pairwise

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from flashtrain.errors import UserError
from flashtrain.models.decoder import Decoder
from flashtrain.nn import attend as attention
from flashtrain.nn import attention_kernels as kernels
from flashtrain.nn.attend import Documents, Heads, Settings, attend

BOUNDARY = 0


@pytest.fixture(autouse=True)
def _settings_stay() -> Iterator[None]:
    before = attention.settings()
    yield
    attention.configure(before)


def heads(batch: int, sequence: int, group: int = 2, **kind: object) -> Heads:
    torch.manual_seed(0)
    kind = {"dtype": torch.float64, **kind}
    sizes = [(batch, 2 * group, sequence, 16), (batch, 2, sequence, 16), (batch, 2, sequence, 16)]
    return Heads(*(torch.randn(size, **kind).requires_grad_() for size in sizes))  # type: ignore[call-overload]


def packed_tokens() -> Tensor:
    """Two sequences of documents, whose ends are part of them; one begins within, one is a lone boundary."""
    torch.manual_seed(1)
    tokens = torch.randint(1, 40, (2, 24))
    for row, place in ((0, 4), (0, 5), (0, 17), (1, 23)):
        tokens[row, place] = BOUNDARY
    return tokens


def test_documents_are_cut_after_each_boundary_and_at_each_sequence() -> None:
    documents = Documents.of(packed_tokens(), BOUNDARY)
    assert documents.bounds.tolist() == [0, 5, 6, 18, 24, 48]
    assert documents.bounds.dtype == torch.int32
    assert documents.longest == 24


@pytest.mark.parametrize("backend", ["auto", "math"])
def test_packed_documents_attend_as_each_alone_gradients_too(backend: str) -> None:
    attention.configure(Settings(backend=backend))  # type: ignore[arg-type]
    documents, packed = Documents.of(packed_tokens(), BOUNDARY), heads(2, 24)
    upstream = torch.randn_like(packed.query)
    out = attend(packed, documents)
    grads = torch.autograd.grad(out, packed, upstream)
    bounds = documents.bounds.tolist()
    for first, last in pairwise(bounds):
        row, cut = first // 24, slice(first % 24, last - first // 24 * 24)
        alone = Heads(*(part[row : row + 1, :, cut].detach().requires_grad_() for part in packed))
        wanted = attend(alone)
        torch.testing.assert_close(out[row : row + 1, :, cut], wanted)
        wanted_grads = torch.autograd.grad(wanted, alone, upstream[row : row + 1, :, cut])
        for got, want in zip(grads, wanted_grads, strict=True):
            torch.testing.assert_close(got[row : row + 1, :, cut], want)


@pytest.mark.parametrize("backend", ["auto", "math"])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
def test_the_last_queries_of_more_keys_are_those_of_all_gradients_too(
    backend: str, dtype: torch.dtype, bound: float
) -> None:
    """Queries of segments, each with the keys up to its end, against all queries at once."""
    attention.configure(Settings(backend=backend))  # type: ignore[arg-type]
    whole = heads(2, 21, dtype=dtype)
    upstream = torch.randn_like(whole.query)
    out = torch.cat(
        [
            attend(Heads(whole.query[:, :, first:last], whole.key[:, :, :last], whole.value[:, :, :last]))
            for first, last in ((0, 7), (7, 8), (8, 21))
        ],
        dim=2,
    )
    exact = Heads(*(part.detach().double().requires_grad_() for part in whole))
    scores = exact.query @ exact.key.repeat_interleave(2, dim=1).transpose(2, 3) / 4
    later = torch.ones(21, 21, dtype=torch.bool).triu(1)
    wanted = scores.masked_fill(later, -torch.inf).softmax(-1) @ exact.value.repeat_interleave(2, dim=1)
    slopes = torch.autograd.grad(wanted, exact, upstream.double())
    found = (out, *torch.autograd.grad(out, whole, upstream))
    for got, want in zip(found, (wanted, *slopes), strict=True):
        assert float(((got.double() - want).norm() / want.norm()).detach()) < bound


def test_backends_that_count_queries_from_the_first_key_refuse_more_keys() -> None:
    made = [torch.empty(1, 2, n, 16, device="meta", dtype=torch.bfloat16) for n in (4, 8, 8)]
    for name in ("cudnn", "efficient"):
        assert "use flash, triton or math" in str(attention.why_not(name, Heads(*made), False, False))
    for name in ("flash", "math"):
        assert attention.why_not(name, Heads(*made), False, True) is None


def test_a_packed_model_is_each_document_alone_gradients_too() -> None:
    config = Decoder.Config(vocabulary=48, hidden=32, layers=2, heads=4, kv_heads=2, mlp_width=64)
    model = Decoder(config, torch.Generator().manual_seed(0)).double()
    tokens, targets = packed_tokens(), torch.randint(0, 48, (2, 24))
    documents = Documents.of(tokens, BOUNDARY)
    logits = model(tokens.t(), None, documents)
    cross_entropy(logits.flatten(0, 1), targets.t().flatten()).backward()
    packed = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    bounds = documents.bounds.tolist()
    for first, last in pairwise(bounds):
        row, cut = first // 24, slice(first % 24, last - first // 24 * 24)
        alone = model(tokens[row : row + 1, cut].t())
        # Positions begin anew in each document when it is alone: rotary attention does not see where.
        torch.testing.assert_close(alone[:, 0], logits[cut, row])
        loss = cross_entropy(alone.flatten(0, 1), targets[row, cut])
        (loss * (last - first) / tokens.numel()).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(packed[name], parameter.grad, msg=name)
    with torch.no_grad():
        across = model(tokens.t())
    assert not torch.allclose(across[6:18, 0], logits[6:18, 0])


@pytest.mark.parametrize("backend", ["cudnn", "flash", "fa", "triton", "efficient"])
def test_the_cpu_refuses_what_it_has_not(backend: str) -> None:
    attention.configure(Settings(backend=backend))  # type: ignore[arg-type]
    with pytest.raises(UserError, match=f"attention.backend is {backend}, but the CPU has auto and math"):
        attend(heads(1, 4))


@pytest.mark.parametrize(
    ("name", "kind", "documents", "deterministic", "says"),
    [
        ("cudnn", torch.bfloat16, False, False, None),
        ("cudnn", torch.bfloat16, False, True, None),
        ("cudnn", torch.bfloat16, True, False, "it knows no documents"),
        ("cudnn", torch.float32, False, False, "it takes no float32"),
        ("flash", torch.bfloat16, True, True, None),
        ("flash", torch.float32, False, False, "it takes no float32"),
        ("triton", torch.bfloat16, False, True, None),
        ("triton", torch.bfloat16, True, True, "it knows no documents"),
        ("triton", torch.float64, False, True, "it takes no float64"),
        ("efficient", torch.float32, False, True, None),
        ("efficient", torch.float32, True, True, "it knows no documents"),
        ("math", torch.float32, True, True, None),
    ],
)
def test_what_each_backend_takes(
    name: str, kind: torch.dtype, documents: bool, deterministic: bool, says: str | None
) -> None:
    reason = attention.why_not(name, heads(1, 8, dtype=kind, device="meta"), documents, deterministic)
    assert reason is None if says is None else says in str(reason)


def test_the_log_sum_exp_of_cudnn_is_read_in_both_shapes_and_no_other() -> None:
    query = torch.empty(2, 3, 4, 8)
    sums = torch.randn(2, 3, 4)
    for given in (sums, sums.unsqueeze(-1), sums.transpose(0, 2).contiguous().transpose(0, 2)):
        assert torch.equal(kernels.log_sums(given, query), sums)
        assert kernels.log_sums(given, query).is_contiguous()
    for other in (sums.double(), sums.transpose(1, 2), sums.unsqueeze(1)):
        with pytest.raises(UserError, match="to triton or flash"):
            kernels.log_sums(other, query)


def test_odd_heads_and_fp64_go_to_math_and_fp32_never_to_half_kernels() -> None:
    odd = Heads(*(torch.empty(1, 2, 4, 12, device="meta", dtype=torch.bfloat16) for _ in range(3)))
    assert attention.candidates(odd, False, True) == ["math"]
    double = heads(1, 8, dtype=torch.float64, device="meta")
    assert attention.candidates(double, False, True) == ["math"]
    single = heads(1, 8, dtype=torch.float32, device="meta")
    assert attention.candidates(single, False, False) == ["efficient"]


def test_the_order_of_preference(monkeypatch: pytest.MonkeyPatch) -> None:
    half = heads(1, 8, dtype=torch.bfloat16, device="meta")
    monkeypatch.setattr(attention.kernels, "package", lambda: None)
    assert attention.candidates(half, False, False) == ["cudnn", "flash", "triton", "efficient"]
    assert attention.candidates(half, False, True) == ["cudnn", "flash", "triton", "efficient"]
    assert attention.candidates(half, True, True) == ["flash"]


def test_the_kernels_of_pairs_are_grouped_queries() -> None:
    given = heads(2, 24, group=3)
    upstream = torch.randn_like(given.query)
    found, wanted = attention.run("triton", given, None, True), attend(given)
    torch.testing.assert_close(found, wanted)
    for mine, other in zip(*(torch.autograd.grad(o, given, upstream) for o in (found, wanted)), strict=True):
        torch.testing.assert_close(mine, other)


def test_cudnn_has_gradients_in_a_fixed_order_on_meta() -> None:
    given = heads(2, 24, dtype=torch.bfloat16, device="meta")
    out = attention.run("cudnn", given, None, True)
    assert out.shape == given.query.shape
    assert out.grad_fn is not None
    assert out.grad_fn.name() == "_CudnnBackward"
    for gradient, part in zip(torch.autograd.grad(out, given, out.detach()), given, strict=True):
        assert gradient.shape == part.shape


@pytest.mark.parametrize("packed", [False, True])
def test_shapes_of_flash_on_meta(packed: bool) -> None:
    given = heads(2, 24, dtype=torch.bfloat16, device="meta")
    documents = Documents(torch.zeros(3, dtype=torch.int32, device="meta"), 24) if packed else None
    out = attention.run("flash", given, documents, True)
    assert out.shape == given.query.shape
    for got, part in zip(torch.autograd.grad(out.sum(), given), given, strict=True):
        assert got.shape == part.shape


def test_the_flag_of_torch_is_put_back() -> None:
    with attention.kernels._in_fixed_order(True):
        assert torch.are_deterministic_algorithms_enabled()
        assert not torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    assert not torch.are_deterministic_algorithms_enabled()
    assert torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
