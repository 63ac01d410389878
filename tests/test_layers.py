"""Imports run the way the design says: downward, along one wing, never in a circle.

    launch
    recipes
    train
    methods  adapters
    parallel  plan  models
    comm  nn  metrics  data  checkpoint
    kernels  config
    csrc
    errors

Both wings stand on csrc, which comm and kernels call (and launch, to examine it). Left wing: comm, parallel,
plan, adapters. Right wing: kernels, nn, models, methods. They meet in train and above; ``comm`` alone may
use kernels. Imports inside functions and by ``importlib`` count like others.
"""

import ast
import graphlib
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ROWS = (
    {"errors"},
    {"csrc"},
    {"kernels", "config"},
    {"comm", "nn", "metrics", "data", "checkpoint"},
    {"parallel", "plan", "models"},
    {"methods", "adapters"},
    {"train"},
    {"recipes"},
    {"launch"},
)
HEIGHT = {package: height for height, row in enumerate(ROWS) for package in row}
LEFT = {"comm", "parallel", "plan", "adapters"}
RIGHT = {"kernels", "nn", "models", "methods"}


def modules_of(root: Path) -> dict[str, Path]:
    """Every module of the package by its full name; kernels/ and launch/ are where their links lead."""
    found = {}
    for folder, prefix in (("flashtrain", ()), ("kernels", ("flashtrain",)), ("launch", ("flashtrain",))):
        for path in sorted((root / folder).rglob("*.py")):
            relative = path.relative_to(root)
            linked = any((root / part).is_symlink() for part in relative.parents)
            if not linked:
                parts = (*prefix, *relative.with_suffix("").parts)
                found[".".join(part for part in parts if part != "__init__")] = path
    return found


def imported_by(name: str, path: Path, modules: dict[str, Path]) -> Iterator[tuple[int, str]]:
    """(line, module) of every import in the file, those inside functions too."""
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join((*above, *filter(None, [node.module])))
            for alias in node.names:
                full = f"{base}.{alias.name}"
                is_module = full in modules or base == "flashtrain"
                yield node.lineno, full if is_module else base
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called in ("import_module", "__import__") and isinstance(node.args[0].value, str):
                yield node.lineno, node.args[0].value


def package_of(module: str) -> str | None:
    """Which box of the design a module belongs to; None for what is not ours and for the package itself."""
    parts = module.split(".")
    if parts[0] in ("kernels", "launch"):
        return parts[0]
    if parts[0] != "flashtrain" or len(parts) == 1 or parts[1].startswith("__"):
        return None
    return "csrc" if parts[1] == "_core" else parts[1]


def objection(importer: str, imported: str) -> str | None:
    """Why one package may not import another, or None if it may."""
    for package in (importer, imported):
        if package not in HEIGHT:
            return f"{package} has no place in the design; give it one in tests/test_layers.py"
    if importer == imported:
        return None
    if HEIGHT[imported] > HEIGHT[importer]:
        return f"{importer} lies below {imported}"
    if HEIGHT[imported] == HEIGHT[importer]:
        return f"{importer} and {imported} lie side by side"
    crosses = {importer, imported} & LEFT and {importer, imported} & RIGHT
    if crosses and (importer, imported) != ("comm", "kernels"):
        return f"{importer} and {imported} belong to different wings"
    if imported == "csrc" and importer not in ("comm", "kernels", "launch"):
        return f"{importer} calls C++, which comm and kernels do for it"
    return None


def violations(root: Path) -> list[str]:
    """What runs against the design, one line each."""
    modules, found, graph = modules_of(root), [], {}
    for name, path in modules.items():
        edges = list(imported_by(name, path, modules))
        graph[name] = {target for _, target in edges if target in modules and target != name}
        importer = package_of(name)
        for line, target in edges:
            place = f"{path.relative_to(root)}:{line}"
            imported = package_of(target)
            if target.split(".")[0] in ("kernels", "launch", "tests", "benchmarks"):
                found.append(f"{place}: imports {target} past the package; write flashtrain.{target}")
            elif imported is not None and importer is None:
                found.append(f"{place}: flashtrain itself imports {target}")
            elif importer is not None and imported is not None and (why := objection(importer, imported)):
                found.append(f"{place}: imports {target}, but {why}")
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        found.append("modules import each other in a circle: " + " <- ".join(error.args[1]))
    return found


def test_imports_run_the_way_the_design_says() -> None:
    assert violations(ROOT) == []


def test_the_whole_package_is_walked_once() -> None:
    modules = modules_of(ROOT)
    packages = {package_of(name) for name in modules} - {None}
    assert {"comm", "parallel", "nn", "models", "kernels", "launch", "train", "errors"} <= packages
    assert len({path.resolve() for path in modules.values()}) == len(modules)
    assert "flashtrain.kernels.ordered_sum.reference" in modules


OFFENDERS = {
    "parallel must not know models": (
        "flashtrain/parallel/x.py",
        "from flashtrain.models import decoder",
        "different wings|side by side",
    ),
    "parallel must not know nn": ("flashtrain/parallel/x.py", "import flashtrain.nn.mlp", "different wings"),
    "nn must not know comm": (
        "flashtrain/nn/x.py",
        "from flashtrain.comm.collectives import all_gather",
        "side by side",
    ),
    "models must not know comm": (
        "flashtrain/models/x.py",
        "from flashtrain.comm import ops",
        "different wings",
    ),
    "models must not know parallel": (
        "flashtrain/models/x.py",
        "from flashtrain import parallel",
        "side by side",
    ),
    "comm must not know train": (
        "flashtrain/comm/x.py",
        "from flashtrain.train import step",
        "comm lies below train",
    ),
    "parallel must not use kernels": (
        "flashtrain/parallel/x.py",
        "from flashtrain.kernels.a import reference",
        "different wings",
    ),
    "kernels must not know nn": ("kernels/a/x.py", "from flashtrain.nn import mlp", "kernels lies below nn"),
    "train must not know launch": (
        "flashtrain/train/x.py",
        "from flashtrain.launch import main",
        "train lies below launch",
    ),
    "metrics must not know data": (
        "flashtrain/metrics/x.py",
        "from flashtrain.data import corpus",
        "side by side",
    ),
    "nn must not know the extension": (
        "flashtrain/nn/x.py",
        "from flashtrain import _core",
        "calls C",
    ),
    "errors know nothing": (
        "flashtrain/errors.py",
        "from flashtrain.metrics import report",
        "errors lies below metrics",
    ),
    "in a function": (
        "flashtrain/nn/x.py",
        "def f():\n    if True:\n        import flashtrain.train.step",
        "nn lies below train",
    ),
    "for types alone": (
        "flashtrain/nn/x.py",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from flashtrain.train import step",
        "nn lies below train",
    ),
    "relative": ("flashtrain/nn/x.py", "from ..models.decoder import Decoder", "nn lies below models"),
    "relative, the package": ("flashtrain/nn/__init__.py", "from .. import models", "nn lies below models"),
    "by importlib": (
        "flashtrain/nn/x.py",
        "import importlib\nimportlib.import_module('flashtrain.models.decoder')",
        "nn lies below models",
    ),
    "past the package": ("flashtrain/comm/x.py", "from kernels.a import reference", "past the package"),
    "tests": ("flashtrain/comm/x.py", "from tests import distributed", "past the package"),
    "the package itself": (
        "flashtrain/__init__.py",
        "from flashtrain import comm",
        "flashtrain itself imports",
    ),
    "a package without a place": (
        "flashtrain/utils/x.py",
        "from flashtrain import errors",
        "utils has no place",
    ),
    "a circle": (
        "flashtrain/comm/a.py",
        "def f():\n    from flashtrain.comm import b",
        "circle.*flashtrain.comm.a.*flashtrain.comm.b",
    ),
}


def sound(root: Path) -> Path:
    """A small package in which every import is as it should be."""
    files = {
        "flashtrain/__init__.py": "from pathlib import Path",
        "flashtrain/errors.py": "",
        "flashtrain/config.py": "import flashtrain.errors",
        "flashtrain/comm/__init__.py": "",
        "flashtrain/comm/b.py": "from flashtrain.comm import a\nfrom flashtrain.kernels.a import reference",
        "flashtrain/comm/a.py": "from flashtrain import _core\nfrom flashtrain.errors import UserError",
        "flashtrain/parallel/__init__.py": "",
        "flashtrain/parallel/tensor.py": "from flashtrain.comm import b\nfrom . import mesh",
        "flashtrain/parallel/mesh.py": "import torch",
        "flashtrain/nn/mlp.py": "from flashtrain.kernels.a import reference",
        "flashtrain/models/decoder.py": "from flashtrain.nn.mlp import SwiGLU",
        "flashtrain/train/step.py": "from flashtrain import comm, models, parallel\nimport flashtrain.config",
        "kernels/a/reference.py": "import torch",
        "launch/main.py": "def f():\n    from flashtrain.train import step",
    }
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    for link in ("kernels", "launch"):
        (root / "flashtrain" / link).symlink_to(Path("..") / link)
    return root


def test_a_sound_package_passes(tmp_path: Path) -> None:
    assert violations(sound(tmp_path)) == []


@pytest.mark.parametrize("case", OFFENDERS)
def test_an_offending_module_is_found(case: str, tmp_path: Path) -> None:
    name, text, message = OFFENDERS[case]
    path = sound(tmp_path) / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    found = violations(tmp_path)
    assert len(found) == 1, found
    assert re.search(message, found[0]), found[0]
    if "circle" not in found[0]:
        assert found[0].startswith(f"{name}:{len(text.splitlines())}: ")
