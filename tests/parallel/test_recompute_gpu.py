"""Recomputed activations on a GPU: less memory with each policy, the same bits."""

import pytest
import torch

from flashtrain.models.decoder import Decoder
from flashtrain.parallel.recompute import Policy, recompute

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
CONFIG = Decoder.Config(vocabulary=512, hidden=1024, layers=4, heads=8, kv_heads=2, mlp_width=2816)


def pass_of(policy: Policy) -> tuple[int, list[torch.Tensor]]:
    """Bytes that the activations take between the passes; loss and gradients."""
    model = Decoder(CONFIG, torch.Generator().manual_seed(0)).to("cuda", torch.bfloat16)
    recompute(model.layers, policy)
    tokens = torch.randint(0, 512, (2048, 2), generator=torch.Generator().manual_seed(1)).cuda()
    model(tokens, tokens).backward()  # warm: workspaces
    model.zero_grad()
    before = torch.cuda.memory_allocated()
    loss = model(tokens, tokens)
    held = torch.cuda.memory_allocated() - before
    loss.backward()
    return held, [loss.detach(), *(p.grad for p in model.parameters())]


def test_each_policy_keeps_less_and_changes_no_bit() -> None:
    held, first = pass_of("none")
    policies: tuple[Policy, ...] = ("pointwise", "attention", "full")
    for policy in policies:
        less, results = pass_of(policy)
        assert less < held, policy
        held = less
        assert all(torch.equal(mine, other) for mine, other in zip(results, first, strict=True)), policy
