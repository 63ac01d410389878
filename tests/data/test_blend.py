"""Blends: exact shares, an order that is a pure function of seed and number, all windows of every set."""

import numpy as np
import pytest
import torch

from flashtrain.data import Blend, Windows
from flashtrain.data.blend import PERIOD, quotas
from flashtrain.errors import UserError

# A token tells its set and its position.
SETS = [np.arange(1003), 10_000 + np.arange(503), 20_000 + np.arange(203)]
NAMES = ["a", "b", "c"]
WEIGHTS = [0.5, 0.3, 0.2]


def blend(seed: int = 3, weights: list[float] = WEIGHTS, length: int = 10) -> Blend:
    return Blend(SETS[: len(weights)], NAMES[: len(weights)], weights, length, seed)


def test_every_period_gives_every_set_its_exact_share() -> None:
    mixed = blend()
    places = [mixed.where(index) for index in range(3 * PERIOD)]
    for period in range(3):
        chosen = [k for k, _ in places[period * PERIOD : (period + 1) * PERIOD]]
        assert [chosen.count(k) for k in range(3)] == mixed.quotas
    assert [round(quota / PERIOD, 3) for quota in mixed.quotas] == WEIGHTS
    for k in range(3):  # each set's samples come in their own order, none left out and none twice
        assert [number for chosen, number in places if chosen == k] == list(range(3 * mixed.quotas[k]))
    early = [k for k, _ in places[:2000]]  # and the shares hold long before a period ends
    assert [abs(early.count(k) / 2000 - WEIGHTS[k]) < 0.05 for k in range(3)] == [True] * 3


def test_a_sample_is_the_same_whatever_was_asked_before_and_whoever_asks() -> None:
    around = range(PERIOD - 30, PERIOD + 34)  # across the end of a period
    whole, _ = blend().batch(around[0], len(around))
    for ranks in (1, 2, 4):
        per_rank = len(around) // ranks
        parts = [blend().batch(around[0] + rank * per_rank, per_rank)[0] for rank in range(ranks)]
        assert torch.equal(torch.cat(parts), whole)
    used = blend()
    for index in np.random.default_rng(0).permutation(len(around)):
        assert torch.equal(used.batch(around[0] + int(index), 1)[0][0], whole[index])
    inputs, targets = blend().batch(0, 4)
    assert inputs.shape == targets.shape == (4, 10)
    assert inputs.dtype == torch.int64
    assert torch.equal(targets, inputs + 1)


def test_seeds_differ_and_so_do_sets_of_one_size() -> None:
    orders = [[mixed.where(index)[0] for index in range(200)] for mixed in (blend(3), blend(4))]
    assert orders[0] != orders[1]
    twins = Blend([SETS[0], SETS[0]], ["a", "b"], [1, 1], 10, 3)
    starts = [[windows.start(i) for i in range(50)] for windows in twins.windows]
    assert starts[0] != starts[1]


def test_one_set_gives_what_its_windows_give() -> None:
    alone, windows = blend(weights=[7.0]), Windows(SETS[0], 10, 3)
    for ours, plain in zip(alone.batch(190, 20), windows.batch(190, 20), strict=True):
        assert torch.equal(ours, plain)


def test_the_order_is_the_one_that_earlier_versions_gave() -> None:
    # Written down: a change of NumPy or of the code that moves it would make resumed runs read other data.
    assert [blend().where(index) for index in range(PERIOD - 4, PERIOD + 4)] == PINNED


PINNED = [(0, 32766), (1, 19660), (2, 13106), (0, 32767), (2, 13107), (0, 32768), (2, 13108), (0, 32769)]


def test_quotas_are_shared_out_without_rounding() -> None:
    assert quotas([1, 1, 1], NAMES, 10) == [4, 3, 3]
    assert quotas([0.1, 0.2, 0.7], NAMES, 10) == [1, 2, 7]
    assert quotas([1e-9, 1.0], NAMES[:2], 4) == [0, 4]
    generator = np.random.default_rng(0)
    for _ in range(200):
        weights = generator.random(5).tolist()
        given = quotas(weights, "abcde", 1000)
        assert sum(given) == 1000
        assert max(abs(g - 1000 * w / sum(weights)) for g, w in zip(given, weights, strict=True)) < 1


def test_bad_weights_are_named() -> None:
    for weight in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(UserError, match="the weight of b is"):
            blend(weights=[1.0, weight])
    with pytest.raises(UserError, match="the weight of b gives it less than one of 65,536 samples"):
        blend(weights=[1.0, 1e-6])
    with pytest.raises(ValueError, match="must not be negative"):
        blend().where(-1)
