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
from flashtrain.errors import UserError
from flashtrain.metrics import peak_flops
from flashtrain.models.decoder import Decoder
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


def check_room(config: Decoder.Config, ranks: int) -> None:
    """Raise UserError if the memory of this machine cannot hold the model ``config`` on ``ranks`` ranks."""
    with torch.device("meta"):
        count = Decoder(config).parameter_count()
    # Each rank draws the whole model in fp32. On the CPU it then has gradients and moments of its part.
    each = 4 * ranks if torch.cuda.is_available() else max(4 * ranks, 16)
    there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if count * each > there:
        raise UserError(
            f"a model of {count / 1e9:,.2f} G parameters takes {count * each / 2**30:,.0f} GiB of memory on "
            f"{ranks} ranks of one machine, and this one has {there / 2**30:,.0f} GiB: make the model "
            "smaller, or use more machines"
        )


def build_model(
    config: Decoder.Config,
    train: Training,
    sharding: Sharding,
    mesh: DeviceMesh,
    device: torch.device,
    by_branches: bool = False,
) -> Built:
    """The plain model, drawn from ``train.seed`` alone, then moved to ``device`` and parallelised."""
    model = Decoder(config, torch.Generator().manual_seed(train.seed))
    built = describe(model, train, device)
    model.to(device=device, dtype=getattr(torch, train.dtype))
    distribute(model, train, sharding, mesh, by_branches)
    return built


def distribute(
    model: Decoder, train: Training, sharding: Sharding, mesh: DeviceMesh, by_branches: bool = False
) -> None:
    """Parallelise ``model``, and let its blocks keep the activations that ``train.recompute`` says."""
    parallelize(model, mesh, sharding=sharding, by_branches=by_branches)
    recompute(model.layers, train.recompute)


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
