"""Output projection and cross-entropy over a sharded vocabulary, in chunks of rows.

For W ranks with the rows ``x_shard [M/W, H]`` and the columns ``w_shard [V/W, H]`` each:

    chunk k        rows k·s to (k+1)·s of every rank's shard, so that every chunk is an all-gather of its own
    logits         AG(x_k) · w_shardᵀ                      the overlapped product of column-parallel layers
    three numbers  a row, of all ranks, added in rank order
    gradients      dx_k = RS(dlogits · w_shard)            the scatter under the product for dw
                   dw  += dlogitsᵀ · AG(x_k)               in fp32

Where whole logits are to be seen, by a compiler that fuses the loss itself,
``vocabulary_parallel_cross_entropy`` takes them.
"""

from typing import Any

import torch
from torch import Tensor

from flashtrain.comm import collectives, groups, ops
from flashtrain.comm.schedule import split_rows
from flashtrain.errors import UserError
from flashtrain.kernels.cross_entropy import chunks, reference
from flashtrain.kernels.weight_gradient import WeightGradient


class Sharded:
    """Logits of a chunk whose rows come from all ranks and whose columns are this rank's."""

    def __init__(self, x_shard: Tensor, w_shard: Tensor, targets: Tensor, group: str, site: str) -> None:
        process_group = groups.resolve(group)
        self.rank, self.world = process_group.rank(), process_group.size()
        self.x, self.weight, self.group, self.site = x_shard, w_shard, group, site
        self.counts = split_rows(targets.shape[0], self.world)
        if x_shard.shape[0] != self.counts[self.rank]:
            raise UserError(
                f"{site or 'the loss'}: {targets.shape[0]} targets over {self.world} ranks are "
                f"{self.counts[self.rank]} rows on rank {self.rank}, but its x_shard has {x_shard.shape[0]}"
            )
        self._targets = targets.split(self.counts)

    def logits(self, rows: slice, keep: bool) -> tuple[Tensor, Tensor]:
        """``[R, V/W]``, and ``[R, H]``; in the order of the ranks."""
        total = sum(len(range(*rows.indices(count))) for count in self.counts)
        return ops.all_gather_matmul(
            self.x[rows], self.weight, self.group, self.site, total, return_gather=keep
        )

    def targets(self, rows: slice) -> Tensor:
        """``[R]``, in the order of the ranks."""
        return torch.cat([targets[rows] for targets in self._targets])

    def everyone(self, numbers: Tensor) -> Tensor:
        """``[W, 3, R]``."""
        return collectives.all_gather(numbers.unsqueeze(0), self.group, self.site, self.world)

    def gradients(self, slopes: Tensor, x: Tensor, dx: Tensor | None, dw: WeightGradient | None) -> None:
        """``dx [R/W, H]`` of the own rows and ``dw [V/W, H]``."""
        if dx is not None and dw is not None:
            dx.copy_(ops.column_gradients_into(dw, slopes, x, self.weight, self.group, self.site, True))
        elif dx is not None:
            dx.copy_(ops.matmul_reduce_scatter(slopes, self.weight.t(), self.group, self.site))
        elif dw is not None:
            dw.add_product(slopes.t(), x)


def linear_cross_entropy(
    x_shard: Tensor,
    w_shard: Tensor,
    targets: Tensor,
    group: str,
    site: str = "",
    main: WeightGradient | None = None,
    chunk_bytes: int = chunks.CHUNK_BYTES,
) -> Tensor:
    """Mean cross-entropy in nats of ``AG(x_shard [M/W, H]) · w_shard [V/W, H]ᵀ``, the same on every rank.

    ``targets [M]`` are whole and the same on every rank, ranks in order of vocabulary; those of -100 do not
    count, as in PyTorch; without any that counts the loss is NaN. The weight's gradient goes to ``main``
    where there is one. Raises UserError for rows that do not fit, TransportError if a peer fails.
    """
    projection = Sharded(x_shard.detach(), w_shard.detach(), targets, group, site)
    most = projection.counts[0]
    return chunks.loss_of(projection, x_shard, w_shard, targets, most, main, chunk_bytes)


class _OfWholeLogits(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, group: str, site: str) -> Tensor:
        process_group = groups.resolve(group)
        ctx.rank, world = process_group.rank(), process_group.size()
        numbers = reference.statistics(logits, targets, ctx.rank * logits.shape[1])
        everyone = collectives.all_gather(numbers.unsqueeze(0), group, site, world)
        count = (targets != reference.IGNORED).sum()
        ctx.save_for_backward(logits, targets, everyone, count)
        return reference.losses(everyone, targets).sum() / count

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        logits, targets, everyone, count = ctx.saved_tensors
        slopes = logits.clone()
        first = ctx.rank * logits.shape[1]
        reference.slopes_(slopes, targets, first, everyone, ctx.rank, grads[0] / count)
        return slopes, None, None, None


def vocabulary_parallel_cross_entropy(logits: Tensor, targets: Tensor, group: str, site: str = "") -> Tensor:
    """Mean cross-entropy in nats, fp32 (fp64 for fp64), the same bits on every rank.

    ``logits [..., V/W]`` hold the columns of this rank, ranks in order of vocabulary; ``targets [...]``
    are whole and the same on every rank. Targets of -100 do not count, as in PyTorch; without any that
    counts the loss is NaN. Raises TransportError if a peer fails.
    """
    flat = logits.reshape(-1, logits.shape[-1])
    loss: Tensor = _OfWholeLogits.apply(flat, targets.reshape(-1), group, site)
    return loss
