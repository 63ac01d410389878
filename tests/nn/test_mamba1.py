"""The Mamba-1 mixer: its scan token by token, its pieces, its counts."""

import pytest
import torch
from torch import Tensor
from torch.nn.functional import rms_norm, silu, softplus

from flashtrain.errors import UserError
from flashtrain.nn.mamba1 import Mamba1, scan
from tests.nn.pieces import assert_two_pieces_equal_one

HIDDEN, INNER, STATES, RANK = 12, 16, 5, 3


def mixer() -> Mamba1:
    torch.manual_seed(0)
    layer = Mamba1(HIDDEN, INNER, STATES, RANK)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return layer.double()


def tokens(sequence: int) -> Tensor:
    return torch.randn(sequence, 2, HIDDEN, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def test_layer_equals_the_equations_written_out() -> None:
    layer, x = mixer(), tokens(6)
    values, z = (x @ layer.inputs[part].t() for part in "xz")
    padded = torch.cat([torch.zeros(3, 2, INNER, dtype=torch.float64), values])
    convolved = sum(padded[tap : tap + 6] * layer.conv_weight[:, tap] for tap in range(4))
    u = silu(convolved + layer.conv_bias)
    dt, keys, queries = (u @ layer.select.weight.t()).split([RANK, STATES, STATES], dim=-1)
    dt = rms_norm(dt, (RANK,), layer.step_norm.weight, 1e-5)
    keys = rms_norm(keys, (STATES,), layer.key_norm.weight, 1e-5)
    queries = rms_norm(queries, (STATES,), layer.query_norm.weight, 1e-5)
    step = softplus(dt @ layer.step_weight.t() + layer.step_bias)
    rate = -layer.log_rate.exp().view(INNER, STATES)
    state, rows = torch.zeros(2, INNER, STATES, dtype=torch.float64), []
    for t in range(6):
        write = (step[t] * u[t]).unsqueeze(-1) * keys[t].unsqueeze(1)
        state = (step[t].unsqueeze(-1) * rate).exp() * state + write
        y = (state * queries[t].unsqueeze(1)).sum(-1) + layer.skip * u[t]
        rows.append((y * silu(z[t])) @ layer.out.weight.t())
    torch.testing.assert_close(layer(x), torch.stack(rows))


@pytest.mark.parametrize("sequence", [1, 2, 3, 8, 10, 17])
def test_the_chunked_scan_is_the_recurrence_with_its_gradients(sequence: int) -> None:
    draw = torch.Generator().manual_seed(sequence)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw, dtype=torch.float64).requires_grad_()

    given = [random(2, sequence, 3), random(2, sequence, 3), random(3, 4)]
    given += [random(2, sequence, 4), random(2, sequence, 4), random(2, 3, 4)]
    x, steps, rate, keys, queries, state = given
    positive, negative = steps.abs(), -rate.abs()
    true, rows = state, []
    for t in range(sequence):
        write = (positive[:, t] * x[:, t]).unsqueeze(-1) * keys[:, t].unsqueeze(1)
        true = (positive[:, t].unsqueeze(-1) * negative).exp() * true + write
        rows.append((true * queries[:, t].unsqueeze(1)).sum(-1))
    whole = (torch.stack(rows, dim=1), true)
    found = scan(x, positive, negative, keys, queries, state)
    slopes = [torch.randn_like(t) for t in whole]
    for one, other in zip(found, whole, strict=True):
        torch.testing.assert_close(one, other)
    pairs = (torch.autograd.grad(outputs, given, slopes, retain_graph=True) for outputs in (found, whole))
    for one, other in zip(*pairs, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("cut", [1, 2, 5, 8])
def test_two_pieces_equal_one_with_every_gradient(cut: int) -> None:
    assert_two_pieces_equal_one(mixer(), tokens(9), cut)


def test_channels_must_divide_among_tensor_ranks() -> None:
    Mamba1.Config().validate("model.layout.ssm", 64, 2)
    with pytest.raises(
        UserError, match=r"^model\.layout\.ssm has 128 channels; parallel\.tensor 3 must divide"
    ):
        Mamba1.Config().validate("model.layout.ssm", 64, 3)


def test_flops_are_those_of_the_specification() -> None:
    with torch.device("meta"):
        layer = Mamba1.Config().build(768, 1e-5)
    d, inner, rank, states = 768, 1536, 48, 16
    formula = 6 * d * inner + 2 * inner * (rank + 2 * states) + 2 * rank * inner + 8 * inner
    assert layer.flops_per_token(1024) == formula + 9 * inner * states
