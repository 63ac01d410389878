"""Grouped-query attention on one packed weight, and rotary positions."""

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from flashtrain.nn.attention import Attention, Llama3Scaling, rotary_table, rotate

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


def unpacked(layer: Attention, kv_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Weights of all query, key and value heads, ``[heads, head_dim, hidden]`` each."""
    packed = layer.qkv.weight.view(kv_heads, layer.group + 2, HEAD, -1)
    return packed[:, : layer.group].flatten(0, 1), packed[:, -2], packed[:, -1]


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_packed_layer_equals_attention_head_by_head(kv_heads: int) -> None:
    torch.manual_seed(0)
    layer = Attention(32, 4, kv_heads, HEAD).double()
    x, rotary = torch.randn(6, 3, 32, dtype=torch.float64), table(6).double()
    queries, keys, values = unpacked(layer, kv_heads)
    heads = []
    for head, weight in enumerate(queries):
        kv = head // layer.group
        query, key = (rotate((x @ w.t()).transpose(0, 1), rotary) for w in (weight, keys[kv]))
        value = (x @ values[kv].t()).transpose(0, 1)
        heads.append(scaled_dot_product_attention(query, key, value, is_causal=True).transpose(0, 1))
    wanted = torch.cat(heads, dim=-1) @ layer.out.weight.t()
    torch.testing.assert_close(layer(x, rotary), wanted)
    # Row shards of the sequence come without their batch dimension.
    torch.testing.assert_close(layer(x.flatten(0, 1), rotary), layer(x, rotary))


def test_grouped_queries_equal_full_heads_with_repeated_kv_weights() -> None:
    torch.manual_seed(0)
    grouped, full = Attention(32, 4, 2, HEAD).double(), Attention(32, 4, 4, HEAD).double()
    queries, keys, values = unpacked(grouped, 2)
    repeated = [queries, keys.repeat_interleave(2, dim=0), values.repeat_interleave(2, dim=0)]
    with torch.no_grad():
        full.qkv.weight.copy_(torch.stack(repeated, dim=1).flatten(0, 2))
        full.out.weight.copy_(grouped.out.weight)
    x = torch.randn(5, 2, 32, dtype=torch.float64)
    torch.testing.assert_close(full(x, table(5).double()), grouped(x, table(5).double()))


@pytest.mark.parametrize("parts", [2, 4])
def test_contiguous_cuts_of_the_packed_weight_are_whole_sets_of_heads(parts: int) -> None:
    torch.manual_seed(0)
    layer = Attention(64, 8, 4, HEAD).double()
    x, rotary = torch.randn(5, 2, 64, dtype=torch.float64), table(5).double()
    total = torch.zeros_like(x)
    for qkv, out in zip(layer.qkv.weight.chunk(parts), layer.out.weight.chunk(parts, dim=1), strict=True):
        piece = Attention(64, 8 // parts, 4 // parts, HEAD).double()
        with torch.no_grad():
            piece.qkv.weight.copy_(qkv)
            piece.out.weight.copy_(out)
        total = total + piece(x, rotary)
    torch.testing.assert_close(total, layer(x, rotary))
