"""What a checkpoint of a run holds, and how it comes back."""

import logging
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from flashtrain import config as configs
from flashtrain.checkpoint import BackgroundSaver, CheckpointStore, Manifest, TensorEntry
from flashtrain.checkpoint.blocks import block_of
from flashtrain.data.tokenizer import BYTES, TOKENIZER, Tokenizer, load_tokenizer
from flashtrain.errors import UserError
from flashtrain.methods.progressive_sharing import ProgressiveSharing
from flashtrain.models.decoder import Decoder
from flashtrain.nn.shared_attention import SwitchableAttention
from flashtrain.train import carried
from flashtrain.train.optimizer import AdamW

log = logging.getLogger("flashtrain.train")

CHECKPOINTS = "checkpoints"


def _tensors(model: nn.Module, optimizer: AdamW) -> dict[str, dict[str, Tensor]]:
    return {"model": held(model), "optimizer": optimizer.state()}


def held(model: nn.Module) -> dict[str, Tensor]:
    """The parameters of which this rank holds something: not those that are another rank's alone."""
    return {name: p.detach() for name, p in model.named_parameters() if not p.is_meta}


def save(
    store: CheckpointStore | BackgroundSaver,
    step: int,
    model: nn.Module,
    optimizer: AdamW,
    config: Any,
    callbacks: dict[str, Any],
    skips: dict[str, Any] | None = None,
) -> None:
    """Write weights, moments, RNG states, the config, what the skip rule and each callback keep. Collective.

    The step is the data position too: samples are numbered over the whole run.
    """
    meta = {"config": configs.to_dict(config), "callbacks": callbacks, "skips": skips or {}}
    rng = {"cpu": torch.get_rng_state().numpy().tobytes().hex()}
    if torch.cuda.is_available():
        rng["cuda"] = torch.cuda.get_rng_state().numpy().tobytes().hex()
    store.save(step, _tensors(model, optimizer), meta, rng)


def restore(store: CheckpointStore, path: Path, model: nn.Module, optimizer: AdamW) -> Manifest:
    """Fill ``model`` and ``optimizer`` in place, on any mesh, and set the RNG states. Collective."""
    manifest = store.load(path, _tensors(model, optimizer))
    world, rank = dist.get_world_size(), dist.get_rank()
    if len(manifest.rank_meta) == world:
        states = manifest.rank_meta[rank]
        torch.set_rng_state(_rng_state(states["cpu"]))
        if "cuda" in states and torch.cuda.is_available():
            torch.cuda.set_rng_state(_rng_state(states["cuda"]))
    else:
        log.info(
            "the checkpoint was saved by %d ranks: RNG states start anew on %d",
            len(manifest.rank_meta),
            world,
        )
    return manifest


def _rng_state(text: str) -> Tensor:
    return torch.frombuffer(bytearray.fromhex(text), dtype=torch.uint8)


def changes(before: Any, now: Any, key: str = "") -> list[str]:
    """What differs between two configs as ``to_dict`` gives them, one "key: before -> now" each."""
    if isinstance(before, dict) and isinstance(now, dict):
        names = [*before, *(name for name in now if name not in before)]
        return [c for n in names for c in changes(before.get(n), now.get(n), f"{key}.{n}" if key else n)]
    return [] if before == now else [f"{key}: {before} -> {now}"]


def find(path: Path) -> Path:
    """The checkpoint that ``path`` means: itself, or the latest of a run's directory.

    Raises UserError if there is none.
    """
    for folder in (path, path / CHECKPOINTS):
        if (folder / "manifest.json").is_file():
            return folder
        if folder.is_dir() and (latest := CheckpointStore(folder).latest()) is not None:
            return latest
    raise UserError(f"there is no checkpoint in {path}: give a checkpoint or the --out of a run")


def model_config(path: Path) -> Decoder.Config:
    """The model of checkpoint ``path``. Raises UserError if its manifest does not say."""
    meta = CheckpointStore(path.parent).read_manifest(path).meta
    try:
        return configs.from_dict(Decoder.Config, meta["config"]["model"])
    except (KeyError, TypeError):
        reason = "does not say what its model is: it was not saved by a run"
        raise UserError(f"checkpoint {path} {reason}") from None


def load_weights(path: Path, model: nn.Module, new: Collection[str] = ()) -> None:
    """Fill ``model`` in place, on any mesh, rounding where its dtype is narrower. Collective.

    All but its parameters ``new``, which the checkpoint has not.

    Packed projections of a checkpoint are cut in two for layers that have them apart, since they may share.
    Raises UserError if the checkpoint is damaged or of another model.
    """
    store = CheckpointStore(path.parent)
    stored = store.read_manifest(path).tensors.get("model", {})
    targets = {name: weight for name, weight in held(model).items() if name not in new}
    apart = _apart(model, stored)
    read: dict[str, Tensor] = {packed: empty for packed, empty, _ in apart.values()}
    for name, target in targets.items():
        if name in apart:
            continue
        dtype = getattr(torch, stored[name].dtype, None) if name in stored else None
        differs = isinstance(dtype, torch.dtype) and dtype != target.dtype
        read[name] = torch.empty_like(target, dtype=dtype) if differs else target
    store.load(path, {"model": read})
    for name, target in targets.items():
        if name in apart:
            _, packed, cut = apart[name]
            _take(name, target, cut(packed)[name.split(".")[-2]])
        elif read[name] is not target:
            target.copy_(read[name])


_Apart = tuple[str, Tensor, Callable[[Tensor], dict[str, Tensor]]]


def _apart(model: nn.Module, stored: Mapping[str, TensorEntry]) -> dict[str, _Apart]:
    """Parameters of ``model`` that are part of a packed one in the checkpoint: that one's name, memory for
    it whole, and what cuts it.
    """
    found: dict[str, _Apart] = {}
    for name, module in model.named_modules():
        for kind in ("weight", "bias") if isinstance(module, SwitchableAttention) else ():
            if (packed := f"{name}.qkv.{kind}") not in stored:
                continue
            pieces = [module.get_parameter(f"{piece}.{kind}") for piece in module.names]
            shape = (sum(piece.shape[0] for piece in pieces), *pieces[0].shape[1:])
            empty = torch.empty(shape, dtype=getattr(torch, stored[packed].dtype))
            for piece in module.names:
                found[f"{name}.{piece}.{kind}"] = packed, empty, module.pieces
    return found


def _take(name: str, target: Tensor, whole: Tensor) -> None:
    """Fill this rank's rows of ``target`` from those of ``whole``."""
    block = block_of(name, target)
    if block is not None:
        block.local.copy_(whole[block.offset[0] :][: block.local.shape[0]])


def load_model(path: Path) -> tuple[Decoder, dict[str, Any]]:
    """The whole model of checkpoint ``path`` on this process, and the config of the run that saved it.

    For a process without torch.distributed. As many layers share as did when it was saved. Raises UserError
    if the checkpoint is damaged.
    """
    store = CheckpointStore(path.parent)
    model = Decoder(model_config(path))
    config = store.read_manifest(path).meta["config"]
    model.to(getattr(torch, config["train"]["dtype"]))
    store.load(path, {"model": {name: p.detach() for name, p in model.named_parameters()}})
    trained = store.read_manifest(path).meta.get("callbacks", {}).get(ProgressiveSharing.__name__)
    if trained is not None:
        model.share(trained["shared"])
    return model.eval(), config


def load_tokenizer_of(path: Path, config: dict[str, Any]) -> Tokenizer:
    """The tokenizer of checkpoint ``path``: its run's, or the one that came with its weights.

    Raises UserError if the run used one and it is gone.
    """
    folder = carried.run_of(path) or path
    if (folder / TOKENIZER).is_file():
        return load_tokenizer(folder)
    came = carried.find(path)
    if came is not None and (came / TOKENIZER).is_file():
        return load_tokenizer(came)
    used = config.get("data", {}).get("tokenizer", BYTES)
    if used != BYTES:
        raise UserError(f"{folder / TOKENIZER} is missing: copy it from {used}")
    return load_tokenizer(BYTES)
