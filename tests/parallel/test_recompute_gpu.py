"""Recomputed activations on a GPU: less memory with each policy, the same bits."""

from dataclasses import replace

import pytest
import torch

from flashtrain.models.decoder import Decoder
from flashtrain.nn.sharing import Sharing
from flashtrain.parallel.recompute import Policy, recompute

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
CONFIG = Decoder.Config(vocabulary=512, hidden=1024, layers=4, heads=8, kv_heads=2, mlp_width=2816)


SHARED = replace(CONFIG, heads=16, kv_heads=16)
CONFIGS = {
    "plain": CONFIG,
    "queries and keys": replace(SHARED, sharing=Sharing(deferred=False)),
    "their gradients formed once": replace(SHARED, sharing=Sharing(deferred=True)),
    "keys and values": replace(CONFIG, sharing=Sharing(share="KV")),
}


def pass_of(policy: Policy, config: Decoder.Config) -> tuple[int, list[torch.Tensor]]:
    """Bytes that the activations take between the passes; loss and gradients."""
    model = Decoder(config, torch.Generator().manual_seed(0)).to("cuda", torch.bfloat16)
    recompute(model.layers, policy)
    tokens = torch.randint(0, 512, (2048, 2), generator=torch.Generator().manual_seed(1)).cuda()
    model(tokens, tokens).backward()  # warm: workspaces
    model.zero_grad()
    before = torch.cuda.memory_allocated()
    loss = model(tokens, tokens)
    held = torch.cuda.memory_allocated() - before
    loss.backward()
    return held, [loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]


@pytest.mark.parametrize("name", CONFIGS)
def test_each_policy_keeps_less_and_changes_no_bit(name: str) -> None:
    held, first = pass_of("none", CONFIGS[name])
    policies: tuple[Policy, ...] = ("pointwise", "attention", "full")
    for policy in policies:
        less, results = pass_of(policy, CONFIGS[name])
        assert less < held, policy
        held = less
        assert all(torch.equal(mine, other) for mine, other in zip(results, first, strict=True)), policy
