"""The ``flashtrain`` command: finds the subcommand, runs it, and turns what went wrong into one line.

Exit codes: 0 done; 2 bad input (UserError); 1 a rank or its peer failed (TransportError); 130 interrupted;
143 ended by SIGTERM, with a checkpoint (Stopped). Where whoever reads the output has gone, as ``| head``
does, it ends with 1 and without a word.
"""

import argparse
import importlib
import io
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

import flashtrain
from flashtrain.config import nearest
from flashtrain.errors import Stopped, TransportError, UserError
from flashtrain.launch import garbage

# Each is a module beside this one with ``add_parser(subparsers)``, imported only when it is asked for.
COMMANDS = {
    "train": "train a model from a recipe",
    "data": "turn text into token files, train a tokenizer",
    "convert": "convert models from and to Hugging Face",
    "sample": "continue a prompt with the model of a checkpoint",
    "report": "write a run's curves, events and settings as one HTML page",
    "bench": "time whole training steps: MFU, memory, where the time goes",
    "schedule": "print and draw a communication schedule",
    "nodes": "print what starts a run on several hosts, by torchrun or Slurm",
    "doctor": "report what this machine has and which paths training would take",
}


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are UserErrors, and which takes no abbreviated options."""

    def __init__(self, *args: object, **settings: object) -> None:
        super().__init__(*args, **{"allow_abbrev": False, **settings})  # type: ignore[arg-type]

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see {self.prog} --help)")


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Arguments of a subcommand; ``run`` is its function, ``settings`` the words left over for it.

    Only a subcommand with ``takes_settings`` may have words left over. Raises UserError for an unknown
    subcommand, option or argument; leaves by SystemExit for ``--help`` and ``--version``.
    """
    parser = Parser(
        prog="flashtrain",
        description=flashtrain.__doc__,
        epilog="flashtrain COMMAND --help says more. A first run: flashtrain train demo",
    )
    parser.add_argument("--version", action="version", version=f"flashtrain {flashtrain.__version__}")
    subparsers = parser.add_subparsers(title="commands", dest="command", metavar="COMMAND", required=True)
    wanted = argv[0] if argv else "--help"
    if wanted not in COMMANDS and wanted not in ("-h", "--help", "--version"):
        kind, options = "command", list(COMMANDS)
        if wanted.startswith("-"):
            kind, options = "option", ["--help", "--version"]
        raise UserError(f"unknown {kind} {wanted}; the nearest is {nearest(wanted, options)}")
    for name, summary in COMMANDS.items():
        if name == wanted:
            importlib.import_module(f"flashtrain.launch.{name}").add_parser(subparsers)
        else:
            subparsers.add_parser(name, help=summary)
    args, rest = parser.parse_known_args(argv or ["--help"])
    args.settings = rest
    if rest and not getattr(args, "takes_settings", False):
        if not rest[0].startswith("-"):
            raise UserError(f"flashtrain {wanted}: unexpected argument {rest[0]}")
        known = [option for option in _options(subparsers.choices[wanted]) if option.startswith("--")]
        guess = nearest(rest[0].partition("=")[0], known)
        raise UserError(f"flashtrain {wanted}: unknown option {rest[0]}; the nearest is {guess}")
    return args


def _options(parser: argparse.ArgumentParser) -> list[str]:
    """Options of a parser and of the actions below it."""
    found = [option for action in parser._actions for option in action.option_strings]
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            found += [option for below in action.choices.values() for option in _options(below)]
    return found


def report(error: BaseException | str) -> None:
    """Print what went wrong as one line."""
    print("flashtrain: error:", " ".join(str(error).splitlines()), file=sys.stderr, flush=True)


def run(argv: Sequence[str]) -> int:
    """Run the command line ``argv``; returns its exit code. A file that the system refuses is a UserError."""
    args = parse(argv)
    try:
        return int(args.run(args))
    except BrokenPipeError:
        raise
    except OSError as error:
        from flashtrain.checkpoint.files import NO_ROOM, explain  # takes torch along

        if error.errno in NO_ROOM:
            raise UserError(explain(error)) from error
        if error.filename is None:
            raise
        what = f"{os.fsdecode(error.filename)}: {error.strerror}"
        raise UserError(f"{what}: choose another path, or mend this one") from error


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line ``argv`` (without the program's name); returns the exit code."""
    try:
        return run(sys.argv[1:] if argv is None else argv)
    except UserError as error:
        # Every rank that torchrun started meets the same error. The others' goes to torchrun's own
        # report, which names the rank that failed first.
        if int(os.environ.get("RANK", 0)) == 0:
            report(error)
        else:
            from torch.distributed.elastic.multiprocessing.errors import get_error_handler

            get_error_handler().record_exception(error)
        return 2
    except TransportError as error:
        report(error)
        return 1
    except Stopped:
        return Stopped.EXIT_CODE
    except KeyboardInterrupt:
        return 130


def program() -> int:
    """``main`` as the last thing that this process does."""
    _mend_streams()
    try:
        try:
            return main()
        finally:
            sys.stdout.flush()
    except OSError as error:
        # Python would flush again at the end, and complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if not isinstance(error, BrokenPipeError):
            report(f"cannot write to standard output: {error.strerror}")
        return 1
    finally:
        garbage.none_at_exit()


def _mend_streams() -> None:
    """Let output go nowhere where it was closed, for ranks too, and name what its encoding lacks."""
    for number, name in ((1, "stdout"), (2, "stderr")):
        if getattr(sys, name) is None:
            os.dup2(os.open(os.devnull, os.O_WRONLY), number)
            os.set_inheritable(number, True)
            setattr(sys, name, open(number, "w", closefd=False))  # noqa: SIM115
        if isinstance(stream := getattr(sys, name), io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


if __name__ == "__main__":
    sys.exit(program())
