"""FLOPs of a model: each module says its own."""

from torch import nn


def forward_flops(module: nn.Module, sequence: int) -> float:
    """FLOPs of one token forward in a sequence of ``sequence`` tokens, of the whole model on any rank.

    A module with a method ``flops_per_token(sequence)`` says it for all that is below it. Elsewhere each
    weight is one multiplication and one addition (a norm's too, as in PaLM's 6 N, arXiv 2204.02311); an
    embedding is a look-up. A training step is three times as much: the backward pass has two products for
    each of the forward's.
    """
    if callable(count := getattr(module, "flops_per_token", None)):
        return float(count(sequence))
    if isinstance(module, nn.Embedding):
        return 0.0
    own = sum(2.0 * parameter.numel() for parameter in module.parameters(recurse=False))
    return own + sum(forward_flops(child, sequence) for child in module.children())
