"""A run that is killed and started again is the run that was not killed; and so it is on other meshes."""

import random
import signal
import subprocess
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import torch
from torch.distributed.tensor import DTensor

from flashtrain.checkpoint import CheckpointStore
from flashtrain.comm import transport
from flashtrain.data import Corpus
from flashtrain.models.decoder import Decoder
from flashtrain.parallel.mesh import Degrees
from flashtrain.train import snapshot
from flashtrain.train.settings import Training
from flashtrain.train.trainer import Trainer
from tests.distributed import run_distributed
from tests.train.runs import command, environment, metrics, train, trajectory, write_text

STEPS = 40


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text") / "text.txt")


def _ranks(parent: int) -> list[psutil.Process]:
    """The processes that train, of the run that ``parent`` started."""
    return [p for p in psutil.Process(parent).children(recursive=True) if "RANK" in _environment(p)]


def _environment(process: psutil.Process) -> dict[str, str]:
    try:
        return process.environ()
    except psutil.Error:
        return {}


def _wait_for_step(out: Path, step: int, seconds: float = 90) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        file = out / "metrics.jsonl"
        if file.exists() and file.read_text().count("\n") >= step:
            return
        time.sleep(0.02)
    raise AssertionError(f"step {step} was not reached")


def test_a_killed_rank_and_the_same_command_again_give_the_unbroken_run(text: Path, tmp_path: Path) -> None:
    settings = {"train__steps": STEPS, "checkpoint__every": 4}
    unbroken = train(tmp_path / "unbroken", text, **settings)
    assert unbroken.returncode == 0, unbroken.stderr

    out = tmp_path / "broken"
    victim_step = random.Random().randrange(2, STEPS - 6)
    with subprocess.Popen(
        command(out, text, **settings),
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as run:
        _wait_for_step(out, victim_step)
        ranks = _ranks(run.pid)
        assert len(ranks) == 2
        victim = ranks[victim_step % 2]
        victim.send_signal(signal.SIGKILL)
        started = time.monotonic()
        _, errors = run.communicate(timeout=60)
    assert run.returncode not in (0, 2), "a killed rank is a failure, and not one of input"
    assert time.monotonic() - started < 45
    assert "SIGKILL" in errors or "died" in errors, errors
    assert not [p for p in ranks if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]
    assert len(metrics(out)) < STEPS, "the run ended before the kill"

    again = train(out, text, **settings)
    assert again.returncode == 0, again.stderr
    assert trajectory(out) == trajectory(tmp_path / "unbroken"), f"killed at step {victim_step}"
    assert [m["step"] for m in metrics(out)] == list(range(1, STEPS + 1))
    ends = [
        snapshot.load_model(snapshot.find(folder))[0].state_dict() for folder in (out, tmp_path / "unbroken")
    ]
    for name, weights in ends[0].items():
        assert torch.equal(weights, ends[1][name]), name


def test_a_finished_run_is_not_trained_again(text: Path, tmp_path: Path) -> None:
    settings = {"train__steps": 4, "parallel__tensor": 1}
    assert train(tmp_path, text, **settings).returncode == 0
    before = trajectory(tmp_path)
    again = train(tmp_path, text, **settings)
    assert again.returncode == 0, again.stderr
    assert "held-out loss" in again.stdout
    assert trajectory(tmp_path) == before


def test_a_checkpoint_of_another_model_is_refused(text: Path, tmp_path: Path) -> None:
    assert train(tmp_path, text, train__steps=2, parallel__tensor=1).returncode == 0
    kept = {f: f.read_bytes() for f in tmp_path.rglob("*") if f.is_file() and "tensorboard" not in f.parts}
    other = train(tmp_path, text, train__steps=4, parallel__tensor=1, model__hidden=128)
    assert other.returncode == 2, other.stderr
    assert "another model" in other.stderr
    lines = [line for line in other.stderr.splitlines() if line.startswith("flashtrain: error:")]
    assert len(lines) == 1
    assert "64" in lines[0]
    assert "128" in lines[0]
    for file, content in kept.items():
        assert file.read_bytes() == content, f"{file} changed"


def _config(text: Path, degrees: Degrees, dtype: str) -> Trainer.Config:
    return Trainer.Config(
        model=Decoder.Config(hidden=64, layers=2, heads=8, kv_heads=4, mlp_width=256),
        data=Corpus.Config(source=str(text)),
        train=Training(steps=20, batch=4, sequence=32, dtype=dtype, evaluation_windows=8),
        parallel=degrees,
        comm=transport.Settings(timeout=60),
    )


def _move(rank: int, world: int, config: Trainer.Config, out: str, steps: int) -> dict[str, bytes]:
    """Resume from ``out`` if there is something, train ``steps``, save; all tensors as bytes."""
    transport.configure(config.comm)
    trainer = Trainer(config, Path(out))
    trainer._build(torch.device("cpu"))
    first, _ = trainer._resume()
    for step in range(first, first + steps):
        trainer.step(step, 1e-3, trainer.batches.of(step))
    snapshot.save(
        trainer.store, first + steps - 1 if steps else first, trainer.model, trainer.optimizer, config, []
    )
    tensors = snapshot.held(trainer.model) | trainer.optimizer.state()
    return {
        name: (t.full_tensor() if isinstance(t, DTensor) else t)
        .detach()
        .contiguous()
        .view(torch.uint8)
        .numpy()
        .tobytes()
        for name, t in tensors.items()
    }


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_resuming_on_other_meshes_gives_the_same_bits(text: Path, tmp_path: Path, dtype: str) -> None:
    before = run_distributed(_move, 2, _config(text, Degrees(tensor=2), dtype), str(tmp_path), 3)[0]
    for degrees in (Degrees(data=2), Degrees(tensor=2, data=2), Degrees(), Degrees(tensor=2)):
        for after in run_distributed(_move, degrees.world, _config(text, degrees, dtype), str(tmp_path), 0):
            assert after == before, degrees


def test_a_flipped_byte_in_a_checkpoint_is_named(text: Path, tmp_path: Path) -> None:
    assert train(tmp_path, text, train__steps=2, parallel__tensor=1).returncode == 0
    path = CheckpointStore(tmp_path / "checkpoints").latest()
    assert path is not None
    damaged = next((path / "optimizer").glob("*.safetensors"))
    content = bytearray(damaged.read_bytes())
    content[-3] ^= 1
    damaged.write_bytes(content)
    again = train(tmp_path, text, train__steps=4, parallel__tensor=1)
    assert again.returncode == 2, again.stderr
    assert damaged.name in again.stderr


def test_settings_that_changed_since_the_checkpoint_are_listed() -> None:
    config = Trainer.Config()
    changed = replace(config, train=replace(config.train, seed=3))
    from flashtrain.config import to_dict

    assert snapshot.changes(to_dict(config), to_dict(changed)) == ["train.seed: 0 -> 3"]
    assert snapshot.changes(to_dict(config), to_dict(config)) == []
