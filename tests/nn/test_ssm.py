"""The Mamba-2 mixer: its recurrence, its decoding, its pieces, its counts."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import conv1d, pad, rms_norm, silu, softplus

from flashtrain.errors import UserError
from flashtrain.nn.ssm import Mamba2, MixerState
from tests.nn.pieces import assert_two_pieces_equal_one

HIDDEN, HEADS, WIDTH, STATES = 24, 4, 8, 6


def mixer(groups: int = 2, dtype: torch.dtype = torch.float64) -> Mamba2:
    torch.manual_seed(0)
    layer = Mamba2(HIDDEN, HEADS, WIDTH, STATES, groups=groups)
    with torch.no_grad():
        for parameter in layer.parameters():  # those that start as ones and zeros too
            parameter.add_(0.1 * torch.randn_like(parameter))
    return layer.to(dtype)


def tokens(sequence: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(sequence, 3, HIDDEN, generator=torch.Generator().manual_seed(1), dtype=dtype)


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_layer_equals_the_equations_written_out(groups: int) -> None:
    layer, x = mixer(groups), tokens(7)
    inner, shared = HEADS * WIDTH, groups * STATES
    packed = x @ layer.packed().t()
    z, mixed, dt = packed.split([inner, inner + 2 * shared, HEADS], dim=-1)
    columns = pad(mixed.permute(1, 2, 0), (3, 0))
    weight, bias = (torch.cat([of[part] for part in "xBC"]) for of in (layer.conv_weight, layer.conv_bias))
    convolved = conv1d(columns, weight.unsqueeze(1), bias, groups=mixed.shape[-1])
    values, keys, queries = silu(convolved.permute(2, 0, 1)).split([inner, shared, shared], dim=-1)
    step = softplus(dt + layer.step_bias)
    state = torch.zeros(3, HEADS, WIDTH, STATES, dtype=torch.float64)
    rows = []
    for t in range(7):
        value = values[t].view(3, HEADS, WIDTH)
        key, query = (
            m[t].view(3, groups, 1, STATES).expand(3, groups, HEADS // groups, STATES)
            for m in (keys, queries)
        )
        decay = (-layer.log_rate.exp() * step[t]).exp()
        write = torch.einsum("bhp,bhn->bhpn", value * step[t].unsqueeze(-1), key.flatten(1, 2))
        state = state * decay[..., None, None] + write
        y = torch.einsum("bhpn,bhn->bhp", state, query.flatten(1, 2)) + layer.skip[:, None] * value
        gated = (y.flatten(1) * silu(z[t])).view(3, groups, -1)
        normed = rms_norm(gated, gated.shape[-1:], eps=layer.norm_epsilon).flatten(1)
        rows.append((normed * layer.norm_weight) @ layer.out.weight.t())
    torch.testing.assert_close(layer(x), torch.stack(rows))


def test_no_output_depends_on_a_later_token() -> None:
    layer, x = mixer(), tokens(9)
    other = x.clone()
    other[5:] += 1
    assert torch.equal(layer(x)[:5], layer(other)[:5])
    assert not torch.equal(layer(x)[5], layer(other)[5])


@pytest.mark.parametrize("prompt", [0, 1, 2, 6])
def test_decoding_equals_the_full_forward_and_so_does_its_state(prompt: int) -> None:
    layer, x = mixer(), tokens(9)
    with torch.inference_mode():
        whole, after = layer.extend(x, None)
        state = layer.extend(x[:prompt], None)[1] if prompt else layer.empty_state(3)
        for t in range(prompt, 9):
            row, state = layer.step(x[t], state)
            torch.testing.assert_close(row, whole[t])
    for found, true in zip(state, after, strict=True):
        torch.testing.assert_close(found, true)


@pytest.mark.parametrize("cut", [1, 2, 5, 8])
def test_two_pieces_equal_one_with_every_gradient(cut: int) -> None:
    assert_two_pieces_equal_one(mixer(), tokens(9), cut)


def test_an_empty_state_is_no_state() -> None:
    layer, x = mixer(), tokens(5)
    torch.testing.assert_close(layer.extend(x, layer.empty_state(3))[0], layer(x))


def test_state_has_a_fixed_size_and_is_wide() -> None:
    layer = mixer(dtype=torch.bfloat16)
    for length in (1, 2, 30):
        state = layer.extend(tokens(length, torch.bfloat16), None)[1]
        assert isinstance(state, MixerState)
        assert [list(t.shape) for t in state] == [[3, 3, 56], [3, HEADS, WIDTH, STATES]]
        assert [t.dtype for t in state] == [torch.bfloat16, torch.float32]
        assert [t.dtype for t in layer.empty_state(3)] == [t.dtype for t in state]


def test_initial_values_are_those_of_the_paper_and_of_the_generator_alone() -> None:
    layers = [Mamba2(HIDDEN, 64, WIDTH, STATES, generator=torch.Generator().manual_seed(5)) for _ in range(2)]
    for name in ("inputs.z", "conv_weight.x", "log_rate", "step_bias"):
        assert torch.equal(*(layer.get_parameter(name) for layer in layers))
    assert bool(((layers[0].log_rate.exp() >= 1) & (layers[0].log_rate.exp() <= 16)).all())
    steps = softplus(layers[0].step_bias)
    assert bool(((steps > 0.999e-3) & (steps < 1.001e-1)).all())
    assert steps.std() > 0.01


def test_a_small_mixer_learns_to_copy_the_token_before() -> None:
    torch.manual_seed(0)
    layer = Mamba2(16, 2, 16, 16)
    embedding, head = nn.Embedding(8, 16), nn.Linear(16, 8)
    parameters = [*layer.parameters(), *embedding.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=1e-2)
    for _ in range(60):
        text = torch.randint(8, (16, 16))
        logits = head(layer(embedding(text)))[1:]
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), text[:-1].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.1, loss.item()


@pytest.mark.parametrize(
    ("groups", "chunk", "projections", "recurrence", "kilobytes"),
    [(1, 256, 51.6, 4.26, 42), (1, 128, 51.6, 3.18, 58), (8, 256, 59.0, 4.72, 45)],
)
def test_counts_are_those_of_the_specification(
    groups: int, chunk: int, projections: float, recurrence: float, kilobytes: float
) -> None:
    with torch.device("meta"):
        layer = Mamba2(2048, 64, 64, 128, groups=groups)
    matrices = 2e-6 * (layer.packed().numel() + layer.out.weight.numel())
    assert matrices == pytest.approx(projections, abs=0.05)
    assert layer.flops_per_token(4096, chunk) * 1e-6 - matrices == pytest.approx(recurrence, abs=0.005)
    assert layer.bytes_per_token(chunk) * 1e-3 == pytest.approx(kilobytes, abs=0.6)


def test_flops_agree_with_the_products_that_run() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    layer, chunk = mixer(1), 64
    with FlopCounterMode(display=False) as counter:
        layer(tokens(2 * chunk))
    assert counter.get_total_flops() == pytest.approx(
        3 * 2 * chunk * layer.flops_per_token(4096, chunk), rel=0.15
    )


@pytest.mark.parametrize("sizes", [{"groups": 3}, {"states": 0}, {"taps": 0}])
def test_sizes_that_do_not_fit_are_refused(sizes: dict[str, int]) -> None:
    with pytest.raises(UserError, match="groups must divide heads"):
        Mamba2(**{"hidden": 8, "heads": 4, "head_dim": 2, "states": 4} | sizes)
