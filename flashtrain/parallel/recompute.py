"""Which activations a block keeps for its backward pass, and which it computes again (arXiv 2205.05198)."""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, Literal

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

Policy = Literal["none", "pointwise", "attention", "full"]

# Products of torch; those of this engine are ops of the namespace flashtrain, which also exchange data.
_PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "_scaled_mm", "_grouped_mm")
_ATTENTION = (
    "_scaled_dot_product_cudnn_attention",
    "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_fused_attention_overrideable",
    "_flash_attention_forward",
)


def recompute(units: Iterable[nn.Module], policy: Policy) -> None:
    """Let each of ``units`` (blocks of a model) keep what ``policy`` says, in place; bits stay the same.

    none: all. pointwise: what products and attention give; norms, activations, rotations and residual sums
    are computed again. attention: what products give, attention and the score products of the backend math
    too. full: the input of the block, so that its products and their transfers run again as well.

    ``flashtrain`` ops, which exchange data, run again under full alone. An attention that torch's dispatcher
    does not see (the package flash-attn) runs again under every policy but none. Units must draw no random
    numbers. It works before and after data parallelism, whose hooks then stay outside.
    """
    if policy == "none":
        return
    for unit in units:
        unit.forward = partial(_checkpointed, unit.forward, policy)


def _checkpointed(forward: Callable[..., Any], policy: Policy, *inputs: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*inputs)
    settings: dict[str, Any] = {}
    if policy != "full":
        kept = _kept(policy)
        settings["context_fn"] = partial(create_selective_checkpoint_contexts, partial(_decide, kept))
    return checkpoint(forward, *inputs, use_reentrant=False, preserve_rng_state=False, **settings)


def _kept(policy: Policy) -> frozenset[str]:
    """Names of the aten ops whose results are kept."""
    return frozenset(_PRODUCTS if policy == "attention" else _PRODUCTS + _ATTENTION)


def _decide(kept: frozenset[str], context: Any, op: Any, *arguments: Any, **named: Any) -> CheckpointPolicy:
    namespace, _, name = op.name().partition("::")
    if namespace == "flashtrain" or (namespace == "aten" and name.partition(".")[0] in kept):
        return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE
