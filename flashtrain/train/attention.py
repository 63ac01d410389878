"""Which attention a run takes: named by its settings, or measured once and the same on every rank."""

import logging
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from flashtrain.comm import transport, tune
from flashtrain.errors import UserError
from flashtrain.models.decoder import Decoder
from flashtrain.nn import attend
from flashtrain.nn.attend import Documents, Heads, Settings
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
    kept on disk beside those of products. Raises UserError for a backend that does not take those heads.
    """
    attend.configure(settings)
    if device.type != "cuda":
        return
    shape = _Shape.of(model, train, degrees)
    heads = shape.heads(device, getattr(torch, train.dtype))
    fixed = settings.deterministic
    if settings.backend != "auto":
        reason = attend.why_not(settings.backend, heads, train.document_mask, fixed)
        if reason is not None:
            raise UserError(f"attention.backend is {settings.backend}, but {reason}")
        return
    names = attend.candidates(heads, train.document_mask, fixed)
    documents = shape.documents(device) if train.document_mask else None
    chosen = names[0]
    if len(names) > 1:
        kind = f"{'documents' if documents else 'causal'} {'fixed order' if fixed else 'any order'}"
        chosen = tune.choose(
            f"attention {shape} {train.dtype} {kind}",
            {name: partial(str, name) for name in names},
            lambda name: _pass(name, heads, documents, fixed),
            _Ranks(dist.get_rank(), dist.get_world_size()),
            transport.exchange_of(dist.group.WORLD.group_name),  # type: ignore[union-attr]
            device,
        )
    log.info("attention: %s, %s", chosen, "deterministic" if fixed else "gradients in any order")
    attend.configure(replace(settings, backend=chosen))  # type: ignore[arg-type]


class _Shape(NamedTuple):
    batch: int
    heads_: int
    kv_heads: int
    sequence: int
    width: int

    @classmethod
    def of(cls, model: Decoder.Config, train: Training, degrees: Degrees) -> "_Shape":
        batch = train.batch // (degrees.data * train.accumulate)
        pairing = model.pairs()
        kv_heads = model.kv_heads if pairing is None else pairing.n_kv if pairing.is_grouped else model.heads
        own = model.heads // degrees.tensor, max(1, kv_heads // degrees.tensor)
        return cls(batch, *own, train.sequence, model.head_dim)

    def __str__(self) -> str:
        return f"[{self.batch}, {self.heads_}/{self.kv_heads}, {self.sequence}, {self.width}]"

    def heads(self, device: torch.device, dtype: torch.dtype) -> Heads:
        def one(count: int) -> Tensor:
            # As a projection of [S, B, hidden] lies in memory.
            size = (self.sequence, self.batch, count, self.width)
            return torch.randn(size, device=device, dtype=dtype).permute(1, 2, 0, 3).requires_grad_()

        return Heads(one(self.heads_), one(self.kv_heads), one(self.kv_heads))

    def documents(self, device: torch.device) -> Documents:
        bounds = torch.arange(self.batch + 1, device=device, dtype=torch.int32) * self.sequence
        return Documents(bounds, self.sequence)


def _pass(name: str, heads: Heads, documents: Documents | None, deterministic: bool) -> None:
    with torch.enable_grad():
        out = attend.run(name, heads, documents, deterministic)
    torch.autograd.grad(out, heads, torch.ones_like(out))
