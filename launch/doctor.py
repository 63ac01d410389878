"""``flashtrain doctor``: what this machine has, which paths training would take here, and why."""

import argparse
import json
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from importlib import import_module, metadata
from typing import Any

import flashtrain
from flashtrain.errors import first_line

TORCH_AT_LEAST = (2, 11)
OPTIONAL = ("pybind11", "cmake", "ninja", "wandb", "prometheus-client", "nvidia-ml-py")
# What is set of these changes how ranks compute or talk.
VARIABLES = re.compile(
    r"^(CUDA_DEVICE_MAX_CONNECTIONS|CUDA_VISIBLE_DEVICES|OMP_NUM_THREADS|(NCCL|GLOO|TORCH)_\w+)$"
)
COPY_BYTES = 256 << 20
GIB = 1 << 30


def add_parser(subparsers: Any) -> None:
    """Register the ``doctor`` subcommand."""
    parser = subparsers.add_parser(
        "doctor",
        help="report what this machine has and which paths training would take",
        description="Report versions, devices, links and transports. Exit code 0: training can run here.",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    parser.add_argument(
        "--nodes",
        action="store_true",
        help="under torchrun, as flashtrain nodes prints it: compare all ranks, measure every pair, and "
        "exit with 1 for what would hurt a run",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    if args.nodes:
        from flashtrain.launch import pairs

        return pairs.run(args)
    facts = examine()
    if args.json:
        print(json.dumps(facts, indent=2))
    else:
        _show(facts)
    return 1 if facts["problems"] else 0


def examine() -> dict[str, Any]:
    """All facts as plain data. ``problems`` lists what keeps training from running at all."""
    import torch

    gpus = devices()
    extension = _extension()
    facts: dict[str, Any] = {
        "flashtrain": flashtrain.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "torch": {"version": torch.__version__, "build": _torch_build()},
        "extension": extension,
        "triton": _version_or_reason("triton"),
        "cores": {"usable": len(os.sched_getaffinity(0)), "machine": os.cpu_count()},
        "memory_bytes": {"total": _memory("SC_PHYS_PAGES"), "available": _memory("SC_AVPHYS_PAGES")},
        "shared_memory": _shared_memory(),
        "gpus": gpus,
        "nccl": ".".join(map(str, torch.cuda.nccl.version())) if torch.cuda.is_available() else None,
        "links": links(len(gpus)),
        "peer_access": peer_access(len(gpus)),
        "peer_gigabytes_per_s": peer_bandwidth(len(gpus)),
        "transports": transports(extension["reason"], peer_access(len(gpus)), len(gpus)),
        "packages": {name: _version(name) for name in (*required(), *OPTIONAL)},
        "environment": {k: v for k, v in sorted(os.environ.items()) if VARIABLES.match(k)},
    }
    facts["problems"] = _problems(facts)
    return facts


def devices() -> list[dict[str, Any]]:
    """Name, memory in bytes and compute capability of each visible CUDA device."""
    import torch

    if not torch.cuda.is_available():
        return []
    every = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    return [
        {"name": one.name, "memory_bytes": one.total_memory, "capability": f"{one.major}.{one.minor}"}
        for one in every
    ]


def links(count: int) -> list[list[str]] | None:
    """How each pair of GPUs is linked (``NV18``, ``PIX``, ``SYS``); None if the driver does not say."""
    if count < 2 or shutil.which("nvidia-smi") is None:
        return None
    try:
        shown = subprocess.run(
            ["nvidia-smi", "topo", "-m"], capture_output=True, text=True, timeout=30, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return parse_links(shown.stdout, count)


def parse_links(shown: str, count: int) -> list[list[str]] | None:
    """The GPU part of ``nvidia-smi topo -m``; None if it does not list ``count`` GPUs."""
    # It underlines its header with terminal codes.
    rows = [line.split() for line in re.sub(r"\x1b\[\d*m", "", shown).splitlines()]
    found = [row[1 : count + 1] for row in rows if row and re.fullmatch(r"GPU\d+", row[0]) and "X" in row]
    return found if len(found) == count and all(len(row) == count for row in found) else None


def peer_access(count: int) -> list[list[bool]] | None:
    """Whether GPU i can read and write the memory of GPU j; None for fewer than two GPUs."""
    import torch

    if count < 2:
        return None
    return [[i == j or torch.cuda.can_device_access_peer(i, j) for j in range(count)] for i in range(count)]


def peer_bandwidth(count: int) -> list[list[float | None]] | None:
    """Measured copy rate from GPU i to GPU j in 10⁹ bytes/s, one pair at a time.

    None for fewer than two GPUs; an entry is None on the diagonal and where no memory is free for it.
    """
    if count < 2:
        return None
    return [[None if i == j else _copy_rate(i, j) for j in range(count)] for i in range(count)]


def _copy_rate(source: int, target: int) -> float | None:
    import torch

    copies = 8
    try:
        here = torch.empty(COPY_BYTES, dtype=torch.uint8, device=f"cuda:{source}")
        there = torch.empty(COPY_BYTES, dtype=torch.uint8, device=f"cuda:{target}")
    except torch.cuda.OutOfMemoryError:
        return None
    with torch.cuda.device(source):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        there.copy_(here, non_blocking=True)  # maps the peer's memory
        start.record()
        for _ in range(copies):
            there.copy_(here, non_blocking=True)
        end.record()
        end.synchronize()
    return copies * COPY_BYTES / (start.elapsed_time(end) * 1e-3) / 1e9


def transports(
    no_extension: str | None, peer_access: list[list[bool]] | None, gpus: int
) -> dict[str, dict[str, str]]:
    """What ``comm.transport=auto`` chooses for each kind of group, and why."""
    group = "torch.distributed point-to-point"
    if no_extension is None:
        cpu = ("host", "shared memory: the ranks share a machine and the C++ extension is there")
    else:
        cpu = ("group", f"{group} over gloo: the C++ extension is missing ({no_extension})")
    if not gpus:
        gpu = ("none", "there is no GPU")
    elif no_extension is not None:
        gpu = ("group", f"{group} over NCCL: the C++ extension is missing ({no_extension})")
    elif peer_access is None or not all(all(row) for row in peer_access):
        gpu = ("group", f"{group} over NCCL: not every GPU can reach every other's memory")
    else:
        gpu = ("nvlink", "copy engines: all GPUs reach each other's memory; a run tries it out first")
    hosts = ("group", f"{group} over {'NCCL' if gpus else 'gloo'}: ranks on several hosts share no memory")
    choices = {"CPU ranks of one machine": cpu, "GPUs of one machine": gpu, "several hosts": hosts}
    return {ranks: {"transport": name, "why": why} for ranks, (name, why) in choices.items()}


def _problems(facts: Mapping[str, Any]) -> list[str]:
    import torch

    problems = []
    version = tuple(int(part) for part in re.findall(r"\d+", torch.__version__)[:2])
    if version < TORCH_AT_LEAST:
        problems.append(f"torch {torch.__version__} is too old: install 2.11 or newer")
    if not torch.distributed.is_available():
        problems.append("this torch is built without torch.distributed: install another build")
    problems += [
        f"package {name} is missing: pip install {name}" for name in required() if not _version(name)
    ]
    return problems


def _torch_build() -> str:
    import torch

    if torch.version.hip:
        return f"ROCm {torch.version.hip}"
    return f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU"


def _extension() -> dict[str, str | None]:
    """Path of the compiled module, or the reason why it does not load."""
    try:
        return {"path": import_module("flashtrain._core").__file__, "reason": None}
    except ImportError as error:
        return {"path": None, "reason": str(error).splitlines()[0]}


def _version_or_reason(module: str) -> dict[str, str | None]:
    try:
        return {"version": getattr(import_module(module), "__version__", None), "reason": None}
    except Exception as error:
        # A broken installation of an optional package may raise anything; its words are the finding.
        return {"version": None, "reason": first_line(error)}


def required() -> list[str]:
    """The packages that flashtrain was installed with; none where it runs from its sources, not installed."""
    try:
        wanted = metadata.requires("flashtrain") or []
    except metadata.PackageNotFoundError:
        return []
    names = [re.split(r"[^\w.-]", line, maxsplit=1)[0] for line in wanted if "extra ==" not in line]
    return sorted(name for name in names if name != "torch")


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _memory(pages: str) -> int:
    return os.sysconf(pages) * os.sysconf("SC_PAGE_SIZE")


def _shared_memory() -> str:
    try:
        os.close(os.memfd_create("flashtrain-doctor"))
    except (AttributeError, OSError) as error:
        return f"no anonymous memory files: {error}"
    return "anonymous memory files (memfd); the size of /dev/shm does not matter"


def _show(facts: Mapping[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False)
    table = Table(title="flashtrain doctor", title_justify="left", title_style="bold", show_header=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in _rows(facts):
        table.add_row(name, Text(value))
    console.print(table)
    for title, matrix in (
        ("links between GPUs", facts["links"]),
        ("peer access", facts["peer_access"]),
        ("copies from row to column, one pair at a time, GB/s", facts["peer_gigabytes_per_s"]),
    ):
        if matrix is not None:
            console.print(_matrix(title, matrix))
    for problem in facts["problems"]:
        console.print(Text("problem: ", style="red").append(problem, style="default"))
    if not facts["problems"]:
        console.print("[green]training can run here[/green]")


def _rows(facts: Mapping[str, Any]) -> list[tuple[str, str]]:
    extension, triton, memory = facts["extension"], facts["triton"], facts["memory_bytes"]
    rows = [
        ("flashtrain", facts["flashtrain"]),
        ("python", f"{facts['python']}, {facts['platform']}"),
        ("torch", f"{facts['torch']['version']}, {facts['torch']['build']} build"),
        ("C++ extension", extension["path"] or f"missing: {extension['reason']}"),
        ("Triton", triton["version"] or f"missing: {triton['reason']}"),
        ("cores", f"{facts['cores']['usable']} usable of {facts['cores']['machine']}"),
        ("memory", f"{memory['available'] / GIB:.1f} GiB free of {memory['total'] / GIB:.1f}"),
        ("shared memory", facts["shared_memory"]),
    ]
    for index, gpu in enumerate(facts["gpus"]):
        size = f"{gpu['memory_bytes'] / GIB:.0f} GiB"
        rows.append((f"GPU {index}", f"{gpu['name']}, {size}, compute capability {gpu['capability']}"))
    rows.append(("NCCL", str(facts["nccl"])) if facts["gpus"] else ("GPUs", "none"))
    rows += [(ranks, f"{one['transport']}: {one['why']}") for ranks, one in facts["transports"].items()]
    rows.append(("packages", ", ".join(f"{name} {v or 'missing'}" for name, v in facts["packages"].items())))
    rows += [(name, f"{value} (from the environment)") for name, value in facts["environment"].items()]
    return rows


def _matrix(title: str, matrix: Sequence[Sequence[Any]]) -> Any:
    from rich.table import Table

    table = Table(title=title, title_justify="left", title_style="bold")
    table.add_column("GPU", justify="right")
    for column in range(len(matrix)):
        table.add_column(str(column), justify="right")
    for index, row in enumerate(matrix):
        table.add_row(str(index), *("-" if i == index else _cell(value) for i, value in enumerate(row)))
    return table


def _cell(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.0f}" if isinstance(value, float) else str(value or "n/a")
