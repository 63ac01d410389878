"""Sampling text from a decoder, one token after the other."""

from collections.abc import Sequence

import torch

from flashtrain.errors import UserError
from flashtrain.models.decoder import Decoder


@torch.inference_mode()
def generate(
    model: Decoder,
    prompt: Sequence[int],
    count: int,
    *,
    context: int,
    temperature: float,
    seed: int,
    vocabulary: int | None = None,
) -> list[int]:
    """``count`` tokens that follow ``prompt``; the model sees the last ``context`` tokens.

    ``temperature`` 0 takes the most likely token; the draws are a pure function of ``seed``. ``vocabulary``:
    tokens of the tokenizer, where the model has more, which mean nothing. Raises UserError for an empty
    prompt, settings out of range, and a model whose weights are not finite.
    """
    if not prompt:
        raise UserError("the prompt is empty; give at least one character")
    if not temperature >= 0 or count < 0 or context < 1:
        raise UserError("temperature and the number of tokens must not be negative, the context at least 1")
    if not 0 <= seed < 2**64:
        raise UserError(f"seed is {seed}; it must be a whole number from 0 to 2**64 - 1")
    draw = torch.Generator().manual_seed(seed)
    tokens = list(prompt)
    device = model.embedding.weight.device
    past, unread = None, tokens[-context:]
    for _ in range(count):
        if past is not None and past.tokens == context:
            # The window moves: every token in it gets a new position and loses the first of its past.
            past, unread = None, tokens[-context:]
        logits, past = model.extend(torch.tensor(unread, device=device).unsqueeze(1), past)
        last = logits[-1, 0, :vocabulary].float().cpu()
        if not last.isfinite().all():
            raise UserError("the model gives no numbers: its weights are not finite; take another checkpoint")
        if temperature == 0:
            token = int(last.argmax())
        else:
            token = int(torch.multinomial((last / temperature).softmax(-1), 1, generator=draw))
        tokens.append(token)
        unread = [token]
    return tokens[len(prompt) :]
