"""Rotary positions."""

import pytest
import torch
from torch import Tensor

from flashtrain.nn.rotary import Llama3Scaling, rotary_table, rotate

HEAD = 8


def table(sequence: int) -> Tensor:
    return rotary_table(sequence, HEAD, 10_000.0)


def test_rotary_scores_depend_on_the_distance_of_positions_alone() -> None:
    query, key = torch.randn(2, HEAD, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rotary = table(64).double()
    at = [(rotate(query.expand(64, HEAD), rotary)), rotate(key.expand(64, HEAD), rotary)]
    scores = at[0] @ at[1].t()
    for distance in (-20, -1, 0, 3, 40):
        same = scores.diagonal(distance)
        torch.testing.assert_close(same, same[:1].expand_as(same), rtol=0, atol=1e-5)
    assert (scores[0, 0] - scores[0, 1]).abs() > 1e-3, "positions make no difference"


def test_llama3_scaling_keeps_fast_pairs_and_slows_slow_ones() -> None:
    scaling = Llama3Scaling(original_max_position_embeddings=1000)
    # Turns in 1000 tokens: more than 4 stay, fewer than 1 are slowed by 8, at 2.5 the mean of both.
    turns = torch.tensor([100.0, 4.0, 2.5, 1.0, 0.1], dtype=torch.float64)
    wanted = turns * torch.tensor([1, 1, 0.5 + 0.5 / 8, 1 / 8, 1 / 8], dtype=torch.float64)
    radians = 2 * torch.pi / 1000
    torch.testing.assert_close(scaling.scale(turns * radians), wanted * radians, rtol=1e-12, atol=0)


def test_rotation_keeps_lengths_and_leaves_position_zero_alone() -> None:
    x = torch.randn(3, 5, HEAD, generator=torch.Generator().manual_seed(0))
    turned = rotate(x, table(5))
    torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1))
    assert torch.equal(turned[:, 0], x[:, 0])


def test_rotary_frequencies_are_those_of_the_paper() -> None:
    cosine, sine = table(7)
    for position in (0, 1, 6):
        for pair in range(HEAD // 2):
            angle = torch.tensor(position * 10_000.0 ** (-2 * pair / HEAD), dtype=torch.float64)
            for half in (pair, pair + HEAD // 2):
                assert cosine[position, half].item() == pytest.approx(angle.cos().item(), abs=1e-7)
                assert sine[position, half].item() == pytest.approx(angle.sin().item(), abs=1e-7)


def test_a_table_may_start_at_any_position() -> None:
    assert torch.equal(rotary_table(3, HEAD, 10_000.0, first=4), table(7)[:, 4:])
