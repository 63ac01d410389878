"""Layers that share heads, against models whose layers are handed the source's heads explicitly."""

from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounter

from flashtrain.errors import UserError
from flashtrain.kernels.rotary.reference import rotate
from flashtrain.models.decoder import Decoder
from flashtrain.nn.attend import Heads, attend
from flashtrain.nn.attention import Attention
from flashtrain.nn.shared_attention import SwitchableAttention
from flashtrain.nn.sharing import Sharing

CONFIG = Decoder.Config(vocabulary=50, hidden=48, layers=6, heads=6, kv_heads=2, mlp_width=64, qkv_bias=True)
QK, KV = Sharing(targets=(3, 4, 5), deferred=True), Sharing(share="KV", targets=(3, 4, 5))
LAYER_BY_LAYER = replace(QK, deferred=False)
FRESH = replace(KV, kv_origin="fresh")


def decoder(sharing: Sharing | None, config: Decoder.Config = CONFIG) -> Decoder:
    model = Decoder(replace(config, sharing=sharing), torch.Generator().manual_seed(0)).double()
    draw = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if name.endswith("bias") and "qkv" in name:  # else zeros, which every mistake leaves alone
            torch.nn.init.normal_(parameter, std=0.5, generator=draw)
    return model


def alike(sharing: Sharing, config: Decoder.Config = CONFIG) -> tuple[Decoder, Decoder]:
    """A plain model, and one with the same weights whose layers may share."""
    plain, model = decoder(None, config), decoder(sharing, config)
    with torch.no_grad():
        for name, attention in switchable(model).items():
            for kind in ("weight", "bias"):
                packed = plain.get_parameter(f"{name}.qkv.{kind}")
                for piece, rows in attention.pieces(packed).items():
                    attention.get_parameter(f"{piece}.{kind}").copy_(rows)
        for name, parameter in plain.named_parameters():
            if name in dict(model.named_parameters()):
                model.get_parameter(name).copy_(parameter)
    return plain, model


def switchable(model: Decoder) -> dict[str, SwitchableAttention]:
    return {name: m for name, m in model.named_modules() if isinstance(m, SwitchableAttention)}


def batch(sequence: int = 9) -> tuple[Tensor, Tensor]:
    drawn = torch.randint(0, 50, (2, sequence, 2), generator=torch.Generator().manual_seed(2))
    return drawn[0], drawn[1]


def hand_over(model: Decoder, sources: list[int], share: str, detached: bool = False) -> None:
    """Make the layers of a plain model use the heads of ``sources``, as written in the paper."""
    kept: dict[int, Heads] = {}

    def forward(layer: int, attention: Attention, x: Tensor, rotary: Tensor, documents: None) -> Tensor:
        own = attention.project(x, rotary)
        source = sources[layer]
        if source == layer:
            kept[layer] = own
            return attention._close(attend(own))
        theirs = Heads(*(part.detach() for part in kept[source])) if detached else kept[source]
        if share == "QK":
            return attention._close(attend(Heads(theirs.query, theirs.key, own.value)))
        return attention._close(attend(Heads(own.query, theirs.key, theirs.value)))

    for number, layer in enumerate(model.layers):
        layer.attention.forward = partial(forward, number, layer.attention)


def gradients_apart(plain: Decoder, model: Decoder) -> dict[str, Tensor]:
    """Gradients of the plain model by the names of the other."""
    found = {n: p.grad for n, p in plain.named_parameters() if p.grad is not None}
    for name, attention in switchable(model).items():
        for kind in ("weight", "bias"):
            for piece, rows in attention.pieces(found.pop(f"{name}.qkv.{kind}")).items():
                found[f"{name}.{piece}.{kind}"] = rows
    return found


def compare(plain: Decoder, model: Decoder) -> None:
    tokens, targets = batch()
    wanted, found = plain(tokens, targets), model(tokens, targets)
    torch.testing.assert_close(found, wanted, rtol=1e-13, atol=0)
    wanted.backward()
    found.backward()
    for name, gradient in gradients_apart(plain, model).items():
        own = model.get_parameter(name).grad
        if own is None:
            assert not gradient.any(), f"{name} has no gradient"
        else:
            error = (own - gradient).norm() / gradient.norm()
            assert error < 1e-12, f"{name}: {error}"


@pytest.mark.parametrize("sharing", [QK, KV])
def test_an_empty_region_is_the_plain_model_to_the_bit(sharing: Sharing) -> None:
    config = replace(CONFIG, sharing=sharing)
    plain, model = (Decoder(c, torch.Generator().manual_seed(0)) for c in (CONFIG, config))
    model.share(0)
    tokens, targets = batch()
    losses = [m(tokens, targets) for m in (plain, model)]
    assert torch.equal(*losses)
    for loss in losses:
        loss.backward()
    for name, gradient in gradients_apart(plain, model).items():
        assert torch.equal(model.get_parameter(name).grad, gradient), name
    for name, attention in switchable(model).items():
        pieces = attention.pieces(plain.get_parameter(f"{name}.qkv.weight"))
        for piece, rows in pieces.items():
            assert torch.equal(attention.get_parameter(f"{piece}.weight"), rows), name
    assert model.parameter_count() == plain.parameter_count()
    assert model.flops_per_token(9) == plain.flops_per_token(9)


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("sharing", [QK, LAYER_BY_LAYER, KV])
def test_a_region_equals_layers_that_are_handed_the_heads(sharing: Sharing, count: int) -> None:
    plain, model = alike(sharing)
    model.share(count)
    hand_over(plain, [*range(6 - count), *[5 - count] * count], sharing.share)
    compare(plain, model)
    unused = {n for n, p in model.named_parameters() if p.grad is None}
    name = {"QK": "qk", "KV": "kv"}[sharing.share]
    assert unused == {
        f"layers.{6 - 1 - i}.attention.{name}.{kind}" for i in range(count) for kind in ("weight", "bias")
    }
    assert not switchable(model)["layers.3.attention"].handover.regions, "heads outlive the pass"


@pytest.mark.parametrize("sharing", [QK, LAYER_BY_LAYER, KV])
def test_gradients_need_not_reach_the_source(sharing: Sharing) -> None:
    plain, model = alike(replace(sharing, grad_to_source=False))
    hand_over(plain, [0, 1, 2, 2, 2, 2], sharing.share, detached=True)
    compare(plain, model)


@pytest.mark.parametrize(
    ("source", "wanted"),
    [
        ("interval:2", [0, 0, 2, 2, 4, 4]),  # CLA
        ("interval:3", [0, 0, 0, 3, 3, 3]),
        ("0_1_2_2_2_2", [0, 1, 2, 2, 2, 2]),  # YOCO's second half
        ("0_1_0_1_4_0", [0, 1, 0, 1, 4, 0]),  # regions inside one another
    ],
)
@pytest.mark.parametrize("share", ["QK", "KV"])
def test_maps_are_those_of_cla_yoco_and_lckv(share: Any, source: str, wanted: list[int]) -> None:
    sharing = Sharing(share=share, source=source, deferred=share == "QK")
    sharing.validate(6)
    targets = [layer for layer, own in enumerate(wanted) if own != layer]
    assert list(sharing.targets_of(6)) == targets
    assert list(sharing.sources(6, len(targets))) == wanted
    plain, model = alike(sharing)
    hand_over(plain, wanted, share)
    compare(plain, model)


def test_the_second_half_shares_by_default_and_groups_have_sources_of_their_own() -> None:
    assert Sharing().targets_of(22) == tuple(range(11, 22))
    assert Sharing().sources(5, 2) == (0, 1, 2, 2, 2)
    apart = Sharing(targets=(1, 3, 4))
    assert apart.sources(6, 3) == (0, 0, 2, 2, 2, 5)
    assert apart.sources(6, 1) == (0, 1, 2, 3, 3, 5)
    plain, model = alike(apart)
    hand_over(plain, [0, 0, 2, 2, 2, 5], "QK")
    compare(plain, model)


def hand_over_fresh(model: Decoder, source: int, weight: Tensor, bias: Tensor) -> None:
    """Give layers behind ``source`` keys and values of one more projection of its input, as in YOCO."""
    kept: list[Tensor] = []

    def forward(layer: int, attention: Attention, x: Tensor, rotary: Tensor, documents: None) -> Tensor:
        if layer == source:
            made = (x @ weight.t() + bias).unflatten(-1, (2, 2, 8)).permute(3, 1, 2, 0, 4)  # key and value
            kept[:] = rotate(made[0], rotary), made[1]
        own = attention.project(x, rotary)
        return attention._close(attend(own if layer <= source else Heads(own.query, *kept)))

    for number, layer in enumerate(model.layers):
        layer.attention.forward = partial(forward, number, layer.attention)


def test_a_fresh_cache_equals_one_more_projection_at_the_source() -> None:
    plain, model = alike(FRESH)
    cache = model.get_submodule("layers.2.attention.cache")
    torch.nn.init.normal_(cache.bias, std=0.5, generator=torch.Generator().manual_seed(3))
    apart = [part.detach().clone().requires_grad_() for part in (cache.weight, cache.bias)]
    hand_over_fresh(plain, 2, *apart)
    compare(plain, model)
    for own, wanted in zip((cache.weight, cache.bias), apart, strict=True):
        torch.testing.assert_close(own.grad, wanted.grad, rtol=1e-11, atol=1e-14)
    unused = {name.split(".")[1] for name, p in model.named_parameters() if p.grad is None}
    assert unused == {"3", "4", "5"}, "the source uses its own keys and values"
    assert not cache_regions(model), "heads outlive the pass"


def cache_regions(model: Decoder) -> dict[int, Any]:
    return switchable(model)["layers.2.attention"].handover.regions


def test_a_fresh_cache_changes_no_other_weight_and_nothing_while_it_is_not_used() -> None:
    plain = Decoder(CONFIG, torch.Generator().manual_seed(0))
    model = Decoder(replace(CONFIG, sharing=FRESH), torch.Generator().manual_seed(0))
    caches = [name for name, _ in model.named_parameters() if ".cache." in name]
    assert caches == ["layers.2.attention.cache.weight", "layers.2.attention.cache.bias"]
    cache = model.get_parameter(caches[0])
    assert 0.8 < cache.std() / (2 / (5 * 48)) ** 0.5 < 1.2
    assert model.parameter_count() - plain.parameter_count() == cache.numel() + len(cache)
    sharing = model.flops_per_token(9)
    model.share(0)
    assert torch.equal(plain(*batch()), model(*batch()))
    assert model.flops_per_token(9) == plain.flops_per_token(9)
    # Three layers do without as large a projection, and the source has one more.
    assert plain.flops_per_token(9) - sharing == 3.0 * 2.0 * (3 - 1) * cache.numel()
    with pytest.raises(UserError, match="2 layers cannot share: with kv_origin fresh all 3 do, or none"):
        model.share(2)


@pytest.mark.parametrize(
    ("sharing", "steps", "wanted"),
    [
        (KV, (0, 1, 2, 3), [{4: (4, 5)}, {3: (3, 4, 4)}, {2: (2, 3, 3, 3)}]),
        (KV, (0, 3), [{2: (2, 3, 4, 5)}]),
        (KV, (3, 3, 1), [{}, {}]),
        (QK, (0, 2), [{3: (3, 4, 5)}]),
        (Sharing(source="interval:2"), (0, 1, 3), [{4: (4, 5)}, {0: (0, 1), 2: (2, 3)}]),
        (Sharing(source="interval:3"), (0, 1, 2), [{3: (3, 5)}, {3: (3, 4, 3)}]),
    ],
)
def test_a_source_begins_with_the_mean_of_what_its_layers_used(
    sharing: Sharing, steps: tuple[int, ...], wanted: list[dict[int, tuple[int, ...]]]
) -> None:
    averaged = replace(sharing, init="mean")
    assert [averaged.means(6, *each) for each in pairwise(steps)] == wanted
    assert [sharing.means(6, *each) for each in pairwise(steps)] == [{} for _ in wanted]


def test_a_fresh_cache_begins_with_its_sources_weights_or_with_the_mean() -> None:
    assert FRESH.means(6, 0, 3) == {2: (2,)}
    assert replace(FRESH, init="mean").means(6, 0, 3) == {2: (2, 3, 4, 5)}
    name, kv = "layers.2.attention.cache", "layers.{}.attention.kv"
    assert decoder(replace(FRESH, init="mean")).shared_means(0, 3) == {
        f"{name}.{kind}": tuple(f"{kv.format(layer)}.{kind}" for layer in (2, 3, 4, 5))
        for kind in ("weight", "bias")
    }


def test_projections_of_sources_apart_change_no_bit() -> None:
    models = [
        Decoder(replace(CONFIG, sharing=s), torch.Generator().manual_seed(0))
        for s in (KV, replace(KV, init="mean"))
    ]
    assert torch.equal(*(model(*batch()) for model in models))
    assert "layers.2.attention" in switchable(models[1]).keys() - switchable(models[0]).keys()


@pytest.mark.parametrize(("sharing", "unused", "used"), [(QK, "qk", "v"), (KV, "kv", "q")])
def test_only_the_projection_in_use_changes_logits(sharing: Sharing, unused: str, used: str) -> None:
    model, tokens = decoder(sharing), batch()[0]
    with torch.no_grad():
        before = model(tokens)
        model.get_parameter(f"layers.4.attention.{unused}.weight").mul_(1.5)
        assert torch.equal(model(tokens), before)
        model.get_parameter(f"layers.4.attention.{used}.weight").mul_(1.5)
        assert not torch.equal(model(tokens), before)


@pytest.mark.parametrize(
    "sharing",
    [QK, KV, FRESH, Sharing(source="0_1_0_1_4_0"), Sharing(source="interval:2"),
     replace(FRESH, targets=(), source="0_1_0_1_4_0")],
)  # fmt: skip
def test_a_sequence_in_pieces_is_the_sequence_for_every_region(sharing: Sharing) -> None:
    model, tokens = decoder(sharing), batch()[0]
    with torch.no_grad():
        every = len(sharing.targets_of(6))
        for count in (0, every) if sharing.kv_origin == "fresh" else range(every + 1):
            model.share(count)
            whole, past, done = model(tokens), None, 0
            for piece in (4, 1, 1, 3):
                logits, past = model.extend(tokens[done : done + piece], past)
                torch.testing.assert_close(logits, whole[done : done + piece], rtol=1e-10, atol=1e-12)
                done += piece


def test_a_shared_cache_is_not_held_twice() -> None:
    model, tokens = decoder(QK), batch()[0]
    with torch.no_grad():
        past = model.extend(tokens)[1].layers
    assert past[5].key is past[2].key
    assert past[5].value is not past[2].value
    with torch.no_grad():
        own, lent = (past := decoder(FRESH).extend(tokens)[1].layers)[2]
    assert past[5].key is past[3].key is lent.key
    assert not torch.equal(own.key, lent.key)


def test_bits_are_those_of_the_run_before() -> None:
    results = []
    for _ in range(2):
        model = Decoder(replace(CONFIG, sharing=QK), torch.Generator().manual_seed(0))
        model(*batch()).backward()
        results.append([p.grad for p in model.parameters() if p.grad is not None])
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


def test_several_passes_at_once_keep_apart() -> None:
    """Two forward passes before their backward passes, as with micro-batches that are delayed."""
    plain, model = alike(QK)
    hand_over(plain, [0, 1, 2, 2, 2, 2], "QK")
    (tokens, targets), half = batch(8), 4
    for one in (plain, model):
        losses = [one(t, y) for t, y in zip(tokens.split(half), targets.split(half), strict=True)]
        for loss in losses:
            loss.backward()
    for name, gradient in gradients_apart(plain, model).items():
        if (own := model.get_parameter(name).grad) is not None:
            torch.testing.assert_close(own, gradient, rtol=1e-10, atol=1e-13)


def test_flops_fall_with_every_layer_that_shares() -> None:
    for sharing, rows in ((QK, 2 * (6 + 2) * 8 * 48), (KV, 2 * 4 * 8 * 48)):
        model = decoder(sharing)
        flops = [(model.share(count), model.flops_per_token(100))[1] for count in range(4)]
        assert [before - after for before, after in pairwise(flops)] == [3.0 * rows] * 3


@pytest.mark.parametrize(
    ("sharing", "message"),
    [
        (Sharing(targets=(0, 1)), "model.sharing.targets has layer 0; they must ascend, from 1 to 5"),
        (Sharing(targets=(4, 3)), "model.sharing.targets has layer 4; they must ascend"),
        (Sharing(targets=(5, 6)), "model.sharing.targets has layer 6; they must ascend"),
        (Sharing(targets=(5,), source="interval:2"), "leave out sharing.targets"),
        (Sharing(source="interval:1"), "the interval must be at least 2"),
        (Sharing(source="0s_1_1"), "it must be region_predecessor, interval:N or one layer number"),
        (Sharing(source="0_0"), "model.sharing.source names 2 layers; model.layers is 6"),
        (Sharing(source="0_2_2_3_4_5"), "gives layer 1 layer 2, which is not one before it"),
        (Sharing(source="0_0_1_3_4_5"), "gives layer 2 layer 1, which is not one before it"),
        (Sharing(source="0_1_2_3_4_5"), "lets no layer share"),
        (Sharing(share="KV", deferred=True), "model.sharing.deferred is of QK alone"),
        (Sharing(kv_origin="fresh"), "model.sharing.kv_origin is fresh, a cache of keys and values"),
        (replace(FRESH, grad_to_source=False), "set grad_to_source, which trains it"),
    ],
)
def test_settings_that_do_not_fit_are_named(sharing: Sharing, message: str) -> None:
    with pytest.raises(UserError) as caught:
        replace(CONFIG, sharing=sharing).validate()
    assert message in str(caught.value)


def test_more_layers_than_there_are_cannot_share() -> None:
    with pytest.raises(UserError, match="4 layers cannot share: 0 to 3 can"):
        decoder(QK).share(4)
    with pytest.raises(UserError, match=r"made without model\.sharing"):
        decoder(None).share(1)
    with pytest.raises(UserError, match=r"model\.layers is 1; at least 2"):
        replace(CONFIG, layers=1, sharing=Sharing()).validate()


def test_a_model_on_the_meta_device_can_be_made() -> None:
    with torch.device("meta"):
        model = Decoder(replace(CONFIG, sharing=QK))
    assert all(parameter.is_meta for parameter in model.parameters())


def test_compiled_layers_are_compiled_once_for_each_part_they_can_play() -> None:
    model = Decoder(replace(CONFIG, sharing=Sharing(targets=(2, 3, 4, 5)), layers=6))
    counter = CompileCounter()
    for layer in model.layers:
        layer.forward = torch.compile(layer.forward, backend=counter)
    compiled = []
    for count in (0, 1, 2, 3, 4, 0, 4, 3, 2, 1):
        model.share(count)
        model(*batch()).backward()
        compiled.append(counter.frame_count)
    assert compiled[3] == compiled[2], "the region grew, and something was compiled"
    assert compiled[5:] == [compiled[5]] * 5
