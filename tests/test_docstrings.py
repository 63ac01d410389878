"""What the docstrings of ``flashtrain.comm`` must say, as far as a machine can tell.

Every public module, class, function, method and property has one, and its first line is a sentence. On top:

    takes or returns tensors      a shape in brackets, in code quotes:  ``x_shard [M/W, K]``
    raises                        "Raises" and the name of each exception
    takes or returns a time       its unit

A method that overrides one of a base class in this package inherits its docstring. Exceptions are followed
through private functions of the same module, and forgotten where a ``try`` around them catches them.
"""

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "flashtrain" / "comm"
SHAPE = re.compile(r"``[^`]*\[[^\]`]+\][^`]*``")
UNIT = re.compile(r"\b(seconds?|milliseconds?|ms|µs|ns|unit of time)\b", re.IGNORECASE)
TIMES = {"timeout", "deadline", "delay", "interval", "duration", "seconds"}
Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Public:
    """Something with a docstring: its place, its node, the class around it."""

    place: str
    node: ast.Module | ast.ClassDef | Function
    owner: ast.ClassDef | None = None


def definitions(tree: ast.Module, file: str) -> Iterator[Public]:
    """All that is public in a module, nested functions left out."""
    yield Public(file, tree)
    for node in tree.body:
        if isinstance(node, Function | ast.ClassDef) and not node.name.startswith("_"):
            yield Public(f"{file}: {node.name}", node)
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            for inner in node.body:
                if isinstance(inner, Function) and not inner.name.startswith("_"):
                    yield Public(f"{file}: {node.name}.{inner.name}", inner, node)


def functions(tree: ast.Module) -> dict[str, Function]:
    """Functions and methods of a module by bare name; a helper is found whether or not it is public."""
    return {node.name: node for node in ast.walk(tree) if isinstance(node, Function)}


def raised(node: ast.AST, known: dict[str, Function], seen: frozenset[str] = frozenset()) -> set[str]:
    """Names of the exceptions that may leave ``node``: its own and those of private functions it calls."""
    match node:
        case ast.Raise(exc=None):
            return set()
        case ast.Raise(exc=error):
            target = error.func if isinstance(error, ast.Call) else error
            name = target.attr if isinstance(target, ast.Attribute) else getattr(target, "id", "")
            return {name} if name[:1].isupper() else set()
        case ast.Try(body=body, handlers=handlers):
            caught = {
                name.id for h in handlers if h.type for name in ast.walk(h.type) if isinstance(name, ast.Name)
            }
            inside = set().union(*(raised(part, known, seen) for part in body))
            rest = [*handlers, *node.orelse, *node.finalbody]
            return (inside - caught).union(*(raised(part, known, seen) for part in rest))
    found = set()
    if isinstance(node, ast.Call):
        called = node.func.id if isinstance(node.func, ast.Name) else ""
        if isinstance(node.func, ast.Attribute) and getattr(node.func.value, "id", "") in ("self", "cls"):
            called = node.func.attr
        if called.startswith("_") and called in known and called not in seen:
            found |= set().union(*(raised(part, known, seen | {called}) for part in known[called].body))
    return found.union(*(raised(child, known, seen) for child in ast.iter_child_nodes(node)))


def annotations(public: Public) -> Iterator[tuple[str, str]]:
    """(name, annotation) of parameters and result of a function, or of the fields of a class."""
    node = public.node
    if isinstance(node, Function):
        arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
        yield from ((a.arg, ast.unparse(a.annotation)) for a in arguments if a.annotation)
        if node.returns:
            yield "return", ast.unparse(node.returns)
    elif isinstance(node, ast.ClassDef):
        for field in node.body:
            if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
                yield field.target.id, ast.unparse(field.annotation)
            if isinstance(field, Function) and field.name == "__init__":
                yield from annotations(Public("", field))


def needs_unit(public: Public, text: str) -> bool:
    for name, annotation in annotations(public):
        if re.search(r"\bTime\b", annotation) or (
            name in TIMES and re.search(r"\b(float|int)\b", annotation)
        ):
            return True
        if (
            name == "return"
            and re.match(r"float\b", annotation)
            and re.search(r"\b(time|clock|when)\b", text, re.IGNORECASE)
            and not re.match(r"(Share|Ratio|Fraction)\b", text)
        ):
            return True
    return False


def shortcomings(
    public: Public, known: dict[str, Function], documented: set[tuple[str, str]]
) -> Iterator[str]:
    """What the docstring of ``public`` lacks; ``documented`` holds (class, method) of documented methods."""
    node = public.node
    text = ast.get_docstring(node)
    if text is None:
        bases = (
            {ast.unparse(base).rpartition(".")[2] for base in public.owner.bases} if public.owner else set()
        )
        if not (isinstance(node, Function) and any((base, node.name) in documented for base in bases)):
            yield "has no docstring"
        return
    if not re.search(r"[.:?]$", text.splitlines()[0].strip()):
        yield "the first line of its docstring is no sentence on one line"
    if isinstance(node, Function):
        if any(
            re.search(r"\bTensor\b", annotation) for _, annotation in annotations(public)
        ) and not SHAPE.search(text):
            yield "takes or returns tensors, but its docstring shows no ``[shape]``"
        errors = set().union(*(raised(part, known) for part in node.body))
        for error in sorted(errors - {"AssertionError", "NotImplementedError"}):
            if not re.search(r"\bRaises?\b", text) or not re.search(rf"\b{error}\b", text):
                yield f"may raise {error}, but its docstring does not say 'Raises {error}'"
    if needs_unit(public, text) and not UNIT.search(text):
        yield "has times, but its docstring does not say their unit"


def complaints(root: Path) -> list[str]:
    trees = {path: ast.parse(path.read_text(), str(path)) for path in sorted(root.rglob("*.py"))}
    everything = {path: list(definitions(tree, str(path.relative_to(root)))) for path, tree in trees.items()}
    documented = {
        (public.owner.name, public.node.name)
        for found in everything.values()
        for public in found
        if public.owner and isinstance(public.node, Function) and ast.get_docstring(public.node)
    }
    return [
        f"{public.place}: {complaint}"
        for path, found in everything.items()
        for public in found
        for complaint in shortcomings(public, functions(trees[path]), documented)
    ]


def test_docstrings_of_comm_keep_the_contract() -> None:
    assert complaints(ROOT) == []


def test_the_ops_are_among_what_is_checked() -> None:
    places = {public.place for public in definitions(ast.parse((ROOT / "ops.py").read_text()), "ops.py")}
    assert {
        "ops.py",
        "ops.py: all_gather_matmul",
        "ops.py: matmul_reduce_scatter",
        "ops.py: column_gradients",
    } <= places


GOOD = '''"""A module."""

class Base:
    """Waits at most ``timeout`` seconds."""

    def __init__(self, timeout: float) -> None: ...

    def open(self, x: Tensor) -> None:
        """Open ``x [M, K]``. Raises ValueError if it is closed."""
        self._check(x)

    def _check(self, x):
        raise ValueError

class Child(Base):
    """A child."""

    def open(self, x: Tensor) -> None: ...

def f(x: Tensor) -> Tensor:
    """Give back ``x [M]``."""
    try:
        raise OSError("caught")
    except OSError:
        return x

def _private(x: Tensor): ...
'''

SPOILED = {
    "no module docstring": ('"""A module."""\n', "", "has no docstring"),
    "no class docstring": ('    """A child."""\n', "", "x.py: Child: has no docstring"),
    "no method docstring": (
        '        """Open ``x [M, K]``. Raises ValueError if it is closed."""\n',
        "",
        "x.py: Base.open: has no docstring",
    ),
    "no sentence": ('"""A module."""', '"""A module that\ndoes things."""', "no sentence"),
    "no shape": ("Give back ``x [M]``.", "Give back x, an [M] tensor.", "x.py: f: takes or returns tensors"),
    "no Raises": (" Raises ValueError if it is closed.", "", "Base.open: may raise ValueError"),
    "another exception": ("Raises ValueError", "Raises TypeError", "Base.open: may raise ValueError"),
    "uncaught": ("except OSError", "except KeyError", "x.py: f: may raise OSError"),
    "no unit": (" seconds", " ticks", "x.py: Base: has times"),
}


def test_a_good_module_passes(tmp_path: Path) -> None:
    (tmp_path / "x.py").write_text(GOOD)
    assert complaints(tmp_path) == []


@pytest.mark.parametrize("case", SPOILED)
def test_a_bad_docstring_is_found(case: str, tmp_path: Path) -> None:
    old, new, message = SPOILED[case]
    assert old in GOOD
    (tmp_path / "x.py").write_text(GOOD.replace(old, new, 1))
    found = complaints(tmp_path)
    assert any(message in complaint for complaint in found), found
