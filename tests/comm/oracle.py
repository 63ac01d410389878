"""What the overlapped ops must give: operands, fp64 references, and the rule that fixes every bit.

The rule is written here a second time, from the module docstring of ``flashtrain.comm.ops`` and with torch
alone, so that a change of order or rounding in the ops cannot carry its own reference along.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

# Sizes at which torch and MKL pick the same kernel whatever the number of rows.
_TALL, _WIDE = 64, 16


@dataclass(frozen=True)
class Operands:
    """Both pairs of layers over W ranks, drawn alike on every rank.

    ``x [M, K]`` · ``up[r] [n, K]ᵀ`` is rank r's column-parallel product, with upstream gradients
    ``dy[r] [M, n]`` and, for the gathered input, ``dx_full[r] [M, K]``. ``a[r] [M, k]`` · ``down[r]
    [N, k]ᵀ`` is rank r's partial of the row-parallel product, with upstream gradient ``dz [M, N]``.
    """

    x: Tensor
    up: list[Tensor]
    dy: list[Tensor]
    dx_full: list[Tensor]
    a: list[Tensor]
    down: list[Tensor]
    dz: Tensor

    @property
    def world(self) -> int:
        return len(self.up)

    def wide(self) -> "Operands":
        """The same numbers in fp64."""
        return Operands(
            **{
                name: [t.double() for t in value] if isinstance(value, list) else value.double()
                for name, value in vars(self).items()
            }
        )

    def sizes(self) -> "Operands":
        """Absolute values in fp64: products of these bound the rounding errors."""
        return Operands(
            **{
                name: [t.abs() for t in value] if isinstance(value, list) else value.abs()
                for name, value in vars(self.wide()).items()
            }
        )


def draw(world: int, rows: int, dtype: torch.dtype, seed: int = 0) -> Operands:
    generator = torch.Generator().manual_seed(seed * 1000 + rows)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    k, n, inner, out = 20, 6, 5, 18
    return Operands(
        x=normal(rows, k),
        up=[normal(n, k) for _ in range(world)],
        dy=[normal(rows, n) for _ in range(world)],
        dx_full=[normal(rows, k) for _ in range(world)],
        a=[normal(rows, inner) for _ in range(world)],
        down=[normal(out, inner) for _ in range(world)],
        dz=normal(rows, out),
    )


def share(whole: Tensor, world: int, rank: int) -> Tensor:
    """The rows of ``whole`` that belong to ``rank``."""
    return whole.tensor_split(world)[rank]


def exact(given: Operands, rank: int) -> dict[str, Tensor]:
    """Every result of every op on ``rank``, in the precision of ``given``, from one process."""
    world = given.world
    column_dx = sum((dy @ w for dy, w in zip(given.dy, given.up, strict=True)), torch.zeros_like(given.x))
    gathered_dx = sum(given.dx_full, torch.zeros_like(given.x))
    row_z = sum((a @ w.t() for a, w in zip(given.a, given.down, strict=True)), torch.zeros_like(given.dz))
    return {
        "column y": given.x @ given.up[rank].t(),
        "column x_full": given.x,
        "column dx": share(column_dx, world, rank),
        "column dx with x_full": share(column_dx + gathered_dx, world, rank),
        "column dw": given.dy[rank].t() @ given.x,
        "row z": share(row_z, world, rank),
        "row da": given.dz @ given.down[rank],
        "row dw": given.dz.t() @ given.a[rank],
        "all_gather": given.x,
        "all_gather dx": share(gathered_dx, world, rank),
        "reduce_scatter": share(gathered_dx, world, rank),
        "reduce_scatter mean": share(gathered_dx / world, world, rank),
        "reduce_scatter dx": given.x,
        "reduce_scatter mean dx": given.x / world,
        "all_reduce": gathered_dx,
        "all_reduce mean": gathered_dx / world,
    }


def far(actual: Tensor, wanted: Tensor, size: Tensor, kind: str, world: int) -> bool:
    """Whether ``actual`` is further from ``wanted`` than its roundings allow, or not a number.

    ``size`` is the same result on absolute operands. Direct: one rounding on the wire, one of the sum,
    one where two gradients are added. Ring: one each hop.
    """
    roundings = 3 if kind == "direct" else world + 2
    additions = 64 * torch.finfo(torch.float32).eps
    bound = (roundings / 2 * torch.finfo(actual.dtype).eps + additions) * size
    return not bool(((actual.double() - wanted).abs() <= bound).all())


def product(x: Tensor, w: Tensor) -> Tensor:
    """``x [M, K] · w [N, K]ᵀ`` with the bits of a large product."""
    tall = pad(x, (0, 0, 0, max(0, _TALL - x.shape[0])))
    wide = pad(w, (0, 0, 0, _WIDE - w.shape[0])) if w.shape[0] < _WIDE else w
    return (tall @ wide.t())[: x.shape[0], : w.shape[0]].contiguous()


def reduced(partials: Sequence[Tensor], rank: int, kind: str, scale: float = 1.0) -> Tensor:
    """The rows of ``rank`` of the sum of ``partials [M, ...]``, one of each rank, by the rule of ``kind``."""
    world, dtype = len(partials), partials[0].dtype
    mine = [share(partial, world, rank) for partial in partials]
    if kind == "ring":
        running = mine[(rank + 1) % world]
        for hop in range(2, world + 1):
            running = mine[(rank + hop) % world] + running
        mine = [running]
    total = mine[0].float()
    for partial in mine[1:]:
        total = total + partial.float()
    return (total * scale if scale != 1.0 else total).to(dtype)


def replayed(given: Operands, rank: int, kind: str) -> dict[str, Tensor]:
    """Every result on ``rank`` to the bit."""
    world, x = given.world, given.x
    column_dx = reduced([product(dy, w.t()) for dy, w in zip(given.dy, given.up, strict=True)], rank, kind)
    gathered_dx = reduced(given.dx_full, rank, kind)
    mean = reduced(given.dx_full, rank, kind, 1 / world)
    row_z = reduced([product(a, w) for a, w in zip(given.a, given.down, strict=True)], rank, kind)
    dy = given.dy[rank]
    return {
        "column y": product(x, given.up[rank]),
        "column x_full": x,
        "column dx": column_dx,
        "column dx with x_full": column_dx + gathered_dx,
        "column dw": dy.t() @ x,
        "row z": row_z,
        "row da": product(given.dz, given.down[rank].t()),
        "row dw": given.dz.t() @ given.a[rank],
        "all_gather": x,
        "all_gather dx": gathered_dx,
        "reduce_scatter": gathered_dx,
        "reduce_scatter mean": mean,
        "reduce_scatter dx": x,
        "reduce_scatter mean dx": x * (1 / world),
    }
