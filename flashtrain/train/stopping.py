"""The request to end that a scheduler sends before it takes a machine away."""

import logging
import signal
import threading
from types import FrameType

log = logging.getLogger("flashtrain.train")


class StopRequest:
    """Takes SIGTERM as the wish that the run saves and ends; inside ``with``.

    Later ones are taken the same way: launchers and schedulers send it more than once, and a second one
    must not cut the save short. Whoever cannot wait sends SIGKILL, which no save suffers from.
    """

    def __init__(self) -> None:
        self.requested = False

    def __enter__(self) -> "StopRequest":
        self._installed = threading.current_thread() is threading.main_thread()
        if self._installed:
            self._before = signal.signal(signal.SIGTERM, self._note)
        else:
            log.info("SIGTERM ends this run without a checkpoint: it does not run in the main thread")
        return self

    def __exit__(self, *error: object) -> None:
        if self._installed:
            signal.signal(signal.SIGTERM, self._before)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
