"""Each module counts its FLOPs; a plain decoder has those of PaLM's formula."""

from flashtrain.models.decoder import Decoder


def test_a_decoder_counts_what_the_formula_says() -> None:
    for tied in (False, True):
        config = Decoder.Config(hidden=64, layers=3, heads=8, kv_heads=2, mlp_width=128, tied_embeddings=tied)
        model = Decoder(config)
        weights = model.parameter_count(embedding=False)
        # 6 N + 12 L H Q T of arXiv 2204.02311, halved there: a causal query meets half of the keys.
        assert model.flops_per_token(100) == 6 * weights + 6 * 3 * 64 * 100
