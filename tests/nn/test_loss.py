"""The plain training loss."""

import math

import torch
from torch.nn.functional import cross_entropy

from flashtrain.nn.loss import CrossEntropy


def test_mean_in_nats_over_all_positions() -> None:
    logits, targets = torch.zeros(4, 2, 7), torch.zeros(4, 2, dtype=torch.long)
    assert math.isclose(CrossEntropy()(logits, targets).item(), math.log(7), rel_tol=1e-6)
    logits[0, 0, 0] = 100.0  # one of the eight positions is certain
    assert math.isclose(CrossEntropy()(logits, targets).item(), 7 / 8 * math.log(7), rel_tol=1e-6)


def test_low_precision_logits_are_summed_up_in_fp32() -> None:
    logits = torch.randn(3, 2, 500, generator=torch.Generator().manual_seed(0)).bfloat16()
    targets = torch.randint(0, 500, (3, 2), generator=torch.Generator().manual_seed(1))
    loss = CrossEntropy()(logits, targets)
    assert loss.dtype == torch.float32
    wanted = cross_entropy(logits.double().flatten(0, 1), targets.flatten())
    assert math.isclose(loss.item(), wanted.item(), rel_tol=1e-6)
