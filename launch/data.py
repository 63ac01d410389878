"""``flashtrain data``: text to token files that training maps into memory, and tokenizers for it."""

import argparse
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_INPUTS = (
    "INPUT is a file or a folder: text (a document a file), JSON lines (.jsonl or .json, a document a line; "
    "each also .gz or .zst) or Parquet (a document a row)."
)


def add_parser(subparsers: Any) -> None:
    """Register the subcommand and its two actions."""
    parser = subparsers.add_parser(
        "data",
        help="turn text into token files, train a tokenizer",
        description="Prepare text for training: token files in Megatron's .bin/.idx format, and tokenizers.",
    )
    actions = parser.add_subparsers(title="actions", dest="action", metavar="ACTION", required=True)
    prepare = actions.add_parser(
        "prepare",
        help="tokenize text, JSON lines and Parquet into a prepared set",
        description=f"Tokenize documents into tokens.bin and tokens.idx of a folder. {_INPUTS}",
        epilog=(
            "A run that was killed goes on where it stopped when the same command is given again, and the "
            "result is the same to the byte. Megatron reads it as --data-path DIR/tokens; flashtrain train "
            "reads it with --data.class PreparedData.Config --data.sets DIR[,DIR ...]."
        ),
    )
    _add_inputs(prepare)
    prepare.add_argument(
        "--tokenizer", required=True, metavar="T", help='a tokenizer.json, a folder with one, or "bytes"'
    )
    prepare.add_argument(
        "--boundary",
        metavar="TOKEN",
        help="what ends documents (default: the tokenizer's eos_token)",
    )
    prepare.add_argument(
        "--workers",
        type=int,
        default=_cores(),
        metavar="N",
        help="processes (default: cores, %(default)s)",
    )
    prepare.set_defaults(run=run_prepare)
    tokenizer = actions.add_parser(
        "tokenizer",
        help="train a byte-level BPE tokenizer",
        description=f"Train a byte-level BPE tokenizer and write its tokenizer.json. {_INPUTS}",
    )
    _add_inputs(tokenizer)
    tokenizer.add_argument(
        "--vocab-size",
        type=int,
        required=True,
        metavar="N",
        help="tokens, the boundary among them; at least 257",
    )
    tokenizer.set_defaults(run=run_tokenizer)


def _add_inputs(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("input", nargs="+", metavar="INPUT", help="a file or a folder")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="the folder to write")
    parser.add_argument(
        "--field", default="text", help='where JSON and Parquet hold the text (default: "%(default)s")'
    )
    parser.add_argument(
        "--damaged",
        choices=["refuse", "skip"],
        default="refuse",
        help="what to do with records that cannot be read; skipped ones are counted and named "
        "(default: %(default)s)",
    )


def run_prepare(args: argparse.Namespace) -> int:
    """Prepare a set and say what is in it."""
    from flashtrain.data.prepare import DAMAGED, TOKENS, prepare

    with _writing(args.out), _bar("tokenizing") as advance:
        made = prepare(
            args.input,
            args.out,
            args.tokenizer,
            field=args.field,
            boundary=args.boundary,
            damaged=args.damaged,
            workers=args.workers,
            advance=advance,
        )
    print(f"{args.out / TOKENS}.bin: {made.tokens:,} tokens in {made.documents:,} documents")
    if made.empty:
        print(f"left out {made.empty:,} empty documents")
    if made.damaged:
        print(f"left out {made.damaged:,} damaged records, named in {args.out / DAMAGED}")
    return 0


def run_tokenizer(args: argparse.Namespace) -> int:
    """Train a tokenizer and say what came out."""
    from flashtrain.data.vocabulary import train_tokenizer

    with _writing(args.out), _bar("reading") as advance:
        trained = train_tokenizer(
            args.input, args.out, args.vocab_size, field=args.field, damaged=args.damaged, advance=advance
        )
    for name in trained.damaged[:10]:
        print(f"left out {name}", file=sys.stderr)
    if trained.damaged:
        print(f"left out {len(trained.damaged):,} damaged records")
    if trained.vocab_size < args.vocab_size:
        print(f"the text gives no more than {trained.vocab_size:,} tokens")
    print(f"{args.out / 'tokenizer.json'}: {trained.vocab_size:,} tokens")
    return 0


@contextmanager
def _writing(out: Path) -> Iterator[None]:
    """Turn an OSError into a UserError, unless it names a file that does not lie in ``out``."""
    from flashtrain.errors import UserError

    try:
        yield
    except OSError as error:
        named = out if error.filename is None else Path(os.fsdecode(error.filename))
        if not named.absolute().is_relative_to(out.absolute()):
            raise
        from flashtrain.checkpoint.files import explain  # takes torch along, which nothing else here needs

        raise UserError(f"cannot write {out}: {explain(error)}") from error


@contextmanager
def _bar(name: str) -> Iterator[Callable[[int, int], None]]:
    """A progress bar over bytes of input on a terminal; elsewhere nothing is shown."""
    from rich import progress
    from rich.console import Console

    columns = (
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        progress.DownloadColumn(),
        progress.TransferSpeedColumn(),
        progress.TimeRemainingColumn(),
    )
    console = Console(stderr=True)
    with progress.Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task(name, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _cores() -> int:
    return len(os.sched_getaffinity(0))
