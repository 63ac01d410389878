"""Ranks that the others wait for are named with how often and by how much."""

import pytest

from flashtrain.errors import UserError
from flashtrain.train.stragglers import Straggler, Stragglers


def observe(steps: list[list[float]], window: int = 4, factor: float = 1.5) -> list[list[Straggler]]:
    stragglers = Stragglers(Stragglers.Config(window=window, factor=factor))
    return [stragglers.observe(seconds) for seconds in steps]


def test_a_rank_that_is_late_at_half_of_the_steps_is_named_at_the_end_of_the_window() -> None:
    usual = [1.0, 1.1, 0.9, 1.0]
    told = observe([usual, [1.0, 1.0, 2.0, 1.0], [9.0, 1.0, 4.0, 1.0], usual, usual, usual, usual, usual])
    assert told[3] == [Straggler(rank=2, late=2, steps=4, seconds=2.0)]
    assert str(told[3][0]) == "rank 2 was late at 2 of the last 4 steps, by 2.000 s in the median"
    assert [found for step, found in enumerate(told) if step != 3] == [[]] * 7


def test_of_two_ranks_the_faster_is_the_measure() -> None:
    assert observe([[1.0, 1.6]] * 4)[3] == [Straggler(rank=1, late=4, steps=4, seconds=pytest.approx(0.6))]
    assert observe([[1.0, 1.4]] * 4)[3] == []


def test_one_rank_waits_for_nobody_and_no_window_means_off() -> None:
    assert observe([[float(n)] for n in range(1, 9)]) == [[]] * 8
    assert observe([[1.0, 9.0]] * 8, window=0) == [[]] * 8


@pytest.mark.parametrize("setting", [{"window": -1}, {"factor": 1.0}])
def test_settings_out_of_range(setting: dict[str, float]) -> None:
    with pytest.raises(UserError, match=rf"^stragglers\.{next(iter(setting))} is "):
        Stragglers.Config(**setting).validate()  # type: ignore[arg-type]
