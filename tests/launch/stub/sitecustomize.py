"""Recipes and a trainer that do as they are told, in every process with this folder on its PYTHONPATH.

Python imports a module of this name when it starts, so the ranks that a launcher starts are covered.
"""

import os
import signal
import sys
import time
import types
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import flashtrain
from flashtrain.errors import TransportError, UserError


@dataclass(frozen=True, kw_only=True)
class Parallel:
    tensor: int = 1
    data: int = 1

    @property
    def world(self) -> int:
        return self.tensor * self.data

    def __str__(self) -> str:
        return f"parallel.tensor {self.tensor} x parallel.data {self.data}"


@dataclass(frozen=True, kw_only=True)
class Act:
    """What ``rank`` (or, at -1, every rank) does once all ranks are there; the others wait for ever."""

    how: Literal["finish", "user_error", "transport_error", "exit", "kill"] = "finish"
    rank: int = -1


@dataclass(frozen=True, kw_only=True)
class Train:
    init_from: Path | None = None


class Trainer:
    @dataclass(frozen=True, kw_only=True)
    class Config:
        parallel: Parallel = field(default_factory=Parallel)
        act: Act = field(default_factory=Act)
        train: Train = field(default_factory=Train)
        invalid: bool = False

        def validate(self) -> None:
            if self.invalid:
                raise UserError("invalid is true; leave it false")

        def check_room(self, ranks: int) -> None:
            pass

    def __init__(self, config: "Trainer.Config", out: Path) -> None:
        self.config, self.out = config, out

    def run(self) -> None:
        act, rank = self.config.act, int(os.environ.get("RANK", "0"))
        self.out.mkdir(parents=True, exist_ok=True)
        part = self.out / f"rank{rank}.part"
        part.write_text(f"{os.getpid()} {os.environ.get('WORLD_SIZE')} {os.environ.get('OMP_NUM_THREADS')}")
        part.rename(part.with_suffix(""))
        deadline = time.monotonic() + 30
        while len(list(self.out.glob("rank?"))) < self.config.parallel.world:
            if time.monotonic() > deadline:
                raise RuntimeError(f"rank {rank} waited in vain for the others")
            time.sleep(0.02)
        if act.rank not in (-1, rank):
            time.sleep(600)
        match act.how:
            case "user_error":
                raise UserError("there is no corpus")
            case "transport_error":
                raise TransportError(f"rank {rank}: peer died")
            case "exit":
                sys.exit(3)
            case "kill":
                os.kill(os.getpid(), signal.SIGKILL)


def install() -> dict[str, types.ModuleType]:
    """The stand-in modules by name."""
    recipes = types.ModuleType("flashtrain.recipes")
    recipes.RECIPES = {"one": Trainer.Config, "two": lambda: Trainer.Config(parallel=Parallel(tensor=2))}  # type: ignore[attr-defined]
    trainer = types.ModuleType("flashtrain.train.trainer")
    trainer.Trainer = Trainer  # type: ignore[attr-defined]
    return {module.__name__: module for module in (recipes, trainer)}


if __name__ == "sitecustomize":
    train = types.ModuleType("flashtrain.train")
    modules = install()
    sys.modules.update({"flashtrain.train": train, **modules})
    flashtrain.recipes = modules["flashtrain.recipes"]  # type: ignore[attr-defined]
