"""What this project never does: unpickle, run code from files, use the network at import."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.test_layers import modules_of

ROOT = Path(__file__).parent.parent
FOLDERS = ("flashtrain", "kernels", "launch", "benchmarks", "tests")

# Modules whose files or messages run code when they are read.
MODULES = {
    "pickle", "_pickle", "cPickle", "cloudpickle", "dill", "jsonpickle", "joblib", "marshal", "shelve",
}  # fmt: skip
# Functions that pickle: by themselves, or for every rank that they reach.
FUNCTIONS = {
    "torch.load", "torch.save", "torch.jit.load", "torch.jit.save", "torch.package.PackageImporter",
    "torch.distributed.all_gather_object", "torch.distributed.gather_object",
    "torch.distributed.broadcast_object_list", "torch.distributed.scatter_object_list",
    "torch.distributed.send_object_list", "torch.distributed.recv_object_list",
    "torch.distributed.checkpoint.save", "torch.distributed.checkpoint.load",
    "torch.distributed.checkpoint.async_save", "torch.distributed.checkpoint.FileSystemReader",
    "torch.distributed.checkpoint.FileSystemWriter", "pandas.read_pickle",
}  # fmt: skip


def files(root: Path) -> Iterator[Path]:
    """Every Python file of the project, in no linked folder."""
    yield from root.glob("*.py")
    for folder in FOLDERS:
        for path in sorted((root / folder).rglob("*.py")):
            if not any(part.is_symlink() for part in (path, *path.parents)):
                yield path


def found_in(source: str) -> set[str]:
    """Which forbidden modules, functions and arguments a file uses, by their full names."""
    tree, names, found = ast.parse(source), dict[str, str](), set[str]()

    def dotted(node: ast.AST) -> str:
        if isinstance(node, ast.Attribute):
            return f"{dotted(node.value)}.{node.attr}"
        return names.get(node.id, node.id) if isinstance(node, ast.Name) else ""

    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                names[alias.asname or alias.name.partition(".")[0]] = (
                    alias.name if alias.asname else alias.name.partition(".")[0]
                )
                found |= {alias.name.partition(".")[0]} & MODULES
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found |= {node.module.partition(".")[0]} & MODULES
            for alias in node.names:
                names[alias.asname or alias.name] = f"{node.module}.{alias.name}"
                found |= {f"{node.module}.{alias.name}"} & FUNCTIONS
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            found |= {dotted(node)} & FUNCTIONS
        if isinstance(node, ast.Call):
            called = dotted(node.func).rpartition(".")[2]
            first = node.args[0].value if node.args and isinstance(node.args[0], ast.Constant) else None
            if called in ("import_module", "__import__") and isinstance(first, str):
                found |= {first.partition(".")[0]} & MODULES
            found |= {
                "allow_pickle"
                for keyword in node.keywords
                if keyword.arg == "allow_pickle"
                and not (isinstance(keyword.value, ast.Constant) and keyword.value.value is False)
            }
    return found


def test_nothing_is_pickled_or_unpickled_anywhere() -> None:
    everything = {path.relative_to(ROOT).as_posix(): found_in(path.read_text()) for path in files(ROOT)}
    assert len(everything) > 100
    assert "launch/main.py" in everything
    assert {path: found for path, found in everything.items() if found} == {}


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "import pickle as json",
        "from pickle import loads",
        "def f():\n    import dill",
        "from cloudpickle.cloudpickle import dumps",
        "import importlib\nimportlib.import_module('pickle')",
        "__import__('marshal')",
        "import torch\ntorch.load('x', weights_only=True)",
        "import torch as t\nt.save({}, 'x')",
        "from torch import load",
        "import torch\nread = torch.load",
        "import torch.distributed as dist\ndist.all_gather_object([], 1)",
        "from torch import distributed\ndistributed.broadcast_object_list([])",
        "import torch\ntorch.distributed.gather_object(1)",
        "import torch.distributed.checkpoint as dcp\ndcp.async_save({})",
        "from torch.distributed.checkpoint import FileSystemReader",
        "import numpy as np\nnp.load('x', allow_pickle=True)",
        "import numpy as np\nnp.load('x', allow_pickle=flag)",
    ],
)
def test_each_way_to_pickle_is_found(source: str) -> None:
    assert found_in(source)


def test_what_only_sounds_alike_is_let_through() -> None:
    source = (
        "import json, numpy as np\nfrom safetensors.torch import load, save_file\n"
        "json.load(f)\nload(b)\nself.load(path)\nnp.load('x', allow_pickle=False)\nstore.save(1)"
    )
    assert found_in(source) == set()


IMPORT_EVERYTHING = """
import importlib, sys
def refuse(event, arguments):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "urllib.Request"):
        raise PermissionError(f"{event} {arguments} at import")
sys.addaudithook(refuse)
for name in sys.argv[1:]:
    importlib.import_module(name)
print(sorted(name for name in ("wandb", "transformers") if name in sys.modules))
"""


def test_importing_every_module_uses_no_network() -> None:
    names = list(modules_of(ROOT))
    assert {"flashtrain.train.trainer", "flashtrain.launch.main", "flashtrain.comm.ops"} <= set(names)
    done = subprocess.run(
        [sys.executable, "-c", IMPORT_EVERYTHING, *names],
        capture_output=True, text=True, timeout=120, cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout == "[]\n", "importing the package imports what only some of its users need"
