"""Look-up in a table whose rows are sharded over ranks."""

from torch import Tensor

from flashtrain.comm import collectives
from flashtrain.kernels.embedding.op import embedding
from flashtrain.kernels.weight_gradient import WeightGradient


def vocabulary_parallel_embedding(
    tokens: Tensor,
    table: Tensor,
    first: int,
    vocabulary: int,
    group: str,
    site: str = "",
    main: WeightGradient | None = None,
) -> Tensor:
    """``tokens [M, ...]``, the same on every rank, and a ``table [V/W, H]`` -> ``y_shard [M/W, ..., H]``.

    The table holds the rows from ``first`` on of ``vocabulary``. Exactly one rank contributes a row that is
    not zero, so the sum is exact. On a GPU the table's gradient goes to ``main`` where there is one. Raises
    UserError for operands that are no tokens and table, TransportError if a peer fails.
    """
    partial = embedding(tokens, table, first, vocabulary, main)
    shard: Tensor = collectives.reduce_scatter(partial, group, site)
    return shard
