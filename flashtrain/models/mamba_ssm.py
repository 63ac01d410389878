"""Weights of a Mamba-2 mixer under the names and in the packing of mamba_ssm, both ways.

There ``in_proj`` is one weight with the rows of z, x, B, C and dt, and the convolution one over x, B and C;
Megatron's ``MambaMixer`` has the same order (on one tensor rank). Rows keep their order inside each part.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from flashtrain.errors import UserError
from flashtrain.nn.ssm import Mamba2

_NAMES = {
    "A_log": ("log_rate",),
    "dt_bias": ("step_bias",),
    "D": ("skip",),
    "norm.weight": ("norm_weight",),
    "out_proj.weight": ("out.weight",),
    "in_proj.weight": tuple(f"inputs.{part}" for part in ("z", "x", "B", "C", "dt")),
    "conv1d.weight": tuple(f"conv_weight.{part}" for part in ("x", "B", "C")),
    "conv1d.bias": tuple(f"conv_bias.{part}" for part in ("x", "B", "C")),
}


def to_mamba_ssm(mixer: Mamba2) -> dict[str, Tensor]:
    """The weights of ``mixer``, copied, by mamba_ssm's names."""
    found = {
        theirs: torch.cat([mixer.get_parameter(name).detach() for name in ours])
        for theirs, ours in _NAMES.items()
    }
    found["conv1d.weight"] = found["conv1d.weight"].unsqueeze(1)
    return found


@torch.no_grad()
def from_mamba_ssm(mixer: Mamba2, weights: Mapping[str, Tensor]) -> None:
    """Copy ``weights``, by mamba_ssm's names, into ``mixer``. Raises UserError for one that does not fit."""
    if differing := set(weights) ^ set(_NAMES):
        raise UserError(f"a Mamba-2 mixer has {', '.join(_NAMES)}; missing or unknown: {sorted(differing)}")
    for theirs, like in to_mamba_ssm(mixer).items():
        if weights[theirs].shape != like.shape:
            raise UserError(f"{theirs} is {list(weights[theirs].shape)}; this mixer's is {list(like.shape)}")
        parts = [mixer.get_parameter(name) for name in _NAMES[theirs]]
        for part, rows in zip(parts, weights[theirs].split([p.shape[0] for p in parts]), strict=True):
            part.copy_(rows.view_as(part))
