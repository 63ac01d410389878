"""Sampling from a decoder."""

import pytest
import torch

from flashtrain.errors import UserError
from flashtrain.models.decoder import Decoder
from flashtrain.models.generate import generate


@pytest.fixture(scope="module")
def model() -> Decoder:
    config = Decoder.Config(vocabulary=20, hidden=16, layers=1, heads=2, kv_heads=1, mlp_width=64)
    return Decoder(config, torch.Generator().manual_seed(0))


def test_temperature_zero_takes_the_most_likely_token_of_the_last_window(model: Decoder) -> None:
    prompt, context = [3, 1, 4, 1, 5], 3
    wanted = list(prompt)
    for _ in range(6):
        window = torch.tensor(wanted[-context:]).unsqueeze(1)
        wanted.append(int(model(window)[-1, 0].argmax()))
    assert generate(model, prompt, 6, context=context, temperature=0, seed=0) == wanted[len(prompt) :]
    assert generate(model, [9, *prompt], 6, context=context, temperature=0, seed=7) == wanted[len(prompt) :]


def test_draws_are_a_function_of_the_seed_alone(model: Decoder) -> None:
    torch.manual_seed(0)
    first = generate(model, [1], 30, context=8, temperature=1.0, seed=5)
    torch.manual_seed(1)
    assert generate(model, [1], 30, context=8, temperature=1.0, seed=5) == first
    assert generate(model, [1], 30, context=8, temperature=1.0, seed=6) != first
    assert len(first) == 30


def test_nothing_asked_for_is_nothing(model: Decoder) -> None:
    assert generate(model, [1], 0, context=8, temperature=1.0, seed=0) == []


def test_tokens_that_only_the_model_has_are_not_drawn(model: Decoder) -> None:
    drawn = generate(model, [1], 60, context=8, temperature=1.0, seed=5)
    assert max(drawn) > 4, "or this shows nothing"
    assert max(generate(model, [1], 60, context=8, temperature=1.0, seed=5, vocabulary=4)) < 4


def test_weights_that_are_not_finite_are_told(model: Decoder) -> None:
    broken = Decoder(model.config)
    broken.norm.weight.data.fill_(torch.nan)
    with pytest.raises(UserError, match="weights are not finite"):
        generate(broken, [1], 1, context=8, temperature=1.0, seed=5)


@pytest.mark.parametrize(
    ("prompt", "count", "context", "temperature", "seed"),
    [
        ([], 1, 8, 1.0, 0),
        ([1], -1, 8, 1.0, 0),
        ([1], 1, 0, 1.0, 0),
        ([1], 1, 8, -0.1, 0),
        ([1], 1, 8, float("nan"), 0),
        ([1], 1, 8, 1.0, 2**64),
    ],
)
def test_bad_settings_are_refused(
    model: Decoder, prompt: list[int], count: int, context: int, temperature: float, seed: int
) -> None:
    with pytest.raises(UserError):
        generate(model, prompt, count, context=context, temperature=temperature, seed=seed)
