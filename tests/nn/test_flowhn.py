"""FlowHN: its branches and their windows, its pieces, how far gradients reach, counts, decoding, refusals."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import softmax

from flashtrain.errors import UserError
from flashtrain.models.decoder import Decoder
from flashtrain.nn.attention import Attention
from flashtrain.nn.flops import forward_flops
from flashtrain.nn.flowhn import FlowHN, FlowPast
from flashtrain.nn.hybrid import Sublayers
from flashtrain.nn.mamba1 import Mamba1
from flashtrain.nn.mlp import SwiGLU
from flashtrain.nn.rotary import no_positions, rotary_table
from flashtrain.nn.ssm import Mamba2
from flashtrain.nn.windows import balanced_share

HIDDEN, TOKENS = 16, 12
SSM = Mamba2.Config(head_dim=8, states=4, groups=2)
STRATEGIES = ("none", "alternating", "fixed", "circulating")


def parts(hidden: int = HIDDEN, heads: int = 4, kv_heads: int = 2, width: int = 64) -> Sublayers:
    return Sublayers(
        hidden,
        1e-5,
        lambda: Attention(hidden, heads, kv_heads, hidden // heads),
        lambda: SwiGLU(hidden, width),
    )


def block(index: int = 0, **settings: Any) -> FlowHN:
    torch.manual_seed(index)
    given = {"ssm": SSM, "align": 1, **settings}
    return FlowHN(FlowHN.Config(**given), index, parts()).double()


def tokens(count: int = TOKENS) -> Tensor:
    return torch.randn(count, 2, HIDDEN, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


def nowhere(count: int = TOKENS) -> Tensor:
    return no_positions(count, HIDDEN // 4)


def through(branch: nn.ModuleList, x: Tensor) -> Tensor:
    """A mixer on normed tokens alone, or with an MLP two layers with their residuals."""
    rotary = nowhere(x.shape[0])
    mixer, *mlp = branch
    return mlp[0](mixer(x, rotary), rotary) if mlp else mixer(x, rotary) - x


@pytest.mark.parametrize("ffn", ["branch", "none", "shared"])
@pytest.mark.parametrize("ssm", [SSM, Mamba1.Config(states=4)])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_block_is_the_published_one_with_tokens_gathered_by_index(
    strategy: str, ssm: Any, ffn: str
) -> None:
    layer, x = block(1, strategy=strategy, ffn=ffn, ssm=ssm), tokens()
    if strategy == "none":
        mixed = torch.cat([through(layer.ssm_branch, x), through(layer.attention_branch, x)], dim=-1)
    else:
        first, last = layer.window(TOKENS)
        assert 0 < last - first < TOKENS
        own = torch.arange(first, last)
        others = torch.tensor([t for t in range(TOKENS) if not first <= t < last])
        mixed = torch.empty_like(x)
        mixed[own] = through(layer.attention_branch, x[own])
        mixed[others] = through(layer.ssm_branch, x[others])  # one sequence: the pieces carry their state
    y = x + layer.fuse(mixed)
    last_layer = layer.mlp if ffn == "shared" else layer.final
    torch.testing.assert_close(layer(x, nowhere()), y + last_layer(layer.norm(y)))


def test_two_pieces_have_the_gradients_of_one() -> None:
    layer, x = block(1), tokens().requires_grad_()
    first, last = layer.window(TOKENS)
    assert first > 0, "two pieces"
    assert last < TOKENS, "two pieces"
    leaves = [x, *layer.ssm_branch.parameters()]
    others = torch.cat([x[:first], x[last:]])
    whole = through(layer.ssm_branch, others)
    own = through(layer.attention_branch, x[first:last])
    y = x + layer.fuse(torch.cat([whole[:first], own, whole[first:]]))
    y = y + layer.final(layer.norm(y))
    slope = torch.randn_like(y)
    wanted = torch.autograd.grad(y, leaves, slope)
    for one, other in zip(torch.autograd.grad(layer(x, nowhere()), leaves, slope), wanted, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("ssm", [SSM, Mamba1.Config(states=4)])
def test_pieces_share_what_the_ssm_makes_of_its_weights_in_one_pass_and_no_longer(
    ssm: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer, x = block(1, ssm=ssm), tokens()
    read: list[str] = []
    mixer = layer.ssm_branch[0].ssm
    own = type(mixer)._own
    monkeypatch.setattr(type(mixer), "_own", lambda self, name: read.append(name) or own(self, name))
    before = layer(x, nowhere())
    assert read.count("inputs.x") == 1
    assert read.count("skip") > 1, "two pieces"
    with torch.no_grad():
        mixer.get_parameter("inputs.x").mul_(2)
    assert not torch.equal(layer(x, nowhere()), before)
    assert read.count("inputs.x") == 2
    with torch.no_grad():
        packed = mixer.packed()
        mixer.get_parameter("inputs.x").mul_(2)
        assert not torch.equal(mixer.packed(), packed)


def test_no_window_is_a_pure_ssm_and_a_full_one_pure_attention() -> None:
    x = tokens()
    for f, name in ((0.0, "ssm_branch"), (1.0, "attention_branch")):
        layer = block(f=f)
        y = x + layer.fuse(through(getattr(layer, name), x))
        torch.testing.assert_close(layer(x, nowhere()), y + layer.final(layer.norm(y)))


def test_attention_in_a_window_is_the_full_mask_cut_out() -> None:
    layer, x = block(1, ffn="none"), tokens()
    first, last = layer.window(TOKENS)
    branch = layer.attention_branch[0]
    heads = branch.attention.project(branch.norm(x), nowhere())
    key, value = (t.repeat_interleave(2, dim=1) for t in heads[1:])
    scores = heads.query @ key.mT / heads.query.shape[-1] ** 0.5
    position = torch.arange(TOKENS)
    inside = (position >= first) & (position < last)
    mask = (position[:, None] >= position[None, :]) & inside[:, None] & inside[None, :]
    met = softmax(scores.masked_fill(~mask, float("-inf")), dim=-1) @ value
    wanted = branch.attention.out(met.permute(2, 0, 1, 3).flatten(2))[first:last]
    torch.testing.assert_close(branch(x[first:last], nowhere(last - first)) - x[first:last], wanted)


@pytest.mark.parametrize(
    ("settings", "reached"),
    [
        ({"strategy": "none"}, [1.0, 1.0, 1.0]),
        ({"strategy": "alternating"}, [0.54, 0.54, 0.54]),
        ({"strategy": "fixed", "f": 0.59}, [0.55, 0.55, 0.55]),
        ({"f": 1 / 3}, [0.59, 0.795, 1.0]),
        ({"f": 0.55, "fac_windows": "disjoint"}, [0.55, 0.55, 0.55]),
        ({"f": 0.55}, [0.55, 0.885, 1.0]),
    ],
)
def test_gradients_reach_as_far_as_the_windows_let_them(settings: Any, reached: list[float]) -> None:
    layers = [block(index, **settings) for index in range(3)]
    x = tokens().requires_grad_()
    y = x
    for layer, wanted in zip(layers, reached, strict=True):
        y = layer(y, nowhere())
        met = torch.zeros(TOKENS, TOKENS)
        for t in range(TOKENS):
            (slope,) = torch.autograd.grad(y[t].square().sum(), x, retain_graph=True)
            met[t] = slope.abs().sum((1, 2)) > 0
        assert not met.triu(1).any(), "a token saw a later one"
        assert float(met.sum()) / (TOKENS * (TOKENS + 1) / 2) == pytest.approx(wanted, abs=0.005)


def test_positions_are_kept() -> None:
    # With branches that give their input back, normed by nothing, the routing is the identity.
    layer = block(1, ffn="none")
    seen: list[Tensor] = []
    layer.fuse.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    for branch in (layer.ssm_branch, layer.attention_branch):
        branch[0].norm = nn.Identity()
        branch[0].mixed = lambda x, rotary, past: (x, past)
    x = tokens()
    layer(x, nowhere())
    assert torch.equal(seen[0], x)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("cuts", [(1, 2, 3, 6), (5,), (4, 9)])
def test_decoding_equals_the_full_forward(strategy: str, cuts: tuple[int, ...]) -> None:
    layer, x = block(1, strategy=strategy, length=TOKENS), tokens()
    rotary, past, found = rotary_table(TOKENS, HIDDEN // 4, 100.0), None, []
    for part, places in zip(x.tensor_split(cuts), rotary.tensor_split(cuts, dim=1), strict=True):
        y, past = layer.extend(part, places, past)
        found.append(y)
    torch.testing.assert_close(torch.cat(found), layer(x, rotary))


def test_with_a_length_a_prefix_has_the_outputs_of_the_whole() -> None:
    layer, x = block(1, length=TOKENS), tokens()
    torch.testing.assert_close(layer(x[:8], nowhere(8)), layer(x, nowhere())[:8])


def test_decoding_is_refused_where_windows_depend_on_the_length() -> None:
    x = tokens(3)
    with pytest.raises(
        UserError, match=r"^FlowHN's windows depend on the length .* set model\.layout\.length$"
    ):
        block().extend(x, nowhere(3), None)
    block(strategy="none").extend(x, nowhere(3), None)
    with pytest.raises(UserError, match=r"^a sequence of 13 tokens is longer than model\.layout\.length 12$"):
        block(length=TOKENS).extend(x[:1], nowhere(1), FlowPast(TOKENS))


# Section 4.4 of the specification: width, MLP, blocks, parameters split and not, FLOPs of a token in millions
# (attention's branch, the SSM's, then the model without split, alternating, fixed), and the balanced share.
SIZES = [
    (768, 2048, 2, 132.4, 133.6, 15.5, 17.1, 173.1, 136.5, 136.2, 0.548),
    (1024, 4096, 6, 353.5, 359.8, 34.6, 38.7, 611.9, 373.0, 371.0, 0.542),
    (2048, 8192, 6, 1144.3, 1169.5, 130.0, 154.0, 2123.4, 1208.5, 1196.0, 0.549),
]


@pytest.mark.parametrize("size", SIZES)
def test_parameters_flops_and_shares_are_the_published_ones(size: tuple[Any, ...]) -> None:
    hidden, width, blocks, split, whole, attention, ssm, none, alternating, fixed, balanced = size
    vocabulary, sequence = 65536, 1024

    def model(**settings: Any) -> Decoder:
        layout = FlowHN.Config(**{"ssm": Mamba1.Config(), "align": 1, **settings})
        with torch.device("meta"):
            return Decoder(
                Decoder.Config(
                    vocabulary=vocabulary,
                    hidden=hidden,
                    layers=blocks,
                    heads=32,
                    kv_heads=8,
                    mlp_width=width,
                    layout=layout,
                )
            )

    def counted(model: Decoder) -> float:
        """Parameters without those of norms, in millions."""
        return sum(p.numel() for n, p in model.named_parameters() if "norm" not in n.split(".")[-2]) / 1e6

    def published(branch: nn.ModuleList, tokens: int) -> float:
        """Our count of attention is causal, theirs is not; norms are ours alone."""
        norms = sum(2.0 * m.weight.numel() for m in branch.modules() if isinstance(m, nn.RMSNorm))
        causal = 2.0 * tokens * hidden if "attention" in branch[0].kind else 0.0
        return forward_flops(branch, tokens) + causal - norms

    models = {s: model(strategy=s, f=0.59) for s in ("none", "alternating", "fixed")}
    assert counted(models["fixed"]) == pytest.approx(split, abs=0.06)
    assert counted(models["none"]) == pytest.approx(whole, abs=0.06)
    one = models["none"].layers[0]
    assert published(one.attention_branch, sequence) / 1e6 == pytest.approx(attention, abs=0.05)
    assert published(one.ssm_branch, sequence) / 1e6 == pytest.approx(ssm, abs=0.05)

    def total(strategy: str) -> float:
        flops = 2.0 * hidden * vocabulary
        for layer in models[strategy].layers:
            first, last = layer.window(sequence)
            own = (last - first) / sequence
            rest = 1.0 if strategy == "none" else 1.0 - own
            flops += own * published(layer.attention_branch, last - first)
            flops += rest * published(layer.ssm_branch, sequence)
            flops += 2.0 * (layer.fuse.weight.numel() + layer.final.weight.numel())
        return flops / 1e6

    assert total("none") == pytest.approx(none, abs=0.06)
    assert total("alternating") == pytest.approx(alternating, abs=0.06)
    assert total("fixed") == pytest.approx(fixed, abs=0.06)
    share = balanced_share(
        lambda n: published(one.attention_branch, n), lambda n: published(one.ssm_branch, n), sequence
    )
    assert share == pytest.approx(balanced, abs=1e-3)


def test_flops_count_each_branch_by_its_share_of_the_tokens() -> None:
    layer = block(1, f=0.25)
    first, last = layer.window(TOKENS)
    assert last - first == 3
    rest = sum(forward_flops(m, TOKENS) for m in (layer.fuse, layer.norm, layer.final))
    wanted = (
        0.25 * forward_flops(layer.attention_branch, 3) + 0.75 * forward_flops(layer.ssm_branch, 9) + rest
    )
    assert layer.flops_per_token(TOKENS) == pytest.approx(wanted)


def test_the_automatic_share_balances_the_counted_flops() -> None:
    layer = block()
    first, last = layer.window(300)
    own, others = last - first, 300 - last + first
    left = own * forward_flops(layer.attention_branch, own)
    right = others * forward_flops(layer.ssm_branch, others)
    assert left == pytest.approx(right, rel=0.02)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"f": 1.5}, "model.layout.f is 1.5; it must be auto, or from 0 to 1"),
        ({"align": 0}, "model.layout.align is 0; it must be at least 1"),
        ({"length": 100}, "model.layout.length is 100; it must be a multiple of model.layout.align 128"),
        (
            {"ssm": Mamba2.Config(head_dim=7)},
            "model.layout.ssm.head_dim is 7; it must divide model.layout.ssm.expand x model.hidden, 512",
        ),
        (
            {"ssm": Mamba2.Config(head_dim=256, groups=4)},
            "model.layout.ssm has 2 heads; model.layout.ssm.groups 4 must divide them",
        ),
        ({"ssm": Mamba1.Config(rank=0)}, "model.layout.ssm.rank is 0; it must be at least 1"),
    ],
)
def test_settings_that_do_not_fit_are_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        Decoder.Config(layout=FlowHN.Config(**settings)).validate()
    assert str(caught.value) == message
