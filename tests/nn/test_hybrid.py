"""Blocks one after the other by a pattern, and heads side by side."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from flashtrain import config as configs
from flashtrain.errors import UserError
from flashtrain.models.decoder import Decoder
from flashtrain.models.generate import generate
from flashtrain.models.hf import config_to_hf, weights
from flashtrain.nn.flowhn import FlowHN
from flashtrain.nn.hybrid import ParallelHeads, Pattern
from flashtrain.nn.mamba1 import Mamba1
from flashtrain.nn.ssm import Mamba2

CONFIG = Decoder.Config(vocabulary=50, hidden=48, layers=4, heads=6, kv_heads=2, mlp_width=128)
SSM = Mamba2.Config(head_dim=16, states=8)
LAYOUTS = [
    Pattern.Config(pattern="M - * -", ssm=SSM),
    Pattern.Config(pattern="MM*-", ssm=Mamba1.Config(states=4), positions=False),
    ParallelHeads.Config(ssm=SSM, attention_multiplier=0.5, ssm_multiplier=2.0),
    ParallelHeads.Config(ssm=SSM, join="concat"),
    FlowHN.Config(ssm=SSM, length=16, align=1),
]


def decoder(layout: Any, **changes: Any) -> Decoder:
    return Decoder(replace(CONFIG, layout=layout, **changes), torch.Generator().manual_seed(0))


def tokens(sequence: int) -> Tensor:
    return torch.randint(0, 50, (sequence, 2), generator=torch.Generator().manual_seed(0))


def test_a_pattern_has_one_mixer_a_block_around_the_residual() -> None:
    model = decoder(LAYOUTS[0]).double()
    assert [layer.kind for layer in model.layers] == ["ssm", "mlp", "attention", "mlp"]
    x, rotary = torch.randn(5, 2, 48, dtype=torch.float64), model._rotary(tokens(5))
    ssm, mlp, attention, _ = model.layers
    torch.testing.assert_close(ssm(x, rotary), x + ssm.ssm(ssm.norm(x)))
    torch.testing.assert_close(mlp(x, rotary), x + mlp.mlp(mlp.norm(x)))
    torch.testing.assert_close(
        attention(x, rotary), x + attention.attention(attention.norm(x), rotary.double())
    )
    assert [layer.kind for layer in decoder(Pattern.Config(pattern="M*", ssm=SSM)).layers] == [
        "ssm",
        "attention",
    ] * 2


@pytest.mark.parametrize("layout", LAYOUTS[2:4])
def test_parallel_heads_read_the_same_tokens(layout: ParallelHeads.Config) -> None:
    model = decoder(layout).double()
    block, x, rotary = model.layers[0], torch.randn(5, 2, 48, dtype=torch.float64), model._rotary(tokens(5))
    normed = block.norm(x)
    ssm = layout.ssm_multiplier * block.ssm(normed)
    attention = layout.attention_multiplier * block.attention(normed, rotary)
    both = ssm + attention if layout.join == "add" else block.join(torch.cat([ssm, attention], dim=-1))
    y = x + both
    torch.testing.assert_close(block(x, rotary), y + block.mlp(block.mlp_norm(y)))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_tokens_in_pieces_give_the_logits_of_the_whole(layout: Any) -> None:
    model, given = decoder(layout).double(), tokens(11)
    with torch.no_grad():
        first, past = model.extend(given[:4])
        second, past = model.extend(given[4:5], past)
        third, past = model.extend(given[5:], past)
        torch.testing.assert_close(torch.cat([first, second, third]), model(given), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_token_changes_no_logits_before_it(layout: Any) -> None:
    model, given = decoder(layout), tokens(12)
    with torch.no_grad():
        before = model(given)
        for position in (0, 5, 11):
            changed = given.clone()
            changed[position, 1] = (changed[position, 1] + 1) % 50
            moved = (model(changed) != before).any(dim=-1)
            assert not moved[:, 0].any()
            assert not moved[:position, 1].any()
            assert moved[position, 1]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_parameters_depend_on_the_generator_alone(layout: Any) -> None:
    torch.manual_seed(1)
    first = decoder(layout)
    torch.manual_seed(2)
    for (name, one), other in zip(first.named_parameters(), decoder(layout).parameters(), strict=True):
        assert torch.equal(one, other), name
        assert one.isfinite().all()


def test_every_block_counts_its_flops() -> None:
    model = decoder(LAYOUTS[0])
    ssm, _, attention, _ = model.layers
    norm = 2 * 48
    wanted = (
        ssm.ssm.flops_per_token(64) + attention.attention.flops_per_token(64) + 2 * 6 * 48 * 128 + 4 * norm
    )
    assert model.flops_per_token(64) == 3 * (wanted + norm + 2 * 48 * 50)


def test_text_is_sampled_from_a_hybrid_and_refused_where_windows_are_unknown() -> None:
    settings = {"context": 16, "temperature": 0.0, "seed": 0}
    assert len(generate(decoder(LAYOUTS[4]), [1, 2, 3], 20, **settings)) == 20
    with pytest.raises(UserError, match=r"set model\.layout\.length$"):
        generate(decoder(FlowHN.Config(ssm=SSM, align=1)), [1, 2, 3], 5, **settings)


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        (
            Pattern.Config(pattern="MG*-", ssm=SSM),
            "model.layout.pattern has 'G'; its letters are M (ssm), * (attention), - (mlp)",
        ),
        (
            Pattern.Config(pattern="M*-", ssm=SSM),
            "model.layout.pattern has 3 letters; they must divide model.layers 4",
        ),
        (
            Pattern.Config(pattern=" ", ssm=SSM),
            "model.layout.pattern has 0 letters; they must divide model.layers 4",
        ),
        (
            ParallelHeads.Config(ssm=Mamba2.Config(head_dim=16, groups=4)),
            "model.layout.ssm has 6 heads; model.layout.ssm.groups 4 must divide them",
        ),
        (
            ParallelHeads.Config(ssm=Mamba2.Config(states=0)),
            "model.layout.ssm.states is 0; it must be at least 1",
        ),
    ],
)
def test_settings_that_do_not_fit_are_named(layout: Any, message: str) -> None:
    with pytest.raises(UserError) as caught:
        replace(CONFIG, layout=layout).validate()
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("ssm", "degree", "message"),
    [
        (SSM, 4, "model.layout.ssm has 6 heads; parallel.tensor 4 must divide them"),
        (
            SSM,
            2,
            "model.layout.ssm norms over 1 groups; parallel.tensor 2 must divide them: set "
            "model.layout.ssm.norm_groups",
        ),
        (
            Mamba2.Config(head_dim=8, groups=3, norm_groups=2),
            2,
            "model.layout.ssm.groups is 3; it must divide parallel.tensor 2, or be divided by it",
        ),
    ],
)
def test_a_tensor_degree_that_does_not_divide_is_named(ssm: Any, degree: int, message: str) -> None:
    config = replace(CONFIG, layout=Pattern.Config(ssm=ssm, pattern="M"))
    config.validate()
    with pytest.raises(UserError) as caught:
        config.validate(degree)
    assert str(caught.value) == message


@pytest.mark.parametrize("layout", [*LAYOUTS, FlowHN.Config(f=0.59, ssm=Mamba1.Config())])
def test_settings_survive_the_way_through_a_file(layout: Any, tmp_path: Path) -> None:
    config = replace(CONFIG, layout=layout)
    configs.save(config, tmp_path / "config.toml")
    assert configs.resolve(Decoder.Config(), tmp_path / "config.toml") == config


def test_a_layout_is_chosen_by_its_class() -> None:
    words = (
        "--layout.class FlowHN.Config --layout.ssm.class Mamba1.Config --layout.f 0.5 --layout.ssm.states 8"
    )
    layout = FlowHN.Config(ssm=Mamba1.Config(states=8), f=0.5)
    assert configs.resolve(CONFIG, overrides=words.split()) == replace(CONFIG, layout=layout)


def test_a_hybrid_is_not_converted() -> None:
    with pytest.raises(UserError, match=r"^model\.layout is a Pattern\.Config; only models without one"):
        config_to_hf(replace(CONFIG, layout=LAYOUTS[0]), "float32", 64, {})
    with pytest.raises(UserError, match=r"^model\.layout is a Pattern\.Config; only models without one"):
        weights(replace(CONFIG, layout=LAYOUTS[0]))
