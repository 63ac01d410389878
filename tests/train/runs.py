"""Start training runs as a user would, in processes of their own, and read what they wrote."""

import json
import os
import subprocess
import sys
from pathlib import Path

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
    return subprocess.run(
        command(out, text, **settings), env=environment(), capture_output=True, text=True, timeout=timeout
    )


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
