"""The decoder: what follows from its definition, whatever its weights."""

import dataclasses
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor

from flashtrain.errors import UserError
from flashtrain.models.decoder import Decoder
from flashtrain.nn.flowhn import FlowHN
from flashtrain.nn.hybrid import Pattern
from flashtrain.nn.mamba1 import Mamba1
from flashtrain.nn.rotary import Llama3Scaling
from flashtrain.nn.sharing import Sharing
from flashtrain.nn.ssm import Mamba2

SSM = Mamba2.Config(head_dim=16, states=8)
CONFIG = Decoder.Config(vocabulary=50, hidden=48, layers=2, heads=6, kv_heads=2, mlp_width=128)


def decoder(config: Decoder.Config = CONFIG, seed: int = 0) -> Decoder:
    return Decoder(config, torch.Generator().manual_seed(seed))


def outline(config: Decoder.Config) -> Decoder:
    with torch.device("meta"):
        return Decoder(config)


def tokens(sequence: int, batch: int, seed: int = 0) -> Tensor:
    return torch.randint(
        0, CONFIG.vocabulary, (sequence, batch), generator=torch.Generator().manual_seed(seed)
    )


def test_a_token_changes_no_logits_before_it_and_all_after_it() -> None:
    model, given = decoder(), tokens(12, 2)
    with torch.no_grad():
        before = model(given)
        for position in (0, 5, 11):
            changed = given.clone()
            changed[position, 1] = (changed[position, 1] + 1) % CONFIG.vocabulary
            moved = (model(changed) != before).any(dim=-1)
            assert not moved[:, 0].any(), "another sequence of the batch noticed"
            assert not moved[:position, 1].any(), "an earlier position noticed"
            assert moved[position:, 1].all(), "a later position did not notice"


def test_logits_of_a_prefix_are_those_of_the_whole() -> None:
    model, given = decoder().double(), tokens(9, 2)
    with torch.no_grad():
        torch.testing.assert_close(model(given[:5]), model(given)[:5], rtol=1e-6, atol=1e-9)


def test_tokens_in_pieces_give_the_logits_of_the_whole() -> None:
    model, given = decoder().double(), tokens(9, 2)
    with torch.no_grad():
        first, past = model.extend(given[:4])
        second, past = model.extend(given[4:5], past)
        third, past = model.extend(given[5:], past)
        assert past.tokens == 9
        torch.testing.assert_close(torch.cat([first, second, third]), model(given), rtol=1e-6, atol=1e-9)


def test_loss_is_the_cross_entropy_of_the_logits() -> None:
    model, given, targets = decoder(), tokens(7, 3), tokens(7, 3, seed=1)
    logits = model(given)
    assert logits.shape == (7, 3, CONFIG.vocabulary)
    wanted = -logits.double().log_softmax(-1).gather(-1, targets.unsqueeze(-1)).mean()
    torch.testing.assert_close(model(given, targets).double(), wanted, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    "config",
    [CONFIG, dataclasses.replace(CONFIG, kv_heads=6), dataclasses.replace(CONFIG, layers=5, mlp_width=64)],
)
def test_parameter_count_is_the_formula(config: Decoder.Config) -> None:
    attention = config.hidden * config.head_dim * (2 * config.heads + 2 * config.kv_heads)
    mlp = 3 * config.hidden * config.mlp_width
    norms = (2 * config.layers + 1) * config.hidden
    embedding = config.vocabulary * config.hidden
    without = config.layers * (attention + mlp) + norms + embedding
    assert decoder(config).parameter_count() == without + embedding
    assert decoder(config).parameter_count(embedding=False) == without


def test_tied_embeddings_are_one_parameter_that_counts_as_the_projection() -> None:
    untied, tied = decoder(), decoder(dataclasses.replace(CONFIG, tied_embeddings=True))
    assert tied.head.weight is tied.embedding.weight
    assert tied.parameter_count() == untied.parameter_count(embedding=False)
    assert tied.parameter_count(embedding=False) == tied.parameter_count()


def test_biases_are_of_the_qkv_projection_alone_and_start_at_zero() -> None:
    biases = {n: p for n, p in decoder(dataclasses.replace(CONFIG, qkv_bias=True)).named_parameters()
              if n.endswith("bias")}  # fmt: skip
    assert list(biases) == [f"layers.{i}.attention.qkv.bias" for i in range(CONFIG.layers)]
    assert not any(bias.any() for bias in biases.values())


def test_parameters_depend_on_the_generator_alone() -> None:
    torch.manual_seed(1)
    first = decoder()
    torch.manual_seed(2)
    torch.randn(3)
    second, other = decoder(), decoder(seed=1)
    for name, parameter in first.named_parameters():
        assert torch.equal(parameter, second.get_parameter(name)), name
        if parameter.dim() == 2:
            assert not torch.equal(parameter, other.get_parameter(name)), name


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"tied_embeddings": True, "qkv_bias": True},
        {"sharing": Sharing(share="KV", kv_origin="fresh")},
        {"layout": Pattern.Config(pattern="M*-M", ssm=SSM), "layers": 4},
        {"layout": Pattern.Config(pattern="*M-", ssm=Mamba1.Config(states=4), positions=False), "layers": 3},
        {"layout": FlowHN.Config(ssm=SSM, length=16, align=1)},
    ],
)
def test_a_model_drawn_in_parts_is_the_model(change: dict[str, Any]) -> None:
    config = dataclasses.replace(CONFIG, **change)
    whole, generators = dict(decoder(config).named_parameters()), [torch.Generator() for _ in range(2)]
    parts = dict(outline(config).drawn(generators[0].manual_seed(0)))
    assert parts.keys() == whole.keys()
    assert all(torch.equal(part, whole[name]) for name, part in parts.items())
    Decoder(config, generators[1].manual_seed(0))
    assert torch.equal(*(generator.get_state() for generator in generators))


def test_a_model_drawn_in_parts_is_in_memory_a_block_at_a_time() -> None:
    seen: list[weakref.ref[Tensor]] = []
    most = 0
    for _, part in outline(dataclasses.replace(CONFIG, layers=6)).drawn(torch.Generator()):
        seen.append(weakref.ref(part))
        most = max(most, sum(one() is not None for one in seen))
    assert most <= len(dict(decoder().layers[0].named_parameters())) < len(seen) / 6


def test_projections_to_the_residual_stream_start_smaller() -> None:
    model = decoder(dataclasses.replace(CONFIG, layers=8))
    for layer in model.layers:
        inward = layer.attention.qkv.weight, layer.mlp.gate_up.weight
        outward = layer.attention.out.weight, layer.mlp.down.weight
        for wide, narrow in zip(inward, outward, strict=True):
            assert (wide.std() / narrow.std()).item() == pytest.approx(4.0, rel=0.1)  # sqrt(2 · 8 layers)


def test_a_model_on_the_meta_device_takes_no_memory_and_no_draws() -> None:
    generator = torch.Generator().manual_seed(0)
    before = generator.get_state()
    with torch.device("meta"):
        model = Decoder(CONFIG, generator)
    assert all(parameter.is_meta for parameter in model.parameters())
    assert torch.equal(generator.get_state(), before)
    assert model.parameter_count() == decoder().parameter_count()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vocabulary": 0}, "model.vocabulary is 0; it must be at least 1 and below 2**31"),
        ({"layers": 2**70}, f"model.layers is {2**70}; it must be at least 1 and below 2**31"),
        ({"heads": -1}, "model.heads is -1; it must be at least 1 and below 2**31"),
        ({"heads": 5, "kv_heads": 5}, "model.hidden is 48; model.heads 5 must divide it"),
        ({"kv_heads": 4}, "model.heads is 6; model.kv_heads 4 must divide it"),
        ({"mlp_width": 100}, "model.mlp_width is 100; the packing of gate and up rows, 64 must divide it"),
        ({"rope_theta": 0.0}, "model.rope_theta is 0.0; it must be above 0"),
        (
            {"rope_scaling": Llama3Scaling(factor=-1.0)},
            "model.rope_scaling.factor is -1.0; it must be above 0",
        ),
        (
            {"rope_scaling": Llama3Scaling(high_freq_factor=0.5)},
            "model.rope_scaling.low_freq_factor is 1.0; it must be below high_freq_factor 0.5",
        ),
        ({"hidden": 54, "heads": 6}, "model.hidden / model.heads is 9; rotary positions need it even"),
    ],
)
def test_sizes_that_do_not_fit_are_named(change: dict[str, Any], message: str) -> None:
    config = dataclasses.replace(CONFIG, **change)
    with pytest.raises(UserError) as caught:
        config.validate()
    assert str(caught.value) == message
    with pytest.raises(UserError):
        Decoder(config)


@pytest.mark.parametrize(
    ("change", "degree", "name"),
    [
        ({}, 3, "model.kv_heads is 2"),
        ({"kv_heads": 6, "vocabulary": 51, "mlp_width": 192}, 2, "model.vocabulary is 51"),
        ({"mlp_width": 64}, 2, "model.mlp_width / 64 is 1"),
    ],
)
def test_a_tensor_degree_that_does_not_divide_is_named(
    change: dict[str, int], degree: int, name: str
) -> None:
    config = dataclasses.replace(CONFIG, **change)
    config.validate()
    with pytest.raises(UserError, match=rf"^{name}; parallel\.tensor {degree} must divide it$"):
        config.validate(degree)
