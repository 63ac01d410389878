"""Start training runs in processes of their own, and read what they wrote.

``command`` is what a user types, for ``subprocess``. ``train`` runs the same words on ranks set up as
torchrun does it, but forked with flashtrain imported: most of a tiny run's time is that of its imports.
"""

import json
import math
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from tests.distributed import context

# Small enough for seconds, with every kind of layer in it.
TINY = {
    "model.hidden": 64,
    "model.layers": 2,
    "model.heads": 8,
    "model.kv_heads": 4,
    "model.mlp_width": 256,
    "train.batch": 4,
    "train.sequence": 32,
    "train.evaluation_windows": 8,
    "optimizer.warmup": 5,
    "comm.timeout": 60,
}


def command(out: Path, text: Path, **settings: object) -> list[str]:
    """The command line of a tiny run; dots in names of ``settings`` are written as two underscores."""
    merged = {**TINY, "data.source": text, **{key.replace("__", "."): v for key, v in settings.items()}}
    options = [word for key, value in merged.items() for word in (f"--{key}", str(value))]
    return [sys.executable, "-m", "flashtrain.launch.main", "train", "demo", "--out", str(out), *options]


def environment() -> dict[str, str]:
    """The test's environment without what a launcher of ranks would set."""
    hidden = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    return {key: value for key, value in os.environ.items() if key not in hidden} | {"OMP_NUM_THREADS": "1"}


def train(
    out: Path, text: Path, timeout: float = 180, **settings: object
) -> subprocess.CompletedProcess[str]:
    """Run to the end; the caller checks the exit code."""
    degrees = {"tensor": 2, "data": 1, "branches": 1, "context": 1}
    world = math.prod(int(str(settings.get(f"parallel__{name}", one))) for name, one in degrees.items())
    return flashtrain(command(out, text, **settings)[3:], world, timeout)


def flashtrain(
    words: Sequence[str], world: int = 1, timeout: float = 180
) -> subprocess.CompletedProcess[str]:
    """``flashtrain WORDS`` on ``world`` ranks: an exit code other than 0 of any, and what all printed."""
    environments = [environment()]
    if world > 1:
        with socket.create_server(("127.0.0.1", 0)) as free:
            meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
        sizes = {"WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world)}
        environments = [
            environment() | meeting | sizes | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            for rank in range(world)
        ]
    with tempfile.TemporaryDirectory() as folder:
        shown = Path(folder, "stdout"), Path(folder, "stderr")
        ranks = [context.Process(target=_rank, args=(words, one, shown)) for one in environments]
        for rank in ranks:
            rank.start()
        deadline = time.monotonic() + timeout
        for rank in ranks:
            rank.join(deadline - time.monotonic())
        late = [rank for rank in ranks if rank.is_alive()]
        for rank in late:
            rank.kill()
            rank.join()
        stdout, stderr = (file.read_text() if file.exists() else "" for file in shown)
        if late:
            raise subprocess.TimeoutExpired(list(words), timeout, stdout, stderr)
        code = max((rank.exitcode or 0 for rank in ranks), key=abs)
        return subprocess.CompletedProcess(list(words), code, stdout, stderr)


def _rank(words: Sequence[str], environment: dict[str, str], shown: tuple[Path, Path]) -> None:
    for descriptor, file in enumerate(shown, 1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND), descriptor)
    os.environ.clear()
    os.environ.update(environment)
    from flashtrain.launch.main import main

    sys.exit(main(words))


def metrics(out: Path) -> list[dict]:
    """The lines of metrics.jsonl."""
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def trajectory(out: Path) -> list[tuple[int, float, float]]:
    """(step, loss, gradient norm) of every step, to the bit."""
    return [(m["step"], m["loss"], m["grad_norm"]) for m in metrics(out)]


def write_text(path: Path) -> Path:
    """A small corpus that does not depend on the machine."""
    lines = [
        f"line {n}: {'abcdefghij'[n % 10] * (n % 7 + 1)} {n * n % 97} {hash_word(n)}" for n in range(4000)
    ]
    path.write_text("\n".join(lines))
    return path


def hash_word(n: int) -> str:
    """A made-up word, the same everywhere."""
    state = n * 2654435761 % 2**32
    return "".join("etaoinshrdlu"[(state >> shift) % 12] for shift in range(0, 28, 4))
