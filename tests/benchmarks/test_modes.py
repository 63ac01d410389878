"""How calls are timed, on a device whose clock the test holds."""

import importlib
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


class Clock:
    """A device on which a call takes as long as the test says; ``now`` in milliseconds."""

    def __init__(self) -> None:
        self.now, self.awake = 0.0, False
        self.slept: list[float] = []

    def mark(self) -> "Mark":
        return Mark(self)

    def synchronize(self) -> None: ...

    def sleep(self, milliseconds: float) -> None:
        self.slept.append(milliseconds)

    def asleep(self, mark: "Mark") -> bool:
        return not self.awake


class Mark:
    def __init__(self, clock: Clock) -> None:
        self.clock, self.at = clock, 0.0

    def record(self) -> None:
        self.at = self.clock.now

    def elapsed_time(self, later: "Mark") -> float:
        return later.at - self.at


class OneRank:
    """What ``Ranks`` does, for a rank whose slowest peer takes twice as long."""

    def __init__(self) -> None:
        self.device, self.met, self.settings = Clock(), 0, SimpleNamespace(calls=50)

    def meet(self) -> None:
        self.met += 1

    def align(self) -> None: ...

    def alive(self) -> None: ...

    def slowest(self, values: torch.Tensor) -> torch.Tensor:
        return values * 2


@pytest.fixture
def modes(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("on_gpu.modes")


@pytest.fixture
def ranks() -> OneRank:
    return OneRank()


def calls(ranks: OneRank, times: dict[str, Any], made: list[tuple[str, int]]) -> dict[str, Any]:
    def timed(name: str, milliseconds: Any) -> Any:
        def call(number: int) -> None:
            made.append((name, number))
            ranks.device.now += milliseconds(len(made)) if callable(milliseconds) else milliseconds

        return call

    return {name: timed(name, milliseconds) for name, milliseconds in times.items()}


def test_bursts_take_turns_and_lose_their_first_two_calls(modes: ModuleType, ranks: OneRank) -> None:
    made: list[tuple[str, int]] = []
    slow_start = {"a": lambda count: 100.0 if (count - 1) % 4 < 2 else 0.25, "b": 0.5}
    found = modes.launch_free(calls(ranks, slow_start, made), ranks, seconds=0.0, sets=3, burst=4)
    assert found["a"].ms.tolist() == [0.5] * 6  # three rounds of two kept calls, the slowest rank's
    assert found["b"].ms.tolist() == [1.0] * 6
    timed = made[8:]  # the first bursts are a trial
    assert "".join(name for name, _ in timed) == "aaaabbbb" + "bbbbaaaa" + "aaaabbbb"
    assert [number for name, number in timed if name == "a"] == [n % 3 for n in range(12)]
    assert len(ranks.device.slept) == 8
    assert min(ranks.device.slept) >= modes.SLEEP


def test_bursts_of_which_the_device_did_not_wait_are_counted(modes: ModuleType, ranks: OneRank) -> None:
    ranks.device.awake = True
    found = modes.launch_free(calls(ranks, {"a": 0.1}, []), ranks, seconds=0.0, sets=1)
    assert found["a"].summary()["late"] == 2.0  # of this stand-in's slowest rank: all of them


def test_long_calls_come_in_shorter_bursts(modes: ModuleType, ranks: OneRank) -> None:
    short, long = (
        modes.launch_free(calls(ranks, {"a": ms}, []), ranks, seconds=1e9, sets=1)["a"] for ms in (0.1, 10.0)
    )
    assert (len(short.ms), len(long.ms)) == (54, 51)  # nine bursts of 8, seventeen of 5


def test_host_issued_calls_start_at_a_meeting_each(modes: ModuleType, ranks: OneRank) -> None:
    made: list[tuple[str, int]] = []
    found = modes.host_issued(calls(ranks, {"a": 1.0, "b": 2.0}, made), ranks, seconds=0.0, sets=4)
    assert {name: times.summary()["median"] for name, times in found.items()} == {"a": 2.0, "b": 4.0}
    assert ranks.met == len(made) == 2 * (2 + modes.FEWEST_CALLS)
    assert found["a"].summary()["calls"] == modes.FEWEST_CALLS
