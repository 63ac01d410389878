"""Windows of attention: those of the figure, how far tokens reach, equal cost, what is refused."""

import pytest
import torch

from flashtrain.errors import UserError
from flashtrain.nn.windows import Windows, balanced_share


def tokens_of(windows: Windows, layer: int, share: float = 1 / 3) -> set[int]:
    """The tokens of attention among six, counted from 1 as in the figure."""
    first, last = windows.window(layer, 6, share)
    return set(range(first + 1, last + 1))


def test_six_tokens_go_where_the_figure_says() -> None:
    alternating = Windows(strategy="alternating", align=1)
    assert [tokens_of(alternating, layer) for layer in range(3)] == [{4, 5, 6}, {1, 2, 3}, {4, 5, 6}]
    fixed = Windows(strategy="fixed", side="last", align=1)
    assert [tokens_of(fixed, layer) for layer in range(3)] == [{5, 6}] * 3
    assert tokens_of(Windows(strategy="fixed", align=1), 0) == {1, 2}
    circulating = Windows(strategy="circulating", align=1)
    assert [tokens_of(circulating, layer) for layer in range(4)] == [{5, 6}, {3, 4}, {1, 2}, {5, 6}]
    assert Windows(strategy="none").window(0, 6, 0.5) == (0, 6)


def test_the_published_fixed_share() -> None:
    assert Windows(strategy="fixed", align=1).window(3, 1024, 0.59) == (0, 604)


@pytest.mark.parametrize(
    ("windows", "share", "reached"),
    [
        (Windows(strategy="none", align=1), 0.5, [1.0, 1.0, 1.0, 1.0]),
        (Windows(strategy="alternating", align=1), 0.5, [0.54] * 4),
        (Windows(strategy="fixed", align=1), 0.59, [0.55] * 4),
        (Windows(strategy="circulating", align=1), 1 / 3, [0.59, 0.795, 1.0, 1.0]),
        (Windows(strategy="circulating", steps="disjoint", align=1), 1 / 3, [0.59, 0.795, 1.0, 1.0]),
        (Windows(strategy="circulating", steps="disjoint", align=1), 0.55, [0.55] * 4),
        (Windows(strategy="circulating", align=1), 0.55, [0.55, 0.885, 1.0, 1.0]),
    ],
)
def test_how_many_pairs_of_tokens_meet(windows: Windows, share: float, reached: list[float]) -> None:
    assert reach(windows, share, 12, 4) == pytest.approx(reached, abs=0.005)


def test_evenly_spaced_windows_reach_all_from_three_blocks_on_at_equal_cost() -> None:
    windows = Windows(strategy="circulating", align=1)
    for tenths in range(1, 10):
        blocks = max(3, -(-10 // tenths))
        found = [windows.window(layer, 120, tenths / 10) for layer in range(blocks)]
        assert {last - first for first, last in found} == {12 * tenths}
        assert reach(windows, tenths / 10, 120, 3)[-1] == 1.0, tenths


def reach(windows: Windows, share: float, tokens: int, blocks: int) -> list[float]:
    """After each block, the part of the causal pairs of tokens that influence each other."""
    known, found = torch.eye(tokens), []
    for layer in range(blocks):
        first, last = windows.window(layer, tokens, share)
        inside = (torch.arange(tokens) >= first) & (torch.arange(tokens) < last)
        meet = (inside[:, None] == inside[None, :]).tril()
        if windows.strategy == "none":
            meet = torch.ones(tokens, tokens, dtype=torch.bool).tril()
        known = ((meet.float() @ known) > 0).float()
        found.append(float(known.sum()) / (tokens * (tokens + 1) / 2))
    return found


def test_edges_are_aligned() -> None:
    for strategy in ("alternating", "fixed", "circulating"):
        for layer in range(5):
            edges = Windows(strategy=strategy).window(layer, 1024, 0.55)
            assert not any(edge % 128 for edge in edges), edges


def test_disjoint_windows_tile_the_sequence_and_the_last_takes_the_rest() -> None:
    windows = Windows(strategy="circulating", steps="disjoint", align=1)
    assert sorted(windows.window(layer, 10, 0.3) for layer in range(4)) == [(0, 3), (3, 6), (6, 9), (9, 10)]


@pytest.mark.parametrize("strategy", ["fixed", "circulating"])
def test_no_share_and_all(strategy: str) -> None:
    windows = Windows(strategy=strategy)
    assert windows.window(1, 256, 0.0) == (0, 0)
    assert windows.window(1, 256, 1.0) == (0, 256)


@pytest.mark.parametrize(
    ("tokens", "share", "message"),
    [
        (130, 0.5, "130 tokens are no multiple of model.layout.align 128: choose another"),
        (256, 0.1, "attention's share 0.1 of 256 tokens, in steps of model.layout.align 128, is 0, which"),
        (256, 0.9, "attention's share 0.9 of 256 tokens, in steps of model.layout.align 128, is 256, which"),
    ],
)
def test_windows_that_do_not_fit_are_refused(tokens: int, share: float, message: str) -> None:
    with pytest.raises(UserError, match=f"^{message}"):
        Windows(strategy="circulating").window(0, tokens, share)


def test_the_balanced_share_solves_its_equation() -> None:
    share = balanced_share(lambda n: 3.0 + n / 1000, lambda n: 2.0, 1000)
    assert share * (3.0 + share) == pytest.approx((1 - share) * 2.0, rel=5e-3)
    assert balanced_share(lambda n: 1.0, lambda n: 1.0, 10) == 0.5
