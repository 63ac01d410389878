"""Python's garbage collector stays out of the way where there is no garbage: at the start and at the end."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def none_in_imports() -> Iterator[None]:
    """Import within this without collections, and have none walk through what was imported later on.

    What modules define stays: collections walk through it in vain, a third of the time that importing torch
    and flashtrain takes, and tens of milliseconds in the middle of a training step.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if enabled:
            gc.enable()


def none_at_exit() -> None:
    """Call when a process is about to end: all that lives now goes with it, unexamined."""
    gc.freeze()
