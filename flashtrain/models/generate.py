"""Sampling text from a decoder, one token after the other."""

from collections.abc import Sequence

import torch

from flashtrain.errors import UserError
from flashtrain.models.decoder import Decoder


@torch.inference_mode()
def generate(
    model: Decoder, prompt: Sequence[int], count: int, *, context: int, temperature: float, seed: int
) -> list[int]:
    """``count`` tokens that follow ``prompt``; the model sees the last ``context`` tokens.

    ``temperature`` 0 takes the most likely token; the draws are a pure function of ``seed``. Raises
    UserError for an empty prompt or settings out of range.
    """
    if not prompt:
        raise UserError("the prompt is empty; give at least one character")
    if temperature < 0 or count < 0 or context < 1:
        raise UserError("temperature and the number of tokens must not be negative, the context at least 1")
    draw = torch.Generator().manual_seed(seed)
    tokens = list(prompt)
    device = model.embedding.weight.device
    for _ in range(count):
        window = torch.tensor(tokens[-context:], device=device).unsqueeze(1)
        logits = model(window)[-1, 0].float().cpu()
        if temperature == 0:
            tokens.append(int(logits.argmax()))
        else:
            probabilities = (logits / temperature).softmax(-1)
            tokens.append(int(torch.multinomial(probabilities, 1, generator=draw)))
    return tokens[len(prompt) :]
