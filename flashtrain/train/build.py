"""From settings to a model on the mesh and the step that trains it."""

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from flashtrain.checkpoint import CheckpointStore
from flashtrain.checkpoint.blocks import block_of
from flashtrain.errors import UserError
from flashtrain.metrics import peak_flops
from flashtrain.models.decoder import Decoder
from flashtrain.parallel import branches
from flashtrain.parallel.apply import parallelize
from flashtrain.parallel.data import Sharding
from flashtrain.parallel.recompute import recompute
from flashtrain.train import carried, snapshot
from flashtrain.train.faults import Fault, FaultPlan
from flashtrain.train.optimizer import AdamW
from flashtrain.train.settings import Training
from flashtrain.train.skips import SkipRule
from flashtrain.train.step import TrainStep

log = logging.getLogger("flashtrain.train")


@dataclass(frozen=True)
class Built:
    """A model on the mesh, and what is known of it as a whole: counts of the whole model on any rank.

    ``peak`` is the device's dense peak in FLOP/s for the run's dtype; None: not known.
    """

    model: Decoder
    parameter_count: int
    flops_per_token: float
    peak: float | None


def check_room(config: Decoder.Config, share: float) -> None:
    """Raise UserError if this machine trains on the CPU and cannot hold its ``share`` of the model."""
    if torch.cuda.is_available():
        return
    with torch.device("meta"):
        count = Decoder(config).parameter_count()
    taken = 16 * count * share  # weights, gradients and moments in fp32
    there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if taken > there:
        raise UserError(
            f"a model of {count / 1e9:,.2f} G parameters takes {taken / 2**30:,.0f} GiB of this machine's "
            f"memory without a GPU, and there are {there / 2**30:,.0f} GiB: make the model smaller, or use "
            "more machines"
        )


def build_model(
    config: Decoder.Config,
    train: Training,
    sharding: Sharding,
    mesh: DeviceMesh,
    device: torch.device,
    by_branches: bool = False,
) -> Built:
    """The plain model, drawn from ``train.seed`` alone, on the mesh; each rank holds only its part of it."""
    built = build_empty(config, train, sharding, mesh, device, by_branches)
    own = snapshot.held(built.model)
    for name, whole in built.model.drawn(torch.Generator().manual_seed(train.seed)):
        if name in own and (block := block_of(name, own[name])) is not None:
            block.local.copy_(block.cut(whole.detach()))
    return built


def build_empty(
    config: Decoder.Config,
    train: Training,
    sharding: Sharding,
    mesh: DeviceMesh,
    device: torch.device,
    by_branches: bool = False,
) -> Built:
    """The model on the mesh, its parameters on ``device`` without values; it never was there as a whole."""
    with torch.device("meta"):
        model = Decoder(config).to(getattr(torch, train.dtype))
    built = describe(model, train, device)
    parallelize(model, mesh, sharding=sharding, by_branches=by_branches)
    recompute(model.layers, train.recompute)
    model.to_empty(device=device)
    branches.leave_out(model)
    if config.tied_embeddings:
        model.head.weight = model.embedding.weight
    return built


def describe(model: Decoder, train: Training, device: torch.device) -> Built:
    """What is known of ``model``, plain or parallelised."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    peak = peak_flops(name, getattr(torch, train.dtype))
    return Built(model, model.parameter_count(), model.flops_per_token(train.sequence), peak)


def start_from(
    source: Path | None, model: Decoder, out: Path, shares: bool = False
) -> dict[str, tuple[str, ...]]:
    """Take over the weights of ``source``, unless the run in ``out`` has a checkpoint of its own.

    Before the optimizer is made, which takes its masters from the weights. -> what it then is to set to means
    (see ``AdamW.set_to_means``), if layers share (``shares``: from the first step on) that did not in source.
    Raises UserError if ``source`` is damaged, of another model, or shares already what would begin as a mean.
    """
    means: dict[str, tuple[str, ...]] = {}
    if source is None or CheckpointStore(out / snapshot.CHECKPOINTS).latest() is not None:
        return means
    path = snapshot.find(source)
    if shares and (sharing := model.config.sharing) is not None:
        if snapshot.model_config(path).sharing is None:
            means = model.shared_means(0, len(sharing.targets_of(model.config.layers)))
        elif sharing.init == "mean":
            raise UserError(f"layers of {path} share already: set model.sharing.init to copy")
    read = {name for group in means.values() for name in group}
    snapshot.load_weights(path, model, means.keys() - read)
    log.info("starting with the weights of %s", path)
    if dist.get_rank() == 0 and (came := carried.find(path)) is not None:
        carried.copy(came, out / carried.FOLDER, carried.ALL)
    return means


def build_step(
    model: Decoder,
    mesh: DeviceMesh,
    optimizer: AdamW.Config,
    skip: SkipRule.Config,
    faults: Sequence[Fault],
    out: Path,
) -> TrainStep:
    """The step with its optimizer, skip rule and fault plan; ``out`` is the run's folder."""
    plan = FaultPlan(faults, dist.get_rank(), out, out / snapshot.CHECKPOINTS)
    return TrainStep(model, mesh, AdamW(model, mesh, optimizer), SkipRule(skip), plan)
