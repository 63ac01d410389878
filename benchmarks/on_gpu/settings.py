"""What the benchmark of the GPUs measures, and its command line."""

import argparse
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import shapes
import torch

from flashtrain.errors import UserError

# M of the shapes that have goals, by W.
ROWS = {2: (4096, 8192), 4: (2048, 4096, 8192, 16384)}
PARTS = ("forward", "host", "backward", "dp", "graph")
# Copies by the switch itself would favour NCCL and torch on machines that have it on; the ops need none.
NO_MULTICAST = {
    "NCCL_NVLS_ENABLE": "0",
    "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1",
    "NVSHMEM_DISABLE_NVLS": "1",
}


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What is measured.

    ``seconds`` is the most that one part may take, ``patience`` the seconds without progress after which the
    run is given up. ``host_rows`` and ``backward_rows`` are M of those parts; ``trained`` and ``sequence``
    are what data parallelism trains, with each of ``batches`` sequences a rank. ``calls`` is how many of each
    system are timed where there is time. ``rehearse``: on the CPU.
    """

    world: int
    models: tuple[str, ...]
    rows: tuple[int, ...]
    sites: tuple[str, ...]
    parts: tuple[str, ...]
    seconds: float
    patience: float
    rehearse: bool
    host_rows: int
    backward_rows: int
    trained: str
    sequence: int
    calls: int
    batches: tuple[int, ...] = (1, 2)

    def listed(self, rows: Sequence[int]) -> list[shapes.Site]:
        """The sites to measure at ``rows``; UserError for one that does not divide by the ranks."""
        found = shapes.gpu(self.models, self.sites, rows)
        for site in found:
            site.local(self.world)
        return found


def parse(arguments: list[str]) -> tuple[Settings, Path]:
    """Settings and path of the report of a command line. Raises UserError for what cannot be measured."""
    given = _parser().parse_args(arguments)
    visible = torch.cuda.device_count()
    if not given.rehearse and visible < 2:
        raise UserError(
            f"--device cuda: this machine has {visible} CUDA devices and it takes 2; --rehearse goes through "
            "the same motions on the CPU"
        )
    world = given.world or (2 if given.rehearse else visible)
    if world < 2:
        raise UserError(f"--world is {world}; communication takes at least 2 ranks")
    if not given.rehearse and world > visible:
        raise UserError(f"--world is {world}, but this machine has {visible} CUDA devices")
    for name in ("seconds", "patience"):
        if not getattr(given, name) > 0:
            raise UserError(f"--{name} is {getattr(given, name)}; it must be a number of seconds above 0")
    small = given.rehearse
    settings = Settings(
        world=world,
        models=tuple(given.models or (("tiny",) if small else ("8B", "70B"))),
        rows=tuple(given.rows or ((64,) if small else ROWS.get(world, ROWS[4]))),
        sites=tuple(given.sites),
        # In the order of PARTS: what could spoil the device for the others comes last.
        parts=tuple(part for part in PARTS if part in given.parts),
        seconds=given.seconds,
        patience=given.patience,
        rehearse=small,
        host_rows=64 if small else 2048,
        backward_rows=64 if small else 8192,
        trained="tiny" if small else "1B",
        sequence=32 if small else 4096,
        calls=10 if small else 50,
    )
    for rows in (settings.rows, (settings.host_rows,), (settings.backward_rows,)):
        settings.listed(rows)
    name = given.name or f"overlap-{'rehearsal' if small else 'cuda'}-w{world}"
    return settings, given.out / f"{name}.json"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "overlap.py --device cuda",
        description="Overlapped products on the GPUs of this machine against NCCL and torch's fused ops.",
        epilog="The report is written after every row; a run that is cut short keeps what it has.",
    )
    parser.add_argument("--world", type=int, help="ranks, one a GPU (default: all GPUs)")
    parser.add_argument(
        "--models", nargs="+", choices=list(shapes.MODELS), help="whose sites (default: 8B 70B)"
    )
    parser.add_argument(
        "--rows",
        type=int,
        nargs="+",
        help="M of forward and graph (default: 2048 to 16384; of 2 ranks 4096 8192)",
    )
    parser.add_argument("--sites", nargs="+", choices=shapes.SITES, default=shapes.SITES, help="default: all")
    parser.add_argument(
        "--parts",
        nargs="+",
        choices=PARTS,
        default=PARTS,
        help="forward: the products; host: host time of a call; backward: both gradients; dp: a step of "
        "FSDP2; graph: forward replayed from CUDA graphs (default: all)",
    )
    parser.add_argument(
        "--seconds", type=float, default=240.0, help="most for one part; what is left of it is named"
    )
    parser.add_argument(
        "--patience",
        type=float,
        default=180.0,
        help="seconds without progress that end the run (default: 180)",
    )
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parents[1] / "results", help="folder of the JSON"
    )
    parser.add_argument("--name", help="of the JSON, without its ending (default: overlap-cuda-wW)")
    parser.add_argument(
        "--rehearse", action="store_true", help="the same on CPU ranks, tiny: whether it runs, not how fast"
    )
    return parser


def switch_multicast_off() -> None:
    """Set ``NO_MULTICAST`` for this process and the ranks that it starts, and say so."""
    os.environ.update(NO_MULTICAST)
    print("NVLink multicast off:", " ".join(f"{name}={value}" for name, value in NO_MULTICAST.items()))
