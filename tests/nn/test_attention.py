"""Grouped-query attention on one packed weight."""

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from flashtrain.nn.attention import Attention, KeyValues
from flashtrain.nn.rotary import rotary_table, rotate

HEAD = 8


def table(sequence: int) -> Tensor:
    return rotary_table(sequence, HEAD, 10_000.0)


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


@pytest.mark.parametrize("pieces", [(6,), (1,) * 6, (3, 1, 2)])
def test_a_sequence_in_pieces_is_the_sequence(pieces: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    layer = Attention(32, 4, 2, HEAD).double()
    x, rotary = torch.randn(6, 3, 32, dtype=torch.float64), table(6).double()
    outputs, past, done = [], None, 0
    for piece in pieces:
        positions = slice(done, done + piece)
        output, past = layer.extend(x[positions], rotary[:, positions], past)
        outputs.append(output)
        done += piece
    assert isinstance(past, KeyValues)
    assert past.key.shape == past.value.shape == (3, 2, 6, HEAD)
    torch.testing.assert_close(torch.cat(outputs), layer(x, rotary))
