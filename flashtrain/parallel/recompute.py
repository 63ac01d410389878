"""Which activations a block keeps for its backward pass, and which it computes again (arXiv 2205.05198)."""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, Literal

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

Policy = Literal["none", "pointwise", "attention", "full"]

# Products, and what exchanges data between ranks with products or without.
_PRODUCTS = (
    "aten::mm",
    "aten::addmm",
    "aten::bmm",
    "aten::baddbmm",
    "aten::_scaled_mm",
    "aten::_grouped_mm",
    "flashtrain::all_gather",
    "flashtrain::all_gather_matmul",
    "flashtrain::matmul_reduce_scatter",
    "flashtrain::reduce_scatter",
)
# What mixes tokens: attention, and the recurrence of Mamba-2.
_MIXERS = (
    "aten::_flash_attention_forward",
    "aten::_scaled_dot_product_cudnn_attention",
    "aten::_scaled_dot_product_efficient_attention",
    "aten::_scaled_dot_product_flash_attention",
    "aten::_scaled_dot_product_flash_attention_for_cpu",
    "aten::_scaled_dot_product_fused_attention_overrideable",
    "flashtrain::pairing_attention",
    "flashtrain::ssd",
)


def recompute(units: Iterable[nn.Module], policy: Policy) -> None:
    """Let each of ``units`` (blocks of a model) keep what ``policy`` says, in place; bits stay the same.

    none: all. pointwise: what products, exchanges and attention give; norms, activations, rotations and
    residual sums are computed again. attention: what products and exchanges give; attention runs again as
    well (but the score products of the backend math are kept). full: the input of the block alone, so that
    products and their transfers run again too.

    What is no operator of torch's dispatcher is computed again under every policy but none: the package
    flash-attn is such. Units must draw no random numbers. It works before and after data parallelism, whose
    hooks then stay outside.
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
    """Names of the ops whose results are kept."""
    return frozenset(_PRODUCTS if policy == "attention" else _PRODUCTS + _MIXERS)


def _decide(kept: frozenset[str], context: Any, op: Any, *arguments: Any, **named: Any) -> CheckpointPolicy:
    keep = op.name().partition(".")[0] in kept
    return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE
