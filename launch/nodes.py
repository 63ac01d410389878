"""``flashtrain nodes``: the command, or the batch script, that starts a run on several hosts."""

import argparse
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flashtrain.errors import UserError
from flashtrain.launch import main, train

EXAMPLE = "flashtrain nodes slurm --nodes 4 --processes 8 -- train demo --parallel.data 16 > run.sbatch"


def add_parser(subparsers: Any) -> None:
    """Register the ``nodes`` subcommand."""
    parser = subparsers.add_parser(
        "nodes",
        help="print what starts a run on several hosts, by torchrun or Slurm",
        usage="flashtrain nodes {torchrun,slurm} --nodes N --processes P [options] -- train RECIPE ...",
        description=(
            "Print the command to type on every host, or a batch script for sbatch. The run checks after its "
            "rendezvous that N x P ranks have come from N hosts, and logs who is where. Each host needs "
            "the same installation, and all must see --out."
        ),
        epilog=f"Example: {EXAMPLE}. Before a long run, put doctor --nodes in the place of train RECIPE ...",
    )
    parser.add_argument("starter", choices=["torchrun", "slurm"], help="what starts the ranks")
    parser.add_argument("--nodes", type=int, required=True, metavar="N", help="hosts")
    parser.add_argument("--processes", type=int, required=True, metavar="P", help="ranks on each, one a GPU")
    parser.add_argument("--head", metavar="HOST", help="host where ranks meet (torchrun; needed there)")
    parser.add_argument("--port", type=int, default=29500, help="port on that host (default: 29500)")
    parser.add_argument(
        "--restarts",
        type=int,
        default=3,
        metavar="N",
        help="times to go on from the last checkpoint by itself (default: 3)",
    )
    parser.add_argument("--interface", metavar="NAME", help="network interface, where the default is wrong")
    parser.add_argument("--cpu", action="store_true", help="ask Slurm for no GPUs")
    parser.set_defaults(run=run, takes_settings=True)


def run(args: argparse.Namespace) -> int:
    """Check the command and print what starts it."""
    for name in ("nodes", "processes"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name} is {getattr(args, name)}; it must be at least 1")
    if args.restarts < 0:
        raise UserError(f"--restarts is {args.restarts}; it must not be negative")
    if not 1 <= args.port <= 65535:
        raise UserError(f"--port is {args.port}; it must be 1 to 65535")
    if args.settings and args.settings[0] != "--":
        raise UserError(f"unknown argument {args.settings[0]}; what is to be started comes after two dashes")
    words = _checked(args.settings[1:], args.nodes, args.processes)
    if args.starter == "torchrun":
        if not args.head:
            raise UserError("--head is missing: name the host where the ranks meet, such as --head node1")
        print("# the same on each host:" if args.nodes > 1 else "# on the host:")
        endpoint = f"{args.head}:{args.port}"
        print(" ".join([*_environment(args), *_torchrun(args, shlex.quote(endpoint), "flashtrain", words)]))
    else:
        print(_batch_script(args, words))
    return 0


def _checked(words: Sequence[str], nodes: int, processes: int) -> list[str]:
    """The command of every rank. Raises UserError if it is none, or does not fit the number of ranks."""
    parsed = main.parse(words) if words else argparse.Namespace(command=None)
    if parsed.command == "doctor" and parsed.nodes:
        return list(words)
    if parsed.command != "train":
        raise UserError(f"give the command to start, train or doctor --nodes, after two dashes: {EXAMPLE}")
    config = train.resolve(parsed)
    if config.parallel.world != nodes * processes:
        raise UserError(
            f"{config.parallel} asks for {config.parallel.world} ranks, but {nodes} nodes x "
            f"{processes} processes are {nodes * processes}"
        )
    out = [] if parsed.out else [f"--out={Path('runs') / parsed.recipe}"]
    return [*words, *out, *([] if config.nodes else ["--nodes", str(nodes)])]


def _environment(args: argparse.Namespace) -> list[str]:
    names = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME") if args.interface else ()
    return [f"{name}={shlex.quote(args.interface)}" for name in names]


def _torchrun(args: argparse.Namespace, endpoint: str, run_id: str, words: Sequence[str]) -> list[str]:
    return [
        "python", "-m", "torch.distributed.run",
        "--nnodes", str(args.nodes),
        "--nproc-per-node", str(args.processes),
        "--max-restarts", str(args.restarts),
        "--rdzv-backend", "c10d",
        "--rdzv-endpoint", endpoint,
        "--rdzv-id", run_id,
        "-m", "flashtrain.launch.main",
        *map(shlex.quote, words),
    ]  # fmt: skip


def _batch_script(args: argparse.Namespace, words: Sequence[str]) -> str:
    endpoint = f"{args.head or '$head'}:{args.port}"
    lines = [
        "#!/bin/bash",
        "#SBATCH --job-name=flashtrain",
        f"#SBATCH --nodes={args.nodes}",
        "#SBATCH --ntasks-per-node=1",
        *([] if args.cpu else [f"#SBATCH --gpus-per-node={args.processes}"]),
        "# Two minutes before the end the run saves and ends; requeued or submitted again, it goes on.",
        "#SBATCH --signal=TERM@120",
        "#SBATCH --requeue",
        "#SBATCH --open-mode=append",
        "set -euo pipefail",
        'head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p)',
        *(f"export {variable}" for variable in _environment(args)),
        "# For saving: torchrun would kill the ranks 30 s after the signal.",
        "export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=110",
        "exec srun --kill-on-bad-exit=1 "
        + " ".join(_torchrun(args, f'"{endpoint}"', '"$SLURM_JOB_ID"', words)),
    ]
    return "\n".join(lines)
