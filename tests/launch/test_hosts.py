"""Two hosts of two ranks: tensor parallel inside a host, data parallel across; and the cable is cut."""

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from torch.distributed.tensor import DTensor

from flashtrain import config as configs
from flashtrain.comm import transport
from flashtrain.recipes import demo
from flashtrain.train.trainer import Trainer
from tests.distributed import run_distributed
from tests.launch.hosts import NAMES, Hosts, NamespacesForbidden
from tests.train.runs import command, environment, trajectory, write_text
from tests.train.test_fault_plan import saved

TIMEOUT = 3.0
SETTINGS: dict[str, Any] = {
    "train__steps": 30,
    "parallel__data": 2,
    "checkpoint__every": 4,
    "comm__timeout": TIMEOUT,
    "nodes": 2,
}


@pytest.fixture(scope="module")
def hosts() -> Iterator[Hosts]:
    try:
        with Hosts() as both:
            yield both
    except NamespacesForbidden as error:
        pytest.skip(f"no namespaces here: {error}")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text") / "text.txt")


def start(hosts: Hosts, words: list[str], port: int, each: int = 2) -> list[subprocess.Popen[str]]:
    """``words`` of the flashtrain command on ``each`` ranks of both hosts, started by torchrun."""
    torchrun = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nnodes",
        "2",
        "--nproc-per-node",
        str(each),
        "--rdzv-backend",
        "c10d",
        "--rdzv-id",
        "test",
    ]
    torchrun += ["--rdzv-endpoint", f"{NAMES[0]}:{port}"]
    return [
        subprocess.Popen(
            hosts.command(
                host,
                [*torchrun, "-m", "flashtrain.launch.main", *words],
            ),
            env=environment() | {"GLOO_SOCKET_IFNAME": "eth0"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for host in range(2)
    ]


def ranks_of(launchers: list[subprocess.Popen[str]]) -> list[psutil.Process]:
    found = [p for one in launchers for p in psutil.Process(one.pid).children(recursive=True)]
    return [p for p in found if "RANK" in p.environ()]


def ended(rank: psutil.Process) -> bool:
    """A launcher that waits for the other host leaves ranks that have ended as zombies."""
    return not rank.is_running() or rank.status() == psutil.STATUS_ZOMBIE


def wait_for_step(out: Path, step: int, launchers: list[subprocess.Popen[str]]) -> None:
    deadline = time.monotonic() + 90
    while not (out / "metrics.jsonl").exists() or len(trajectory(out)) < step:
        for launcher in launchers:
            assert launcher.poll() is None, launcher.communicate()[1]
        assert time.monotonic() < deadline, f"step {step} was not reached"
        time.sleep(0.05)


def unbroken(rank: int, world: int, options: list[str], out: Path) -> tuple[list[Any], dict[str, bytes]]:
    """The same run on four ranks of this machine, without a stop and without a file."""
    config: Trainer.Config = configs.resolve(demo(), None, options)
    transport.configure(config.comm)
    trainer = Trainer(config, out)
    trainer._build(torch.device("cpu"))
    steps = []
    for step in range(1, config.train.steps + 1):
        rate = config.optimizer.learning_rate_at(step, config.train.steps)
        result = trainer.step(step, rate, trainer.batches.of(step))
        steps.append((step, result.loss, result.grad_norm))
    tensors = {
        f"{part}/{name}": tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        for part, named in (
            ("model", dict(trainer.model.named_parameters())),
            ("optimizer", trainer.optimizer.state()),
        )
        for name, tensor in named.items()
    }
    return steps, {name: tensor.detach().contiguous().numpy().tobytes() for name, tensor in tensors.items()}


def test_a_cut_cable_ends_every_rank_and_the_run_goes_on_to_the_same_bits(
    hosts: Hosts, text: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    words = command(out, text, **SETTINGS)[3:]
    launchers = start(hosts, words, 29400)
    try:
        wait_for_step(out, 6, launchers)
        ranks = ranks_of(launchers)
        assert len(ranks) == 4
        hosts.cut()
        started = time.monotonic()
        while not all(ended(rank) for rank in ranks):
            assert time.monotonic() - started < TIMEOUT + 15, "a rank outlived the time-out by far"
            time.sleep(0.1)
        assert time.monotonic() - started > TIMEOUT / 2, (
            "the ranks ended before the time-out: for another reason"
        )
    finally:
        # The launchers themselves wait longer for each other; their own patience is not ours to test.
        for launcher in launchers:
            for process in psutil.Process(launcher.pid).children(recursive=True):
                process.kill()
            launcher.kill()
    told = [launcher.communicate(timeout=30)[1] for launcher in launchers]
    # Who gives up first ends its neighbours: their launcher stops them, or they miss it before the cable.
    across = False
    for host, errors in enumerate(told):
        lines = [line for line in errors.splitlines() if line.startswith("flashtrain: error: ")]
        assert lines, errors
        assert all("peer rank" in line for line in lines), errors
        pairs = [(f"rank {2 * host + n}", f"peer rank {2 - 2 * host + n}") for n in (0, 1)]
        across |= any(own in line and peer in line for line in lines for own, peer in pairs)
    assert across, told
    assert len(trajectory(out)) < SETTINGS["train__steps"]

    hosts.mend()
    again = start(hosts, words, 29401)
    (shown, log), (_, other) = (launcher.communicate(timeout=120) for launcher in again)
    assert [launcher.returncode for launcher in again] == [0, 0], log + other
    for node, name in enumerate(NAMES):
        assert f"node {node}, {name}: rank {2 * node} (local 0, cpu, pid " in log
    assert "tensor parallel over 2 ranks by host and data parallel over 2 ranks by group over gloo" in shown

    overrides = words[words.index("--out") + 2 :]
    steps, tensors = run_distributed(unbroken, 4, overrides, tmp_path / "elsewhere")[0]
    assert trajectory(out) == steps
    last = {name: tensor.numpy().tobytes() for name, tensor in saved(out).items()}
    assert [name for name, content in last.items() if content != tensors[name]] == []


def test_the_examination_before_a_run_sees_every_pair_across_the_cable(hosts: Hosts) -> None:
    launchers = start(hosts, ["doctor", "--nodes", "--json"], 29402, each=1)
    (shown, log), (_, other) = (launcher.communicate(timeout=120) for launcher in launchers)
    assert [launcher.returncode for launcher in launchers] == [0, 0], log + other
    facts = json.loads(shown)
    assert facts["problems"] == []
    assert [place["host"] for place in facts["places"]] == list(NAMES)
    assert [(pair["from"], pair["to"]) for pair in facts["pairs"]] == [(0, 1)]
