"""The fenced blocks of Markdown files: followed as a reader would, or only parsed where that cannot be.

```sh             run by bash, from the top, in one folder for all blocks of a guide
```sh WORD        parsed: every command and option must exist; WORD, of ELSEWHERE, says why it is not run
```python         run
```python NAME    written to the file NAME, for commands to use; so are ``toml`` blocks
```text           shown
"""

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from flashtrain import config, recipes
from flashtrain.errors import UserError
from flashtrain.launch import main
from tests.train import runs

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
ELSEWHERE = {
    "gpu": "it needs GPUs",
    "hosts": "it needs several hosts",
    "network": "it needs the network",
    "service": "it runs until it is stopped",
    "long": "it takes minutes",
}
# Programs of others: that they are called is all that is looked at.
FOREIGN = {"cd", "curl", "git", "hf", "pip", "py-spy", "sbatch", "tensorboard", "wandb"}


@dataclass(frozen=True)
class Block:
    """``word`` is what follows the language on the fence; ``line`` is that of the fence."""

    file: Path
    line: int
    language: str
    word: str
    text: str

    def __str__(self) -> str:
        return f"{self.file.name}:{self.line}"


def blocks(file: Path) -> list[Block]:
    """All fenced blocks of a file. Raises AssertionError for a fence that says nothing a test knows."""
    found, text = [], file.read_text(encoding="utf-8")
    for match in re.finditer(r"^```(\S*) ?(.*)\n((?:.*\n)*?)```$", text, re.MULTILINE):
        language, word, body = match.groups()
        block = Block(file, text.count("\n", 0, match.start()) + 1, language, word, body)
        known = {"sh": word == "" or word in ELSEWHERE, "python": True, "toml": word != "", "text": True}
        assert known.get(language), f"{block}: a fence must not say {language} {word}"
        found.append(block)
    fences = len(re.findall(r"^\s*```", text, re.MULTILINE))
    assert fences == 2 * len(found), f"{file.name}: a fence is indented or not closed"
    return found


class Reader:
    """Follows guides in ``folder``, as somebody who has installed flashtrain and has no network.

    ``smaller``: settings for each ``flashtrain train`` of a recipe, so that it takes seconds; the guide's own
    win over them.
    """

    def __init__(self, folder: Path, smaller: Mapping[str, Sequence[str]] | None = None) -> None:
        self.folder = folder
        installed = folder / ".installed"
        installed.mkdir(exist_ok=True)
        (installed / "sitecustomize.py").write_text("import tests.offline\n")
        command = installed / "flashtrain"
        cases = "".join(
            f'"train {recipe}") shift 2; set -- train {recipe} {shlex.join(settings)} "$@" ;;\n'
            for recipe, settings in (smaller or {}).items()
        )
        command.write_text(
            "#!/bin/sh\n"
            f'case "$1 $2" in\n{cases}*) ;;\nesac\n'
            f'exec {shlex.quote(sys.executable)} -m flashtrain.launch.main "$@"\n'
        )
        command.chmod(0o755)
        programs = [str(installed), str(Path(sys.executable).parent), os.environ["PATH"]]
        self.environment = runs.environment() | {
            "PATH": os.pathsep.join(programs),
            "PYTHONPATH": os.pathsep.join([str(installed), str(ROOT)]),
            "HF_HUB_OFFLINE": "1",
        }

    def follow(self, file: Path) -> str:
        """Do all that the guide says; what its commands printed."""
        return "".join(self._do(block) for block in blocks(file))

    def _do(self, block: Block) -> str:
        if block.language == "text":
            return ""
        if block.word and block.language != "sh":
            (self.folder / block.word).write_text(block.text)
            return ""
        if block.word:
            check(block)
            return ""
        command = {
            "sh": ["bash", "-euo", "pipefail", "-c", block.text],
            "python": [sys.executable, "-c", block.text],
        }[block.language]
        done = subprocess.run(
            command, cwd=self.folder, env=self.environment, capture_output=True, text=True, timeout=180
        )
        assert done.returncode == 0, f"{block} ended with {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done.stdout + done.stderr


def check(block: Block) -> None:
    """Parse the commands of a block. Raises AssertionError for one that flashtrain would not take."""
    for words in _commands(block.text):
        try:
            _check(words)
        except (UserError, SystemExit) as error:
            raise AssertionError(f"{block}: {' '.join(words)}: {error}") from error


def _commands(text: str) -> Iterator[list[str]]:
    """The words of each command, without comments, variables before it and redirections."""
    for line in text.replace("\\\n", " ").splitlines():
        words: list[str] = []
        for word in [*shlex.split(line, comments=True), ";"]:
            if word in ("|", "||", "&&", ";", "&"):
                if words:
                    yield words
                words = []
            elif words or not re.match(r"[A-Z_]+=", word):
                words.append(word)


def _check(words: Sequence[str]) -> None:
    words = list(words[: words.index(">")] if ">" in words else words)
    match words:
        case ["flashtrain", *rest]:
            _check_flashtrain(rest)
        case ["torchrun", *rest] | ["python", "-m", "torch.distributed.run", *rest]:
            from torch.distributed.run import get_args_parser

            given = get_args_parser().parse_args(rest)
            assert given.module, f"torchrun starts {given.training_script}: nothing that can be parsed"
            assert given.training_script == "flashtrain.launch.main", given.training_script
            _check_flashtrain(given.training_script_args)
        case ["python", script, *rest] if script.startswith("benchmarks/"):
            _check_benchmark(script, rest)
        case ["make", target, *_]:
            known = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
            assert target in known, f"there is no make {target}"
        case _:
            assert words[0] in FOREIGN, f"{words[0]} is unknown"


def _check_flashtrain(words: Sequence[str]) -> None:
    given = main.parse(words)
    if given.command in ("train", "bench"):
        assert given.recipe in recipes.RECIPES, f"there is no recipe {given.recipe}"
        resolved = config.resolve(recipes.RECIPES[given.recipe](), None, given.settings)
        resolved.parallel.validate()
        if resolved.train.init_from is None:  # else the model comes with the weights
            resolved.model.validate(resolved.parallel.tensor)
        resolved.train.validate(resolved.parallel.data)
        resolved.watch.validate(resolved.train.steps)
    elif given.command == "nodes":
        assert given.settings[:1] == ["--"], f"nodes {given.settings}"
        _check_flashtrain(given.settings[1:])


def _check_benchmark(script: str, words: Sequence[str]) -> None:
    """Options of a benchmark that starts nothing: those that its own help names."""
    assert (ROOT / script).is_file(), f"there is no {script}"
    device = ["--device", words[words.index("--device") + 1]] if "--device" in words else []
    help_text = subprocess.run(
        [sys.executable, script, *device, "--help"],
        cwd=ROOT,
        env=runs.environment(),
        capture_output=True,
        text=True,
    ).stdout
    for option in words:
        assert not option.startswith("--") or option == "--device" or f"{option} " in help_text, option
