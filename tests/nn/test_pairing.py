"""Pairings: what the names mean, attention against tied heads, shares of a layer."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from flashtrain.errors import UserError
from flashtrain.models.decoder import Decoder
from flashtrain.models.generate import generate
from flashtrain.nn.attend import Heads
from flashtrain.nn.attention import Attention
from flashtrain.nn.attention_kernels import cudnn_gradients
from flashtrain.nn.copied_heads import copied
from flashtrain.nn.paired import PairedProjection
from flashtrain.nn.paired_attention import Method, attend_pairs
from flashtrain.nn.pairing import Pairing
from flashtrain.nn.rotary import rotary_table, rotate

HIDDEN, HEAD = 48, 8
TABLE = rotary_table(7, HEAD, 10_000.0)
CONFIG = Decoder.Config(vocabulary=20, hidden=48, layers=2, heads=6, mlp_width=64, pairing="gqkva-2.3")


def layer(name: str, heads: int = 6, **options: bool) -> Attention:
    torch.manual_seed(0)
    return Attention(HIDDEN, heads, heads, HEAD, pairing=Pairing.named(name, heads), **options)


def tied(paired: Attention) -> Attention:
    """Multi-head attention whose heads are copies of those of ``paired``."""
    pairing, projection = paired.pairing, paired.qkv
    assert pairing is not None
    assert isinstance(projection, PairedProjection)
    full = Attention(HIDDEN, pairing.heads, pairing.heads, HEAD)
    query, key, value = (
        weight.detach().unflatten(0, (-1, HEAD))
        for weight in (projection.query_weight, projection.key_weight, projection.value_weight)
    )
    rows = [[query[i], key[j], value[j]] for i, j in pairing.pairs]
    with torch.no_grad():
        full.qkv.weight.copy_(torch.stack([torch.stack(row) for row in rows]).flatten(0, 2))
        full.out.weight.copy_(paired.out.weight)
    return full


def draw(sequence: int = 7) -> Tensor:
    return torch.randn(sequence, 2, HIDDEN, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("name", "order", "pairs"),
    [
        ("mha", "j_major", "0:0 1:1 2:2 3:3 4:4 5:5"),
        ("mqa", "j_major", "0:0 1:0 2:0 3:0 4:0 5:0"),
        ("mkva", "j_major", "0:0 0:1 0:2 0:3 0:4 0:5"),
        ("gqa-2", "j_major", "0:0 1:0 2:0 3:1 4:1 5:1"),
        ("GKVA-3", "j_major", "0:0 0:1 1:2 1:3 2:4 2:5"),
        ("gqkva-2.3", "j_major", "0:0 1:0 0:1 1:1 0:2 1:2"),
        ("gqkva-2.3", "i_major", "0:0 0:1 0:2 1:0 1:1 1:2"),
    ],
)
def test_names_mean_the_pairs_of_the_paper(name: str, order: str, pairs: str) -> None:
    found = Pairing.named(name, 6, order)  # type: ignore[arg-type]
    assert " ".join(f"{i}:{j}" for i, j in found.pairs) == pairs
    assert Pairing.named(pairs, 6) == found
    assert Pairing.named(pairs.replace(" ", ","), 6) == found
    assert found.is_grouped == (name in ("mha", "mqa", "gqa-2"))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("gqkva-4.2", "pairing gqkva-4.2: 4 x 2 pairs are not the 6 heads"),
        ("gqa-4", "pairing gqa-4: 4 groups do not divide 6 heads"),
        ("gkva-0", "pairing gkva-0: 0 groups do not divide 6 heads"),
        ("gqvka-2.3", "pairing 'gqvka-2.3' is not known; there are mha, mqa, mkva, gqa-G, gkva-G, gqkva-A.B"),
        ("0:0 1:1", "pairing: 2 pairs are listed for 6 heads"),
        ("0:0 1:0 2:0 0:2 1:2 2:2", "pairing: KV head 1 of 3 is in no pair; leave it out"),
        ("0:0 1:0 2:0 0:1 1:1 1:1", "pairing: the pair 1:1 occurs twice"),
    ],
)
def test_what_does_not_fit_is_one_line(name: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        Pairing.named(name, 6)
    assert str(caught.value).startswith(message)
    with pytest.raises(UserError, match=r"^model\.pairing"):
        replace(CONFIG, pairing=name).validate()


def test_heads_out_of_range_are_refused() -> None:
    with pytest.raises(UserError, match="query head 2 is not among the 2 there are"):
        Pairing(2, 1, ((0, 0), (1, 0), (2, 0)))
    with pytest.raises(UserError, match="KV head -1 is not among the 1 there are"):
        Pairing(2, 1, ((0, 0), (1, -1)))


def test_ranks_must_share_the_pairs_equally() -> None:
    replace(CONFIG, vocabulary=21, mlp_width=192).validate(3)
    with pytest.raises(UserError, match=r"^model\.heads is 6; parallel\.tensor 4 must divide it"):
        replace(CONFIG, mlp_width=256).validate(4)
    with pytest.raises(UserError, match="6 pairs do not divide by 4 ranks"):
        Pairing.named("mha", 6).share(0, 4)


@pytest.mark.parametrize(("name", "kv_heads"), [("mha", 6), ("gqa-3", 3), ("mqa", 1), ("gqkva-6.1", 1)])
def test_grouped_queries_keep_their_weight_and_their_bits(name: str, kv_heads: int) -> None:
    paired = layer(name, qkv_bias=True)
    torch.manual_seed(0)
    plain = Attention(HIDDEN, 6, kv_heads, HEAD, qkv_bias=True)
    x = draw()
    for (one, ours), (other, theirs) in zip(paired.named_parameters(), plain.named_parameters(), strict=True):
        assert one == other
        assert torch.equal(ours, theirs), one
    out, wanted = paired(x, TABLE), plain(x, TABLE)
    assert torch.equal(out, wanted)
    slope = draw().flip(0)
    ours, theirs = (
        torch.autograd.grad(y, list(m.parameters()), slope) for y, m in ((out, paired), (wanted, plain))
    )
    for one, other in zip(ours, theirs, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("name", ["gqa-3", "mqa"])
def test_grouped_queries_equal_those_of_torch(name: str) -> None:
    pairing = Pairing.named(name, 6)
    query, key, value = (torch.randn(2, n, 5, HEAD) for n in (6, pairing.n_kv, pairing.n_kv))
    wanted = scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
    torch.testing.assert_close(attend_pairs(Heads(query, key, value), pairing), wanted)


@pytest.mark.parametrize("name", ["gqkva-2.3", "gqkva-3.2", "gkva-2", "mkva", "0:1 2:0 1:1 0:0"])
def test_equals_multi_head_attention_with_tied_weights(name: str) -> None:
    heads = len(name.split()) if ":" in name else 6
    paired = layer(name, heads)
    full, x = tied(paired), draw()
    out, wanted = paired(x, TABLE), full(x, TABLE)
    assert torch.equal(out, wanted)

    paired, full, x = paired.double(), full.double(), x.double()
    slope = draw().double().flip(0)
    paired(x, TABLE.double()).backward(slope)
    full(x, TABLE.double()).backward(slope)
    pairing, packed = paired.pairing, full.qkv.weight.grad.view(heads, 3, HEAD, HIDDEN)
    torch.testing.assert_close(paired.out.weight.grad, full.out.weight.grad)
    for name, place, heads_of, count in (
        ("query_weight", 0, pairing.query_of, pairing.n_q),
        ("key_weight", 1, pairing.key_of, pairing.n_kv),
        ("value_weight", 2, pairing.key_of, pairing.n_kv),
    ):
        ties = torch.zeros(count, HEAD, HIDDEN, dtype=torch.float64)
        ties.index_add_(0, torch.tensor(heads_of), packed[:, place])
        torch.testing.assert_close(paired.qkv.get_parameter(name).grad, ties.flatten(0, 1))


def leaves_of(pairing: Pairing, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Views of a packed projection ``[S, B, heads, D]``."""
    packed = torch.randn(7, 2, pairing.n_q + 2 * pairing.n_kv, HEAD, dtype=torch.float64).to(dtype)
    parts = packed.permute(1, 2, 0, 3).split([pairing.n_q, pairing.n_kv, pairing.n_kv], dim=1)
    return [part.detach().requires_grad_() for part in parts]


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("name", ["gqkva-2.3", "gkva-2", "gqa-3", "mkva", "0:1 2:0 1:1 0:0"])
def test_methods_agree_in_output_and_gradients(name: str, causal: bool) -> None:
    pairing = Pairing.named(name, len(name.split()) if ":" in name else 6)
    leaves = leaves_of(pairing)
    slope = torch.randn(2, pairing.heads, 7, HEAD, dtype=torch.float64)
    outcomes: dict[Method, list[Tensor]] = {}
    for method in ("kernel", "expand", "mixed"):
        out = attend_pairs(Heads(*leaves), pairing, causal, method)
        outcomes[method] = [out, *torch.autograd.grad(out, leaves, slope)]
    wanted = outcomes.pop("kernel")
    for found in outcomes.values():
        for one, other in zip(found, wanted, strict=True):
            torch.testing.assert_close(one, other)


def test_cudnn_is_handed_what_its_operator_takes() -> None:
    query, out = torch.empty(2, 6, 7, HEAD, device="meta"), torch.empty(2, 6, 7, HEAD, device="meta")
    key = torch.empty(2, 3, 7, HEAD, device="meta")
    found = cudnn_gradients(out, query, key, key, out, torch.empty(2, 6, 7, device="meta"), True)
    assert [x.shape for x in found] == [query.shape, key.shape, key.shape]


@pytest.mark.parametrize("wanted", [(0, 1, 0, 1, 0, 1), (0, 0, 0, 1, 1, 1), (1, 0, 0, 1, 1, 1)])
def test_copies_lie_token_by_token_and_their_gradients_are_added_in_fp32(wanted: tuple[int, ...]) -> None:
    for skipped, row in ((0, 16), (1, 20), (0, 17)):  # heads in whole words; one element off; now and then
        packed = torch.randn(7, 2, row).bfloat16()[:, :, skipped : skipped + 2 * HEAD]
        x = packed.unflatten(2, (2, HEAD)).permute(1, 2, 0, 3).requires_grad_()
        out = copied(x, wanted)
        assert torch.equal(out, x[:, list(wanted)])
        assert out.permute(2, 0, 1, 3).is_contiguous()
        slope = torch.randn(out.shape).bfloat16()
        total = torch.zeros(x.shape).index_add_(1, torch.tensor(wanted), slope.float())
        assert torch.equal(torch.autograd.grad(out, x, slope)[0], total.bfloat16())


def test_positions_before_pairing_equal_those_after() -> None:
    paired, x = layer("gqkva-3.2").double(), draw().double()
    pairing, table = paired.pairing, TABLE.double()
    packed = paired.qkv(x).unflatten(-1, (-1, HEAD)).permute(1, 2, 0, 3)
    query, key, value = packed.split([3, 2, 2], dim=1)
    query, key = rotate(query[:, list(pairing.query_of)], table), rotate(key[:, list(pairing.key_of)], table)
    mixed = scaled_dot_product_attention(query, key, value[:, list(pairing.key_of)], is_causal=True)
    wanted = mixed.permute(2, 0, 1, 3).flatten(2) @ paired.out.weight.t()
    torch.testing.assert_close(paired(x, table), wanted)


@pytest.mark.parametrize("name", ["gqkva-2.3", "gqkva-3.2", "gkva-2", "gqa-3", "mqa", "0:1 2:0 1:1 0:0"])
@pytest.mark.parametrize("parts", [2, 3, 6])
def test_shares_add_up_to_the_layer(name: str, parts: int) -> None:
    heads = len(name.split()) if ":" in name else 6
    if heads % parts:
        pytest.skip("no equal shares")
    paired, x = layer(name, heads, qkv_bias=True).double(), draw().double()
    table, total = TABLE.double(), torch.zeros_like(x)
    with torch.no_grad():
        wanted = paired(x, table)
        columns = paired.out.weight.chunk(parts, dim=1)
        for part in range(parts):
            share = paired.qkv.share(part, parts)
            rows = [paired.qkv.get_parameter(name)[start:stop] for name, start, stop in share.rows]
            biases = [paired.qkv.get_parameter(name.replace("weight", "bias"))[start:stop]
                      for name, start, stop in share.rows]  # fmt: skip
            piece = Attention(HIDDEN, heads // parts, 1, HEAD)
            piece.group = paired.group
            linear = torch.nn.Linear(HIDDEN, sum(map(len, rows))).double()
            linear.weight.copy_(torch.cat(rows))
            linear.bias.copy_(torch.cat(biases))
            linear.pairing, linear.by_unit = share.pairing, share.by_unit
            piece.qkv = linear
            piece.out.weight = torch.nn.Parameter(columns[part])
            total += piece(x, table)
    torch.testing.assert_close(total, wanted)


@pytest.mark.parametrize("name", ["gqkva-2.3", "mkva"])
def test_a_sequence_in_pieces_is_the_sequence_and_caches_no_head_twice(name: str) -> None:
    paired, x, table = layer(name).double(), draw().double(), TABLE.double()
    outputs, past, done = [], None, 0
    for piece in (3, 1, 3):
        positions = slice(done, done + piece)
        output, past = paired.extend(x[positions], table[:, positions], past)
        outputs.append(output)
        done += piece
    assert past.key.shape == past.value.shape == (2, paired.pairing.n_kv, 7, HEAD)
    torch.testing.assert_close(torch.cat(outputs), paired(x, table))


def test_a_decoder_generates_with_its_cache_what_it_says_without() -> None:
    model = Decoder(CONFIG, torch.Generator().manual_seed(0))
    wanted = [3, 1, 4]
    for _ in range(5):
        wanted.append(int(model(torch.tensor(wanted).unsqueeze(1))[-1, 0].argmax()))
    assert generate(model, [3, 1, 4], 5, context=20, temperature=0, seed=0) == wanted[3:]


def test_parameters_and_flops_are_those_of_the_heads_there_are() -> None:
    full, paired = Decoder(replace(CONFIG, pairing=None, kv_heads=6)), Decoder(CONFIG)
    fewer = CONFIG.layers * CONFIG.hidden * 8 * (3 * 6 - 2 - 2 * 3)
    assert full.parameter_count() - paired.parameter_count() == fewer
    assert full.flops_per_token(100) - paired.flops_per_token(100) == 6 * fewer


def test_biases_start_at_zero() -> None:
    model = Decoder(replace(CONFIG, qkv_bias=True))
    biases = [parameter for name, parameter in model.named_parameters() if "bias" in name]
    assert len(biases) == 3 * CONFIG.layers
    assert not any(bias.any() for bias in biases)
