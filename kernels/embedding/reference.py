"""The rows of a table that tokens name, in plain torch; differentiable."""

import torch
from torch import Tensor


def embedding(tokens: Tensor, table: Tensor, first: int, vocabulary: int) -> Tensor:
    """``table[tokens - first]``: ``tokens [...]``, ``table [rows, H]`` -> ``[..., H]``.

    The table holds the rows from ``first`` on of ``vocabulary``; a token of the others has zeros, one outside
    of the vocabulary NaN, or, where the table is all of it, what torch says of it. On a CPU torch adds each
    row's gradients in the order of the tokens, in the table's dtype, on any number of threads.
    """
    if table.shape[0] == vocabulary:
        return torch.nn.functional.embedding(tokens, table)
    index = tokens - first
    elsewhere = (index < 0) | (index >= table.shape[0])
    found = torch.nn.functional.embedding(index.masked_fill(elsewhere, 0), table)
    unknown = (tokens < 0) | (tokens >= vocabulary)
    found = found.masked_fill_(elsewhere.unsqueeze(-1), 0.0)
    return found.masked_fill_(unknown.unsqueeze(-1), torch.nan)
