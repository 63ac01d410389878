"""Pairing attention on a GPU: full tiles, every dtype and width, ragged and cached, against fp64.

Triton 3.4 to 3.7.0 miscompiles some products on Hopper (flash-linear-attention#640), so every gradient is
compared for every dtype: an error of a thousandth is a rounding, one of a tenth is not.
"""

from collections import Counter
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from flashtrain.kernels.pairing_attention import config, op, reference
from flashtrain.models.decoder import Decoder
from flashtrain.nn.attend import Heads, Settings
from flashtrain.nn.attention import Attention
from flashtrain.nn.paired_attention import Method, attend_pairs
from flashtrain.nn.pairing import Pairing
from flashtrain.nn.rotary import rotary_table

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]
BOUNDS = {torch.bfloat16: 8e-3, torch.float16: 1e-3, torch.float32: 2e-5}
NAMES = ("out", "logsumexp", "dq", "dk", "dv")


def error(found: Tensor, true: Tensor) -> float:
    assert not found.isnan().any(), "an element was not written"
    return float((found.double() - true).norm() / true.norm())


def inputs(
    pairing: Pairing, width: int, new: int, every: int, dtype: torch.dtype, batch: int = 2
) -> list[Tensor]:
    """Views of packed projections ``[S, B, heads, D]``."""
    shapes = ((new, pairing.n_q), (every, pairing.n_kv), (every, pairing.n_kv))
    packed = [torch.randn(s, batch, n + 1, width, device="cuda").to(dtype) for s, n in shapes]
    return [x[:, :, 1:].permute(1, 2, 0, 3) for x in packed]


def outcome(function: object, given: list[Tensor], slopes: list[Tensor], *more: object) -> list[Tensor]:
    leaves = [x.detach().requires_grad_() for x in given]
    outputs = function(*leaves, *more)  # type: ignore[operator]
    return [*(y.detach() for y in outputs), *torch.autograd.grad(outputs, leaves, slopes)]


def compare(
    name: str, heads: int, width: int, new: int, every: int, dtype: torch.dtype, causal: bool, batch: int = 2
) -> None:
    pairing = Pairing.named(name, heads)
    maps = list(pairing.query_of), list(pairing.key_of)
    given = inputs(pairing, width, new, every, dtype, batch)
    slopes = [
        torch.randn(batch, heads, new, width, device="cuda").to(dtype),
        torch.randn(batch, heads, new, device="cuda"),
    ]
    wide = [x.double() for x in slopes]
    true = outcome(reference.pairing_attention, [x.double() for x in given], wide, *maps, causal)
    found = outcome(op.pairing_kernels, given, slopes, *maps, causal)
    for label, one, other in zip(NAMES, found, true, strict=True):
        assert error(one, other) < BOUNDS[dtype], label
    for one, other in zip(found, outcome(op.pairing_kernels, given, slopes, *maps, causal), strict=True):
        assert torch.equal(one, other), "other bits in a second run"


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize("name", ["gqkva-4.2", "mkva", "mqa", "gkva-4"])
def test_every_output_and_gradient_equals_fp64(
    name: str, width: int, dtype: torch.dtype, poisoned_memory: None
) -> None:
    compare(name, 8, width, 777, 777, dtype, True)


@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize("name", ["gqkva-4.2", "mkva"])
def test_on_hopper_the_portable_kernels_are_right_too(
    name: str, width: int, poisoned_memory: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if torch.cuda.get_device_capability() == (9, 0):
        assert config.config_of(torch.bfloat16, width).partitioned
    monkeypatch.setattr(config, "_hopper", lambda: False)
    assert not config.config_of(torch.bfloat16, width).partitioned
    compare(name, 8, width, 777, 777, torch.bfloat16, True)


@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize("splits", [1, 2, 8])
def test_every_split_of_the_pairs_of_a_head(
    width: int, splits: int, poisoned_memory: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Parts without pairs too: KV head 0 has one for 8 blocks."""
    monkeypatch.setattr("flashtrain.kernels.pairing_attention.triton.splits_of", lambda *_: splits)
    compare("0:0 0:1 1:1 2:1 3:1 4:1 5:1", 7, width, 200, 333, torch.bfloat16, True)


@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize(("name", "heads", "batch"), [("mha", 7, 5), ("gqa-12", 24, 6), ("gqkva-6.4", 24, 9)])
def test_sections_of_the_gradients(
    name: str, heads: int, batch: int, width: int, poisoned_memory: None
) -> None:
    """More blocks than are at work at a time: of 35, the second section has one fewer."""
    compare(name, heads, width, 300, 300, torch.bfloat16, True, batch)


@pytest.mark.parametrize("width", [8, 32, 40, 80, 96])
def test_every_width(width: int, poisoned_memory: None) -> None:
    compare("gqkva-3.2", 6, width, 300, 300, torch.bfloat16, True)


@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize(("new", "every"), [(197, 197), (300, 129), (129, 300), (100, 20), (256, 256)])
def test_attention_to_all_keys(new: int, every: int, width: int, poisoned_memory: None) -> None:
    compare("gqkva-3.2", 6, width, new, every, torch.bfloat16, False)


@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize(
    ("new", "every"), [(1, 1), (1, 513), (17, 300), (128, 256), (1024, 1024), (1023, 1025)]
)
def test_new_tokens_after_earlier_ones(new: int, every: int, width: int, poisoned_memory: None) -> None:
    compare("0:1 2:0 1:1 0:0", 4, width, new, every, torch.bfloat16, True)


@pytest.mark.parametrize("width", [64, 128])
def test_errors_do_not_grow_with_the_sequence(width: int) -> None:
    compare("gqkva-2.1", 2, width, 8192, 8192, torch.bfloat16, True)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize("name", ["gqkva-8.4", "mha"])
def test_many_tiles_to_a_block_are_those_of_the_portable_kernel(
    name: str, width: int, causal: bool, poisoned_memory: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With more keys and values than fit in the cache at once, heads are worked through in turn."""
    pairing = Pairing.named(name, 32)
    maps = list(pairing.query_of), list(pairing.key_of)
    given = inputs(pairing, width, 2048, 4096, torch.bfloat16)
    found = op.pairing_kernels(*given, *maps, causal)
    monkeypatch.setattr(config, "_hopper", lambda: False)
    for one, other in zip(found, op.pairing_kernels(*given, *maps, causal), strict=True):
        assert error(one, other.double()) < BOUNDS[torch.bfloat16]


@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize("name", ["gqkva-8.4", "gqa-8"])
def test_bits_do_not_depend_on_who_else_is_at_work(name: str, width: int) -> None:
    """More blocks than fit, beside products on another stream that take multiprocessors from them."""
    pairing = Pairing.named(name, 32)
    maps = list(pairing.query_of), list(pairing.key_of)
    given = inputs(pairing, width, 4096, 4096, torch.bfloat16)
    slope = torch.randn(2, 32, 4096, width, device="cuda").bfloat16()
    out, logsumexp = op.pairing_kernels(*given, *maps, True)
    wanted = op.pairing_backward_kernels(slope, None, out, logsumexp, *given, *maps, True)
    other, beside = torch.cuda.Stream(), torch.randn(2048, 2048, device="cuda").bfloat16()
    for _ in range(20):
        with torch.cuda.stream(other):
            for _ in range(20):
                beside @ beside
        assert all(map(torch.equal, op.pairing_kernels(*given, *maps, True), (out, logsumexp)))
        found = op.pairing_backward_kernels(slope, None, out, logsumexp, *given, *maps, True)
        assert all(map(torch.equal, found, wanted))


def test_a_gradient_that_is_an_expanded_view_is_taken(poisoned_memory: None) -> None:
    pairing = Pairing.named("gqkva-4.2", 8)
    given = [x.requires_grad_() for x in inputs(pairing, 64, 200, 200, torch.bfloat16)]
    maps = list(pairing.query_of), list(pairing.key_of)
    found = torch.autograd.grad(op.pairing_kernels(*given, *maps, True)[0].sum(), given)
    wide = [x.detach().double().requires_grad_() for x in given]
    true = torch.autograd.grad(reference.pairing_attention(*wide, *maps, True)[0].sum(), wide)
    # Slopes of ones cancel in dQ and dK, down to what rounding leaves; dV does not.
    assert all(one.isfinite().all() for one in found)
    assert error(found[2], true[2]) < BOUNDS[torch.bfloat16]


def mixed(pairing: Pairing, causal: bool, given: list[Tensor], slope: Tensor) -> list[Tensor]:
    leaves = [x.detach().requires_grad_() for x in given]
    out = attend_pairs(Heads(*leaves), pairing, causal, "mixed")
    return [out.detach(), *torch.autograd.grad(out, leaves, slope)]


@pytest.mark.parametrize(("tokens", "causal"), [(777, True), (1024, True), (197, False)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("width", [64, 80, 128])
@pytest.mark.parametrize("name", ["gqkva-4.2", "mkva", "mqa", "gkva-4", "0:1 2:0 1:1 0:0"])
def test_gradients_by_cudnn_of_what_the_kernel_gave_equal_fp64(
    name: str, width: int, dtype: torch.dtype, tokens: int, causal: bool, poisoned_memory: None
) -> None:
    pairing = Pairing.named(name, len(name.split()) if ":" in name else 8)
    given = inputs(pairing, width, tokens, tokens, dtype)
    maps = list(pairing.query_of), list(pairing.key_of)
    # As the projection behind attention gives it, and with heads first.
    by_token = torch.randn(tokens, 2, pairing.heads, width, device="cuda").to(dtype).permute(1, 2, 0, 3)
    for slope in (by_token, by_token.contiguous()):
        leaves = [x.double().requires_grad_() for x in given]
        out = reference.pairing_attention(*leaves, *maps, causal)[0]
        true = [out.detach(), *torch.autograd.grad(out, leaves, slope.double())]
        found = mixed(pairing, causal, given, slope)
        for label, one, other in zip(("out", "dq", "dk", "dv"), found, true, strict=True):
            assert error(one, other) < BOUNDS[dtype], label


def test_copies_for_cudnn_live_in_the_backward_pass_alone() -> None:
    pairing = Pairing.named("gqkva-2.4", 8)
    given = [x.requires_grad_() for x in inputs(pairing, 64, 4096, 4096, torch.bfloat16)]
    out = attend_pairs(Heads(*given), pairing, True, "mixed")  # compiles, and fills torch's caches
    del out
    before = torch.cuda.memory_allocated()
    out = attend_pairs(Heads(*given), pairing, True, "mixed")
    kept = torch.cuda.memory_allocated() - before
    assert kept <= out.nbytes + 4 * out.numel() // 64 + 4096  # and a log-sum-exp each


def test_methods_agree() -> None:
    pairing = Pairing.named("gqkva-4.2", 8)
    heads = Heads(*inputs(pairing, 64, 500, 500, torch.bfloat16))
    methods: tuple[Method, ...] = ("kernel", "expand", "mixed")
    for causal in (True, False):
        ours, *others = (attend_pairs(heads, pairing, causal, method) for method in methods)
        for other in others:
            assert error(ours, other.double()) < BOUNDS[torch.bfloat16]
            assert other.permute(2, 0, 1, 3).is_contiguous()


class _Passes(TorchDispatchMode):
    """Operators that move activations ``[..., D]`` or weights, besides products, rotation and attention."""

    def __init__(self) -> None:
        super().__init__()
        self.ran: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().partition(".")[0].removeprefix("aten::")
        if name in ("cat", "clone", "copy_", "_to_copy", "stack", "sum", "index", "add", "zeros"):
            self.ran[name] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("method", "passes"),
    # The weights become one; queries are copied, and their gradients summed.
    [
        ("kernel", {"cat": 1}),
        ("expand", {"cat": 1, "clone": 1, "sum": 1}),
        ("mixed", {"cat": 1, "clone": 1, "sum": 1}),
    ],
)
def test_a_layer_makes_no_pass_over_memory_but_these(
    method: Method, passes: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    by_method = partial(attend_pairs, method=method)
    monkeypatch.setattr("flashtrain.nn.attention.attend_pairs", by_method)
    monkeypatch.setattr("flashtrain.nn.attend._settings", Settings(deterministic=False))
    layer = Attention(512, 8, 8, 64, pairing=Pairing.named("gqkva-4.2", 8)).cuda().bfloat16()
    table = rotary_table(256, 64, 10_000.0, torch.device("cuda"))
    x = torch.randn(256, 2, 512, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    slope = torch.randn_like(x)
    with _Passes() as found:
        torch.autograd.grad(layer(x, table), [x, *layer.parameters()], slope)
    assert found.ran == passes


@pytest.mark.parametrize("pairing", ["gqkva-4.2", "mkva"])
def test_a_decoder_equals_itself_on_the_cpu(pairing: str) -> None:
    config = Decoder.Config(hidden=256, layers=2, heads=8, mlp_width=512, pairing=pairing)
    model = Decoder(config, torch.Generator().manual_seed(0))
    tokens = torch.randint(0, 256, (2, 150, 2))
    model(*tokens).backward()
    wanted = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    model.cuda()
    model(*tokens.cuda()).backward()
    for parameter, other in zip(model.parameters(), wanted, strict=True):
        assert error(parameter.grad, other.double().cuda()) < 1e-3
    with torch.inference_mode():
        logits = model(tokens[0].cuda())
        first, past = model.extend(tokens[0, :140].cuda())
        rest = [first]
        for position in range(140, 150):
            row, past = model.extend(tokens[0, position : position + 1].cuda(), past)
            rest.append(row)
        assert error(torch.cat(rest), logits.double()) < 1e-4


@pytest.mark.parametrize("method", ["kernel", "mixed"])
def test_compiled_it_is_the_same(method: Method) -> None:
    pairing = Pairing.named("gqkva-4.2", 8)
    given = [x.requires_grad_() for x in inputs(pairing, 64, 256, 256, torch.bfloat16)]

    def function(*heads: Tensor) -> Tensor:
        return attend_pairs(Heads(*heads), pairing, True, method)

    assert torch.equal(torch.compile(function, fullgraph=True)(*given), function(*given))
