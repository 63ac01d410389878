"""Runs on several hosts: the commands that start them, who is where, and the examination before."""

import json
import os
import platform
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from flashtrain.errors import UserError
from flashtrain.launch import main, pairs
from flashtrain.train import places
from flashtrain.train.places import Place
from tests.distributed import run_distributed
from tests.train.runs import command, environment, metrics, write_text


def spread(*ranks_of_nodes: int) -> list[Place]:
    found: list[Place] = []
    for node, ranks in enumerate(ranks_of_nodes):
        found += [Place(len(found) + n, node, f"h{node}", n, "cpu", 100 + n) for n in range(ranks)]
    return found


def test_ranks_are_counted_after_they_have_met() -> None:
    places.check(spread(2, 2), nodes=2)
    places.check(spread(2, 2), nodes=None)
    with pytest.raises(
        UserError, match=r"^nodes is 3, but the 4 ranks run on 2: h0 \(2 ranks\), h1 \(2 ranks\)$"
    ):
        places.check(spread(2, 2), nodes=3)
    with pytest.raises(UserError, match=r"as many processes on every node.*h0 \(3 ranks\), h1 \(1 ranks\)"):
        places.check(spread(3, 1), nodes=2)
    assert places.describe(spread(1, 2))[1] == (
        "node 1, h1: rank 1 (local 0, cpu, pid 100), rank 2 (local 1, cpu, pid 101)"
    )


NODES = ["nodes", "torchrun", "--nodes", "2", "--processes", "2", "--head", "n1"]


def test_the_command_of_each_host_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--interface", "ib0", "--", "train", "demo", "--parallel.data", "2", "--out", "a b"]
    assert main.main([*NODES, *words]) == 0
    line = capsys.readouterr().out.splitlines()[-1]
    typed = shlex.split(line)
    assert typed[:2] == ["GLOO_SOCKET_IFNAME=ib0", "NCCL_SOCKET_IFNAME=ib0"]
    assert typed[typed.index("--rdzv-endpoint") + 1] == "n1:29500"
    last = typed[typed.index("flashtrain.launch.main") + 1 :]
    assert last == ["train", "demo", "--parallel.data", "2", "--out", "a b", "--nodes", "2"]
    assert main.main([*NODES, "--", "doctor", "--nodes"]) == 0
    assert capsys.readouterr().out.endswith("flashtrain.launch.main doctor --nodes\n")


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ([*NODES, "--", "train", "demo"], "asks for 2 ranks, but 2 nodes x 2 processes are 4"),
        ([*NODES, "--", "train", "dmo"], "unknown recipe dmo"),
        (
            [*NODES, "--", "sample", "x", "--prompt", "y"],
            "give the command to start, train or doctor --nodes",
        ),
        ([*NODES], "give the command to start"),
        ([*NODES, "--hed", "n1"], "unknown argument --hed"),
        ([*NODES[:-2], "--", "doctor", "--nodes"], "--head is missing"),
        (["nodes", "slurm", "--nodes", "0", "--processes", "2"], "--nodes is 0"),
        ([*NODES, "--port", "99999", "--", "train", "demo"], "--port is 99999"),
        ([*NODES, "--restarts", "-1", "--", "train", "demo"], "--restarts is -1"),
    ],
)
def test_what_cannot_start_is_one_line(
    words: list[str], line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main.main(words) == 2
    error = capsys.readouterr().err
    assert line in error
    assert error.count("\n") == 1


def test_the_batch_script_trains(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """On one host, whose Slurm is two stand-ins."""
    text, out = write_text(tmp_path / "text.txt"), tmp_path / "out"
    training = command(out, text, train__steps=2)[3:]
    started = ["nodes", "slurm", "--nodes", "1", "--processes", "2", "--port", "29417"]
    assert main.main([*started, "--", *training]) == 0
    script = tmp_path / "run.sbatch"
    script.write_text(capsys.readouterr().out)
    assert "#SBATCH --nodes=1\n" in script.read_text()
    assert "#SBATCH --gpus-per-node=2\n" in script.read_text()
    assert "export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=110\n" in script.read_text()
    for name, body in (("scontrol", "echo localhost; echo other"), ("srun", 'shift; exec "$@"')):
        stub = tmp_path / "bin" / name
        stub.parent.mkdir(exist_ok=True)
        stub.write_text(f"#!/bin/bash\n{body}\n")
        stub.chmod(0o755)
    path = f"{tmp_path / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", str(script)],
        env=environment() | {"PATH": path, "SLURM_JOB_NODELIST": "x", "SLURM_JOB_ID": "7"},
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert len(metrics(out)) == 2
    assert "node 0, " in done.stderr


@pytest.mark.parametrize("world", range(2, 9))
def test_every_pair_meets_once_and_nobody_in_two_pairs_at_a_time(world: int) -> None:
    met = []
    for pairs_of_round in pairs.rounds(world):
        ranks = [rank for pair in pairs_of_round for rank in pair]
        assert len(set(ranks)) == len(ranks)
        met += pairs_of_round
    assert sorted(met) == [(a, b) for a in range(world) for b in range(a + 1, world)]


def _examined(rank: int, world: int, spoilt: bool) -> dict[str, Any]:
    if spoilt and rank == 1:
        clock = time.time
        time.time = lambda: clock() + 30  # type: ignore[assignment]
        platform.python_version = lambda: "3.9.1"
    return pairs.examine(torch.device("cpu"))


def test_ranks_that_fit_together_have_no_problem() -> None:
    facts = run_distributed(_examined, 3, False)
    assert facts[0] == facts[1] == facts[2]
    assert facts[0]["problems"] == []
    assert [(pair["from"], pair["to"]) for pair in facts[0]["pairs"]] == [(0, 1), (0, 2), (1, 2)]
    for pair in facts[0]["pairs"]:
        assert 0 < pair["latency_s"] < 1
        assert pair["gigabytes_per_s"] > 0
    json.dumps(facts[0])


def test_a_wrong_clock_and_another_version_are_found() -> None:
    host = platform.node()
    version, clock = run_distributed(_examined, 2, True)[0]["problems"]
    assert version.startswith(
        f"python differs: {platform.python_version()} on {host} (rank 0); 3.9.1 on {host}"
    )
    assert clock.startswith(f"the clock of {host} is 30.0 s ahead of")


def test_a_slow_pair_of_hosts_is_found() -> None:
    ranks = [{"host": f"h{n}"} for n in range(3)]
    versions = [dict.fromkeys(pairs.SAME_EVERYWHERE)] * 3
    speeds = {(0, 1): 10.0, (0, 2): 11.0, (1, 2): 2.0}
    measured = [{"from": a, "to": b, "gigabytes_per_s": rate} for (a, b), rate in speeds.items()]
    facts = {"places": ranks, "versions": versions, "clock_offset_s": [[0, 0]] * 3, "pairs": measured}
    (problem,) = pairs.problems(facts)
    assert problem.startswith("rank 1 (h1) and rank 2 (h2) exchange 2.00 GB/s where the median pair")
    measured[-1]["gigabytes_per_s"] = 9.0
    assert pairs.problems(facts) == []


def test_one_rank_has_nobody_to_compare_with() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "flashtrain.launch.main", "doctor", "--nodes"],
        env=environment(), capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 2
    assert "doctor --nodes compares ranks: start it on every host" in done.stderr
