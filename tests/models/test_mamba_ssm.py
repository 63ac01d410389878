"""Mamba-2 weights under mamba_ssm's names: its packing, there and back, and what does not fit."""

import pytest
import torch
from torch import Tensor

from flashtrain.errors import UserError
from flashtrain.models.mamba_ssm import from_mamba_ssm, to_mamba_ssm
from flashtrain.nn.ssm import Mamba2


def mixer(seed: int) -> Mamba2:
    torch.manual_seed(seed)
    return Mamba2(12, 4, 8, 6, groups=2)


def test_the_packed_weights_have_the_order_z_x_b_c_dt() -> None:
    layer = mixer(0)
    found = to_mamba_ssm(layer)
    shapes = {name: list(weight.shape) for name, weight in found.items()}
    assert shapes == {
        "in_proj.weight": [2 * 32 + 2 * 12 + 4, 12],
        "conv1d.weight": [32 + 2 * 12, 1, 4],
        "conv1d.bias": [32 + 2 * 12],
        "A_log": [4],
        "dt_bias": [4],
        "D": [4],
        "norm.weight": [32],
        "out_proj.weight": [12, 32],
    }
    for part, first, last in (("z", 0, 32), ("x", 32, 64), ("B", 64, 76), ("C", 76, 88), ("dt", 88, 92)):
        assert torch.equal(found["in_proj.weight"][first:last], layer.inputs[part])
    assert torch.equal(found["conv1d.weight"][32:44, 0], layer.conv_weight["B"])


def test_there_and_back_is_the_same_layer() -> None:
    one, other = mixer(0), mixer(1)
    from_mamba_ssm(other, to_mamba_ssm(one))
    x = torch.randn(5, 2, 12)
    assert torch.equal(one(x), other(x))


def test_what_does_not_fit_is_named() -> None:
    weights: dict[str, Tensor] = to_mamba_ssm(mixer(0))
    with pytest.raises(UserError, match=r"missing or unknown: \['D'\]$"):
        from_mamba_ssm(mixer(0), {name: w for name, w in weights.items() if name != "D"})
    with pytest.raises(UserError, match=r"^D is \[5\]; this mixer's is \[4\]$"):
        from_mamba_ssm(mixer(0), weights | {"D": torch.ones(5)})
