"""Hybrid decoders on a GPU against fp64 on the CPU: the loss and every gradient, in bf16 and fp32."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from flashtrain.models.decoder import Decoder
from flashtrain.nn.flowhn import FlowHN
from flashtrain.nn.hybrid import ParallelHeads, Pattern
from flashtrain.nn.mamba1 import Mamba1
from flashtrain.nn.ssm import Mamba2

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]
CONFIG = Decoder.Config(hidden=128, layers=3, heads=4, kv_heads=2, mlp_width=256)
SSM = Mamba2.Config(head_dim=64, states=64, groups=2)
LAYOUTS: dict[str, Any] = {
    "pattern": Pattern.Config(pattern="M*-", ssm=SSM),
    "parallel": ParallelHeads.Config(ssm=SSM, join="concat"),
    "circulating": FlowHN.Config(ssm=SSM, align=1, f=0.45),
    "mixers": FlowHN.Config(ssm=SSM, align=128, ffn="none"),
    "mamba1": FlowHN.Config(ssm=Mamba1.Config(), align=128, ffn="shared"),
}
# Roundings of bf16 add up over three blocks; sums of a few that cancel, as in the skip, show them most.
BOUNDS = {torch.float32: 2e-4, torch.bfloat16: 0.25}


def gradients(model: Decoder, tokens: Tensor, targets: Tensor) -> dict[str, Tensor]:
    loss = model(tokens, targets)
    loss.backward()
    return {"loss": loss.detach()} | {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("dtype", list(BOUNDS))
@pytest.mark.parametrize("layout", list(LAYOUTS))
def test_loss_and_gradients_are_those_of_fp64(layout: str, dtype: torch.dtype) -> None:
    config = replace(CONFIG, layout=LAYOUTS[layout])
    model = Decoder(config, torch.Generator().manual_seed(0)).to(dtype)
    length = 384 if LAYOUTS[layout].__class__ is FlowHN.Config else 333
    drawn = torch.randint(0, 256, (2, length, 2), generator=torch.Generator().manual_seed(1))
    wide = Decoder(config).double()
    wide.load_state_dict(model.state_dict())
    true = gradients(wide, *drawn)
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    found = gradients(model.cuda(), *drawn.cuda())
    torch.use_deterministic_algorithms(False)
    for name, one in found.items():
        assert one.isfinite().all(), name
        error = float((one.double().cpu() - true[name]).norm() / true[name].norm())
        assert error < BOUNDS[dtype], (name, error)
