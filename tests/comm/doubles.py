"""Transports that do to an operation what machines do: lose its chunks, or dawdle."""

import random
import time
from collections.abc import Mapping

from torch import Tensor

from flashtrain.comm.schedule import Expect, Schedule, Send
from flashtrain.comm.transport.base import Exchange, Transport


class LosesChunks(Transport):
    """Delivers nothing: every landing place keeps what fresh memory holds."""

    name = "loses chunks"

    def open(self, schedule: Schedule, site: str) -> Exchange:
        return _Lost(self, schedule, site)

    def shutdown(self) -> None: ...


class _Lost(Exchange):
    def _transfer(
        self, step: int, sends: Mapping[Send, Tensor], expects: Mapping[Expect, Tensor]
    ) -> None: ...
    def _wait(self, step: int, expect: Expect) -> float:
        return 0.0

    def _close(self) -> None: ...
    def _abort(self) -> None: ...


class _Late(Exchange):
    """Another exchange whose calls each come after a random time."""

    def __init__(self, inner: Exchange, draw: random.Random) -> None:
        super().__init__(inner.transport, inner.schedule, inner.site)
        self.inner, self.draw = inner, draw

    def _dawdle(self) -> None:
        if self.draw.random() < 0.3:
            time.sleep(self.draw.random() * 0.004)

    def _transfer(self, step: int, sends: Mapping[Send, Tensor], expects: Mapping[Expect, Tensor]) -> None:
        self._dawdle()
        self.inner._transfer(step, sends, expects)

    def _wait(self, step: int, expect: Expect) -> float:
        self._dawdle()
        return self.inner._wait(step, expect)

    def _close(self) -> None:
        self._dawdle()
        self.inner._close()

    def _abort(self) -> None:
        self.inner._abort()


class Late(Transport):
    """Another transport whose rank dawdles, each rank in its own way."""

    name = "late"

    def __init__(self, inner: Transport) -> None:
        super().__init__(inner.rank, inner.world, inner.timeout)
        self.inner, self.draw = inner, random.Random(inner.rank)

    def open(self, schedule: Schedule, site: str) -> Exchange:
        return _Late(self.inner.open(schedule, site), self.draw)

    def shutdown(self) -> None:
        self.inner.shutdown()
