"""Small files that travel with a model between Hugging Face and runs: its config.json, its tokenizer's files.

They lie in a folder of their own, in a converted checkpoint itself or beside the checkpoints of a run.
"""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

from flashtrain.checkpoint.directory import POINTER
from flashtrain.checkpoint.files import (
    is_plain_file,
    make_directory,
    sync_directory,
    sync_file,
    user_errors,
    write_new,
)
from flashtrain.errors import UserError

FOLDER = "hf"
FAST = "PreTrainedTokenizerFast"
CONFIG, GENERATION = "config.json", "generation_config.json"
TOKENIZER = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "tekken.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)
ALL = (CONFIG, GENERATION, *TOKENIZER)


def find(checkpoint: Path) -> Path | None:
    """The folder of the files that came with ``checkpoint``, if any did."""
    run = run_of(checkpoint)
    places = [checkpoint / FOLDER] if run is None else [checkpoint / FOLDER, run / FOLDER]
    return next((place for place in places if place.is_dir() and not place.is_symlink()), None)


def run_of(checkpoint: Path) -> Path | None:
    """The folder of the run that saved ``checkpoint``, or None if it does not lie in one."""
    saved = checkpoint.absolute().parent
    return saved.parent if (saved / POINTER).is_file() else None


def copy(source: Path, target: Path, names: Sequence[str], links: bool = False) -> list[str]:
    """Copy those of ``names`` that ``source`` has into ``target``, made if missing; returns them.

    What ``target`` has by such a name is replaced. Without ``links`` a symbolic link counts as absent: what
    came with a checkpoint must not lead elsewhere. Raises UserError if a file cannot be read or written.
    """
    with user_errors(f"cannot copy from {source} to {target}"):
        found = [
            name for name in names if ((source / name).is_file() if links else is_plain_file(source / name))
        ]
        if found:
            make_directory(target)
        for name in found:
            shutil.copyfile(source / name, target / name)
            sync_file(target / name)
        if found:
            sync_directory(target)
    return found


def _check_json(file: Path) -> None:
    try:
        held = json.loads(file.read_bytes())
    except ValueError:
        held = None
    if not isinstance(held, dict):
        raise UserError(f"{file} is no tokenizer.json: it holds no JSON object")


def copy_tokenizer(source: Path, target: Path) -> list[str]:
    """Copy a tokenizer's files from a folder, or from one tokenizer.json, into the folder ``target``.

    Raises UserError if there are none, or if a file cannot be read or written.
    """
    if source.is_dir():
        found = copy(source, target, TOKENIZER, links=True)
    else:
        found = ["tokenizer.json"]
        with user_errors(f"cannot copy the tokenizer {source} to {target}"):
            _check_json(source)
            shutil.copyfile(source, target / found[0])
            sync_file(target / found[0])
    if not found:
        raise UserError(f"the folder {source} holds no tokenizer: give one with a tokenizer.json")
    if "tokenizer.json" in found and "tokenizer_config.json" not in found:
        # Without it transformers takes the tokenizer for the usual one of the model's type.
        write_new(target / "tokenizer_config.json", json.dumps({"tokenizer_class": FAST}) + "\n")
        found.append("tokenizer_config.json")
    return found
