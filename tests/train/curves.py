"""Whole runs of the trainer in forked ranks, and how far their losses may be from those of one rank."""

import contextlib
import logging
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch.distributed as dist

from flashtrain import config as configs
from flashtrain import recipes
from flashtrain.train import ranks
from flashtrain.train.summary import Summary
from flashtrain.train.trainer import Trainer
from tests.distributed import run_distributed
from tests.train.runs import trajectory

# Steps in which weights have moved too little to differ, and how far losses and norms may be apart in them.
FIRST, LOSS_APART, NORM_APART = 5, 1e-3, 1e-2
# Later each run rounds its own way. What counts is the mean over a few steps, in nats: what one rank alone
# shows between runs that add in other orders, and no less than the floor. (100 steps of 1 M parameters are
# 0.0006 away at most on meshes of up to 4 CPU ranks, and 0.025 with a learning rate that is 5% higher.)
AVERAGED, FLOOR, MULTIPLE = 10, 0.01, 3.0


class Curve(NamedTuple):
    """(step, loss, gradient norm) of every step, to the bit; and what rank 0 logged."""

    steps: list[tuple[int, float, float]]
    log: str

    def means(self) -> list[float]:
        """Mean losses over each ``AVERAGED`` steps in a row, or all if there are fewer."""
        losses = [loss for _, loss, _ in self.steps]
        width = min(AVERAGED, len(losses))
        return [sum(losses[i : i + width]) / width for i in range(len(losses) - width + 1)]

    def transports(self) -> set[tuple[int, str]]:
        """Of each group of two ranks or more: how many they are, and what moves their bytes."""
        found = re.findall(r"^transport for (\d+) ranks of group \S+: (\w+)", self.log, re.MULTILINE)
        return {(int(ranks), name) for ranks, name in found if int(ranks) > 1}

    def distance(self, other: "Curve") -> float:
        """The most that the mean losses of two runs differ, in nats."""
        return max(abs(a - b) for a, b in zip(self.means(), other.means(), strict=True))


def assert_alike(found: Curve, alone: Curve, noise: float) -> None:
    """``noise``: the distance between runs of one rank that differ in the order of additions alone."""
    assert len(found.steps) == len(alone.steps)
    for (step, loss, norm), (_, wanted, norm_alone) in list(zip(found.steps, alone.steps, strict=True))[
        :FIRST
    ]:
        assert abs(loss - wanted) <= LOSS_APART * wanted, f"step {step}: loss {loss}, alone {wanted}"
        assert abs(norm - norm_alone) <= NORM_APART * norm_alone, (
            f"step {step}: norm {norm}, alone {norm_alone}"
        )
    apart, most = found.distance(alone), max(FLOOR, MULTIPLE * noise)
    assert apart <= most, f"mean losses are {apart:.4f} nats apart; {most:.4f} is allowed, noise {noise:.4f}"


class Runs:
    """Runs of ``recipes.demo`` with ``settings`` by dotted names, each once and in ranks of its own.

    Ways of products that a run has measured are kept for the later ones, and for no others.
    """

    def __init__(self, folder: Path, settings: Mapping[str, object], timeout: float) -> None:
        self._folder, self._settings, self._timeout = folder, settings, timeout
        self._curves: dict[str, Curve] = {}

    def of(self, tensor: int = 1, data: int = 1, again: int = 0, **changes: object) -> Curve:
        """The curve on that mesh, ``changes`` named as in ``runs.command``; ``again`` numbers repetitions."""
        name = f"{tensor}x{data} {changes} {again}"
        if name not in self._curves:
            named = {key.replace("__", "."): value for key, value in changes.items()}
            words = [f"--{key}={value}" for key, value in {**self._settings, **named}.items()]
            config = configs.resolve(recipes.demo(), overrides=words)
            config = replace(config, parallel=replace(config.parallel, tensor=tensor, data=data))
            config.validate()
            out = self._folder / str(len(self._curves))
            logs = run_distributed(
                _train, config.parallel.world, config, out, self._folder / "cache", timeout=self._timeout
            )
            self._curves[name] = Curve(trajectory(out), logs[0])
            shutil.rmtree(out / "checkpoints")
        return self._curves[name]


class _Lines(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def _train(rank: int, world: int, config: Trainer.Config, out: Path, cache: Path) -> str:
    """Train as under torchrun, but ranks meet in a file and show nothing; -> this rank's log."""
    dist.destroy_process_group()  # the trainer makes its own, with NCCL where there are GPUs
    out.mkdir(exist_ok=True)
    ranks.agent_store = lambda timeout: dist.FileStore(str(out / "store"), world)
    Summary.show = lambda self: None  # type: ignore[method-assign]
    os.environ["XDG_CACHE_HOME"] = str(cache)
    handler = _Lines()
    logging.getLogger("flashtrain").addHandler(handler)
    with (
        (out / f"rank-{rank}.txt").open("w") as file,
        contextlib.redirect_stdout(file),
        contextlib.redirect_stderr(file),
    ):
        Trainer(config, out).run()
    return "\n".join(handler.lines)
