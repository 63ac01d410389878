"""Start the ranks of one machine, and end with them: one line for what went wrong, no process left over.

torch's elastic launcher does the starting. This file keeps its logs and stack dumps from the user, and
is the program that each rank runs: ``python -m flashtrain.launch.ranks`` with the words of a command.
"""

import ctypes
import logging
import os
import signal
import sys
import tempfile
import uuid
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from flashtrain.errors import Stopped, TransportError, UserError
from flashtrain.launch import garbage, main

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

log = logging.getLogger("flashtrain.launch")

_LONGEST_SAVE = 600  # seconds


def launch(world: int, argv: Sequence[str]) -> int:
    """Run ``flashtrain ARGV`` on ``world`` new local ranks; returns the exit code of the whole.

    The first rank to fail ends all others. 2: a rank met a UserError, printed once. 1: a rank failed or
    was killed; one line names it. 128 + signal: this process or a rank was asked to end.
    """
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    _show_log()
    _share_cores(world)
    # Asked to end, ranks save first; without this they would be killed 30 s later, in the midst of it.
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(_LONGEST_SAVE))
    # Its loggers warn about every signal that they pass on, and dump the failures that are reported below.
    elastic = logging.getLogger("torch.distributed.elastic")
    elastic.addHandler(logging.NullHandler())
    elastic.propagate = False
    with tempfile.TemporaryDirectory(prefix="flashtrain-") as folder:
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=world,
            run_id=uuid.uuid4().hex,
            rdzv_backend="c10d",
            rdzv_endpoint="localhost:0",
            local_addr="127.0.0.1",
            max_restarts=0,
            logs_specs=DefaultLogsSpecs(log_dir=folder),
            signals_to_handle=",".join(_signals()),
        )
        try:
            elastic_launch(config, sys.executable)("-m", "flashtrain.launch.ranks", *argv)
        except ChildFailedError as error:
            return _explain(error.failures)
        except SignalException as error:
            return 128 + error.sigval
    return 0


def _signals() -> list[str]:
    """The signals that end a run; not the one that ``nohup`` has had ignored when the terminal goes."""
    hung_up = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    return ["SIGTERM", "SIGINT", "SIGQUIT", *([] if hung_up else ["SIGHUP"])]


def _show_log() -> None:
    logger = logging.getLogger("flashtrain")
    if not logger.handlers:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter("[%(name)s] %(message)s"))
        logger.addHandler(handler)
    logger.setLevel(logging.INFO)


def _share_cores(world: int) -> None:
    """Give each rank its share of the cores: by default every rank starts a thread for each core."""
    if "OMP_NUM_THREADS" in os.environ:
        log.info(
            "%d ranks, OMP_NUM_THREADS=%s as the environment has it", world, os.environ["OMP_NUM_THREADS"]
        )
        return
    cores = len(os.sched_getaffinity(0))
    threads = max(1, cores // world)
    os.environ["OMP_NUM_THREADS"] = str(threads)
    log.info("%d ranks share %d cores: OMP_NUM_THREADS=%d for each", world, cores, threads)


def _explain(failures: "Mapping[int, ProcessFailure]") -> int:
    """Print one line about the rank that brought the others down; returns the exit code."""

    def order(rank: int) -> tuple[int, int]:
        """Causes before consequences: peers of a dead rank report it, and the rest is ended by SIGTERM."""
        failure = failures[rank]
        if failure.exitcode < 0:
            return (5 if failure.exitcode == -signal.SIGTERM else 0), failure.timestamp
        if failure.exitcode == 2:
            return 1, failure.timestamp
        if failure.exitcode == Stopped.EXIT_CODE:
            return 4, failure.timestamp
        return (2 if _recorded(failure) is None else 3), failure.timestamp

    rank = min(failures, key=order)
    failure = failures[rank]
    if failure.exitcode < 0:
        main.report(f"rank {rank} was killed by {failure.signal_name()}; the other ranks were stopped")
        return 1
    if failure.exitcode == Stopped.EXIT_CODE:
        return failure.exitcode  # the ranks have said so
    message = _recorded(failure)
    if message is None:
        main.report(f"rank {rank} ended with exit code {failure.exitcode}; the other ranks were stopped")
        return 1
    main.report(message)
    return 2 if failure.exitcode == 2 else 1


def _recorded(failure: "ProcessFailure") -> str | None:
    """What a rank wrote about its own end, without the name of the exception."""
    message = failure.error_file_data.get("message")
    if not isinstance(message, Mapping):
        return None
    return str(message["message"]).partition(": ")[2]


def _die_with_parent() -> None:
    """Have the kernel end this rank when its launcher is gone, even if that was killed with SIGKILL."""
    set_parent_death_signal = 1
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)


def _rank_main(argv: Sequence[str]) -> int:
    """One rank: errors meant for a person go to the launcher, which prints one of them."""
    _die_with_parent()
    # Ctrl-C reaches every process of a terminal; the launcher alone answers it.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        return main.run(argv)
    except (UserError, TransportError) as error:
        from torch.distributed.elastic.multiprocessing.errors import get_error_handler

        get_error_handler().record_exception(error)
        return 2 if isinstance(error, UserError) else 1
    except Stopped:
        return Stopped.EXIT_CODE
    finally:
        garbage.none_at_exit()


if __name__ == "__main__":
    sys.exit(_rank_main(sys.argv[1:]))
