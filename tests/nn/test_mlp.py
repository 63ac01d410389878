"""SwiGLU on one packed weight."""

import pytest
import torch
from torch.nn.functional import silu

from flashtrain.nn.mlp import PACKING, SwiGLU


def layer(width: int) -> SwiGLU:
    torch.manual_seed(0)
    return SwiGLU(12, width).double()


@pytest.mark.parametrize("width", [PACKING, 3 * PACKING])
def test_packed_layer_equals_the_unpacked_formula(width: int) -> None:
    mlp = layer(width)
    blocks = mlp.gate_up.weight.view(-1, 2, PACKING, 12)
    gate, up = blocks[:, 0].flatten(0, 1), blocks[:, 1].flatten(0, 1)
    x = torch.randn(4, 2, 12, dtype=torch.float64)
    wanted = (silu(x @ gate.t()) * (x @ up.t())) @ mlp.down.weight.t()
    torch.testing.assert_close(mlp(x), wanted)
    torch.testing.assert_close(mlp(x.flatten(0, 1)), wanted.flatten(0, 1))


def test_contiguous_cuts_hold_matching_rows_of_gate_and_up() -> None:
    mlp, x = layer(4 * PACKING), torch.randn(3, 12, dtype=torch.float64)
    total = torch.zeros_like(x)
    for gate_up, down in zip(mlp.gate_up.weight.chunk(2), mlp.down.weight.chunk(2, dim=1), strict=True):
        piece = layer(2 * PACKING)
        with torch.no_grad():
            piece.gate_up.weight.copy_(gate_up)
            piece.down.weight.copy_(down)
        total = total + piece(x)
    torch.testing.assert_close(total, mlp(x))
