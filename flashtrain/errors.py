"""The ways in which a run ends early for a reason that a person can mend."""


class UserError(Exception):
    """Bad input: a setting, a path, a file. The message is one line that names the culprit and the remedy.

    The command line prints the message alone and exits with code 2.
    """


class TransportError(RuntimeError):
    """A peer died, stopped answering, or sent something other than the schedule says.

    The message names rank, site, operation, step, chunk and peer. The command line exits with code 1.
    """


class Stopped(Exception):
    """The run was asked to end by SIGTERM, and has saved what it had. The command line exits with 143."""

    EXIT_CODE = 143  # 128 + SIGTERM, as shells and schedulers read it


def first_line(error: BaseException) -> str:
    """What ``error`` says, as far as one line goes; its type if it says nothing."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
