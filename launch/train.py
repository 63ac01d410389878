"""``flashtrain train``: settings from a recipe, a file and the command line; then the ranks, then the run."""

import argparse
import importlib
import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flashtrain.errors import UserError
from flashtrain.launch import garbage

if TYPE_CHECKING:
    from flashtrain.train.trainer import Trainer


def add_parser(subparsers: Any) -> None:
    """Register the ``train`` subcommand."""
    parser = subparsers.add_parser(
        "train",
        help="train a model from a recipe",
        usage="flashtrain train RECIPE [--config FILE.toml] [--out DIR] [--dotted.key VALUE ...]",
        description="Train a model. Settings come from the recipe, then the file, then the command line.",
        epilog=(
            "The same command on a folder with a checkpoint goes on from there. Without torchrun, "
            "parallel.tensor x parallel.data x parallel.branches x parallel.context local ranks are started. "
            "Under torchrun, the ranks that it started are used; flashtrain nodes prints how to start them."
        ),
    )
    parser.add_argument(
        "recipe",
        metavar="RECIPE",
        help=(
            "where settings start: demo or continue-pretraining or gqkva or gqkva-1b or epas or echo or "
            "epas-1b or echo-1b or hybrid or flowhn or flowhn-350m or llama-1b or llama-8b or llama-70b or "
            "llama-70b-4layers"
        ),
    )
    parser.add_argument("--config", type=Path, metavar="FILE.toml", help="settings to change, as TOML")
    parser.add_argument("--out", type=Path, metavar="DIR", help="the run's folder (default: runs/RECIPE)")
    parser.add_argument_group(
        "settings",
        "--dotted.key VALUE changes one setting, such as --train.steps 500. A run writes all of its own to "
        "config.toml in its folder, which --config takes.",
    )
    parser.set_defaults(run=run, takes_settings=True)


def run(args: argparse.Namespace) -> int:
    """Resolve and check the settings, then train: here, on the ranks of torchrun, or on new local ranks."""
    config = resolve(args)
    here = on_these_ranks(config.parallel)
    config.check_room(int(os.environ.get("LOCAL_WORLD_SIZE", 1)) if here else config.parallel.world)
    if not here:
        from flashtrain.launch import ranks

        return ranks.launch(config.parallel.world, _words(args))
    with garbage.none_in_imports():
        from flashtrain.train.trainer import Trainer

        if config.parallel.world > 1:
            importlib.import_module("torch._dynamo")  # DTensor and FSDP2 do so at their first use

    Trainer(config, _out(args)).run()
    return 0


def on_these_ranks(parallel: Any) -> bool:
    """Whether this process is one of the ranks that ``parallel`` asks for; else they are to be started.

    Raises UserError if torchrun has started another number of them.
    """
    world = parallel.world
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        return bool(world == 1)
    started = int(os.environ["WORLD_SIZE"])
    if started != world:
        raise UserError(f"{parallel} asks for {world} ranks, but torchrun started {started}")
    return True


def resolve(args: argparse.Namespace, data: bool = True) -> "Trainer.Config":
    """The settings of the run, checked; those of its ``data`` only if they are used. Raises UserError."""
    with garbage.none_in_imports():
        from flashtrain import config, recipes

    if args.recipe not in recipes.RECIPES:
        guess = config.nearest(args.recipe, recipes.RECIPES)
        raise UserError(
            f"unknown recipe {args.recipe}; the nearest is {guess} (a recipe comes before settings)"
        )
    recipe = recipes.RECIPES[args.recipe]()
    resolved = config.resolve(recipe, args.config, args.settings)
    if resolved.train.init_from is not None:
        # The model's settings then come from the weights, and those given here change them.
        recipe = replace(recipe, model=_model(resolved.train.init_from, _out(args)))
        resolved = config.resolve(recipe, args.config, args.settings)
    resolved.validate() if data else resolved.validate(data=False)
    return resolved


def _model(init_from: Path, out: Path) -> Any:
    """The config of the model in ``init_from``, or of the run in ``out`` that has left it behind."""
    from flashtrain.checkpoint import CheckpointStore
    from flashtrain.checkpoint.manifest import MANIFEST
    from flashtrain.train import snapshot

    if (out / MANIFEST).exists():
        raise UserError(f"{out} is a checkpoint itself: choose another --out")
    own = CheckpointStore(out / snapshot.CHECKPOINTS).latest()
    return snapshot.model_config(own or snapshot.find(init_from))


def _out(args: argparse.Namespace) -> Path:
    return args.out or Path("runs") / args.recipe


def _words(args: argparse.Namespace) -> list[str]:
    """The command line that means ``args``."""
    file = [f"--config={args.config}"] if args.config else []
    return ["train", args.recipe, *file, f"--out={_out(args)}", *args.settings]
