"""Which attention a run takes: named by its settings, or measured once and the same on every rank."""

import logging
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import NamedTuple, cast

import torch
import torch.distributed as dist
from torch import Tensor

from flashtrain.comm import transport, tune
from flashtrain.errors import UserError
from flashtrain.models.decoder import Decoder
from flashtrain.nn import attend, paired_attention
from flashtrain.nn.attend import Backend, Documents, Heads, Settings
from flashtrain.nn.paired_attention import Method, attend_pairs, why_not_by
from flashtrain.nn.pairing import Pairing
from flashtrain.parallel.mesh import Degrees
from flashtrain.train.settings import Training

log = logging.getLogger("flashtrain.train")


class _Ranks(NamedTuple):
    rank: int
    world: int


def prepare(
    settings: Settings, model: Decoder.Config, train: Training, degrees: Degrees, device: torch.device
) -> None:
    """Put ``settings`` in force. Collective on GPUs, where auto becomes the backend that is the fastest.

    What is measured is forward and backward on the heads that one rank has in a micro-batch; the choice is
    kept on disk beside those of products. Where gradients may be in any order, ones in a fixed order may win.
    The method of attention over pairs of heads is measured there, too. Raises UserError for a backend that
    does not take those heads.
    """
    attend.configure(settings)
    paired_attention.prefer(None)
    if device.type != "cuda":
        return
    fixed, dtype = settings.deterministic, getattr(torch, train.dtype)
    pairing = pairs_of_rank(model, degrees)
    shape = _Shape.of(model, pairing, train, degrees)
    heads = shape.heads(device, dtype)
    if settings.backend == "auto":
        ways = ways_of(heads, train.document_mask, fixed)
        documents = shape.documents(device) if train.document_mask else None
        kind = f"{'documents' if documents else 'causal'} {'fixed order' if fixed else 'any order'}"
        chosen = _fastest(
            f"attention {shape} {train.dtype} {kind}",
            list(ways),
            lambda name: _backward(heads, lambda: attend.run(ways[name][0], heads, documents, ways[name][1])),
            device,
        )
        backend, ordered = ways[chosen]
        log.info("attention: %s, %s", backend, "deterministic" if ordered else "gradients in any order")
        attend.configure(replace(settings, backend=backend, deterministic=ordered))
    elif (reason := attend.why_not(settings.backend, heads, train.document_mask, fixed)) is not None:
        raise UserError(f"attention.backend is {settings.backend}, but {reason}")
    if pairing is None or fixed or train.document_mask:
        return
    given = shape._replace(heads_=pairing.n_q, kv_heads=pairing.n_kv).heads(device, dtype)
    methods = methods_of(settings.backend, given)
    share = f"{model.pairing} {model.pair_order} over {degrees.tensor}"
    method = _fastest(
        f"pairs {share} {shape} {train.dtype} {settings.backend}",
        methods,
        lambda name: _backward(given, lambda: attend_pairs(given, pairing, method=cast(Method, name))),
        device,
    )
    log.info("attention over pairs of heads: %s", method)
    paired_attention.prefer(cast(Method, method))


def ways_of(heads: Heads, documents: bool, fixed: bool) -> dict[str, tuple[Backend, bool]]:
    """The backends to measure, and whether each sums in a fixed order."""
    found = {name: (cast(Backend, name), fixed) for name in attend.candidates(heads, documents, fixed)}
    if not fixed and "cudnn" in found and attend.why_not("cudnn", heads, documents, True) is None:
        found["cudnn in a fixed order"] = "cudnn", True  # our backward pass may be the faster one
    return found


def pairs_of_rank(model: Decoder.Config, degrees: Degrees) -> Pairing | None:
    """The pairs that the first tensor-parallel rank attends over; None where its queries are grouped ones."""
    pairing = model.pairs()
    if pairing is None or (pairing.is_grouped and pairing.n_kv % degrees.tensor == 0):
        return None
    return pairing.share(0, degrees.tensor).pairing


def methods_of(backend: Backend, heads: Heads) -> list[str]:
    """The methods to measure where ``attention.backend`` is this one: none that computes with another."""
    wanted: dict[str, tuple[Method, ...]] = {
        "auto": ("expand", "mixed", "kernel"),
        "cudnn": ("expand", "mixed"),
        "triton": ("kernel",),
    }
    found = wanted.get(backend, ("expand",))
    return [name for name in found if why_not_by(name, heads, True) is None]


def _fastest(name: str, candidates: list[str], call: Callable[[str], None], device: torch.device) -> str:
    """The fastest of ``candidates``, of which the first is taken unless it is beaten."""
    if len(candidates) == 1:
        return candidates[0]
    chosen: str = tune.choose(
        name,
        {candidate: partial(str, candidate) for candidate in candidates},
        call,
        _Ranks(dist.get_rank(), dist.get_world_size()),
        transport.exchange_of(dist.group.WORLD.group_name),  # type: ignore[union-attr]
        device,
    )
    return chosen


def _backward(heads: Heads, forward: Callable[[], Tensor]) -> None:
    with torch.enable_grad():
        out = forward()
    torch.autograd.grad(out, heads, torch.ones_like(out))


class _Shape(NamedTuple):
    batch: int
    heads_: int
    kv_heads: int
    sequence: int
    width: int
    keys: int  # as many as queries, or, of ranks with a segment of a sequence, those of the last one

    @classmethod
    def of(
        cls, model: Decoder.Config, pairing: Pairing | None, train: Training, degrees: Degrees
    ) -> "_Shape":
        """Heads as a backend meets them: copies, where those of ``pairing`` are copied for it."""
        batch = train.batch // (degrees.data * train.accumulate)
        if pairing is not None:
            own = pairing.heads, pairing.n_kv if pairing.groups_keys else pairing.heads
        else:
            grouped = model.pairs()
            kv_heads = model.kv_heads if grouped is None else grouped.n_kv
            own = model.heads // degrees.tensor, max(1, kv_heads // degrees.tensor)
        return cls(batch, *own, train.sequence // degrees.context, model.head_dim, train.sequence)

    def __str__(self) -> str:
        tokens = f"{self.sequence}" + (f" of {self.keys}" if self.keys > self.sequence else "")
        return f"[{self.batch}, {self.heads_}/{self.kv_heads}, {tokens}, {self.width}]"

    def heads(self, device: torch.device, dtype: torch.dtype) -> Heads:
        def one(count: int, tokens: int) -> Tensor:
            # As a projection of [S, B, hidden] lies in memory.
            size = (tokens, self.batch, count, self.width)
            return torch.randn(size, device=device, dtype=dtype).permute(1, 2, 0, 3).requires_grad_()

        key, value = (one(self.kv_heads, self.keys) for _ in range(2))
        return Heads(one(self.heads_, self.sequence), key, value)

    def documents(self, device: torch.device) -> Documents:
        bounds = torch.arange(self.batch + 1, device=device, dtype=torch.int32) * self.sequence
        return Documents(bounds, self.sequence)
