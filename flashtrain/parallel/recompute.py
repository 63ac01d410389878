"""Which activations a block keeps for its backward pass, and which it computes again (arXiv 2205.05198)."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import cache, partial
from typing import Any, Literal

import torch
from torch import nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
    noop_context_fn,
)

Policy = Literal["none", "pointwise", "attention", "full"]
Contexts = tuple[AbstractContextManager[Any], AbstractContextManager[Any]]
Passes = Callable[[], Contexts]

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
    flash-attn is such, and attention of shared queries and keys whose gradients are formed once. Units must
    draw no random numbers. It works before and after data parallelism, whose hooks then stay outside.

    A module inside that exchanges data with other units past their inputs and outputs has ``passes()``: two
    context managers, to be entered around the forward pass and around the same one when it runs again.
    """
    if policy == "none":
        return
    for unit in units:
        unit.forward = partial(_checkpointed, unit.forward, _contexts_of(unit, policy))


def _checkpointed(forward: Callable[..., Any], contexts: Passes, *inputs: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*inputs)
    return checkpoint(forward, *inputs, use_reentrant=False, preserve_rng_state=False, context_fn=contexts)


def _contexts_of(unit: nn.Module, policy: Policy) -> Passes:
    """What gives, for each pass, the contexts to enter around it and around the same one run again."""
    found: list[Passes] = [module.passes for module in unit.modules() if hasattr(module, "passes")]  # type: ignore[misc]
    if policy != "full":
        found.append(partial(_selective, _kept(policy)))
    if not found:
        return noop_context_fn
    return found[0] if len(found) == 1 else partial(_both, found)


def _both(passes: Sequence[Passes]) -> Contexts:
    pairs = [contexts() for contexts in passes]
    return _all([first for first, _ in pairs]), _all([again for _, again in pairs])


@contextmanager
def _all(contexts: Sequence[AbstractContextManager[Any]]) -> Iterator[None]:
    with ExitStack() as stack:
        for context in contexts:
            stack.enter_context(context)
        yield


def _selective(kept: frozenset[str]) -> Contexts:
    """Those that keep the results of the ops ``kept`` in the forward pass, and hand them out again.

    torch's count every op and want none more the second time. But a unit of data parallelism inside of this
    one is gathered in its forward pass, or was ahead of it, and the second time that may differ.
    """
    modes: Any = create_selective_checkpoint_contexts(partial(_decide, kept))
    for mode in modes:
        mode.__class__ = _that_sees(mode.__class__, kept)
    first, again = modes
    return first, again


@cache
def _that_sees(kind: Any, kept: frozenset[str]) -> type:
    """The class ``kind`` of modes, for the ops ``kept`` alone; compilers ask it for all."""

    class Selective(kind):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if torch.compiler.is_compiling() or _name(func) in kept:
                return super().__torch_dispatch__(func, types, args, kwargs)
            return func(*args, **(kwargs or {}))

    return Selective


def _kept(policy: Policy) -> frozenset[str]:
    """Names of the ops whose results are kept."""
    return frozenset(_PRODUCTS if policy == "attention" else _PRODUCTS + _MIXERS)


def _decide(kept: frozenset[str], context: Any, op: Any, *arguments: Any, **named: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if _name(op) in kept else CheckpointPolicy.PREFER_RECOMPUTE


def _name(op: Any) -> str:
    return str(op.name()).partition(".")[0]
