"""The vision transformer: the sizes of the paper to the unit, attention over all tokens, tied heads."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from flashtrain.errors import UserError
from flashtrain.models.vit import VisionTransformer

TINY = VisionTransformer.Config(
    image=8, patch=4, classes=5, hidden=24, layers=2, heads=6, mlp_width=32, pairing="gqkva-2.3"
)


def model(config: VisionTransformer.Config = TINY) -> VisionTransformer:
    return VisionTransformer(config, torch.Generator().manual_seed(0))


def images(count: int = 3) -> Tensor:
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("pairing", "parameters", "gigaflops"),
    [
        ("mha", 22_050_664, 9.20),
        ("gkva-3", 21_163_624, 8.85),
        ("gkva-2", 20_867_944, 8.73),
        ("mkva", 20_572_264, 8.62),
        ("gqa-3", 20_276_584, 8.50),
        ("gqa-2", 19_685_224, 8.27),
        ("mqa", 19_093_864, 8.04),
        ("gqkva-2.3", 19_093_864, 8.04),
        ("gqkva-3.2", 18_798_184, 7.92),
    ],
)
def test_sizes_of_the_paper_to_the_unit(pairing: str, parameters: int, gigaflops: float) -> None:
    with torch.device("meta"):
        built = VisionTransformer(VisionTransformer.Config(pairing=pairing))
    assert built.parameter_count() == parameters
    assert built.flops_per_image() / 3e9 == pytest.approx(gigaflops, abs=0.005)


def test_every_patch_matters_and_every_image_is_its_own() -> None:
    built, given = model().double(), images().double()
    with torch.no_grad():
        before = built(given)
        assert before.shape == (3, 5)
        torch.testing.assert_close(built(given[1:2]), before[1:2])
        for row, column in ((0, 0), (3, 4), (7, 7)):
            changed = given.clone()
            changed[1, 2, row, column] += 1
            moved = (built(changed) != before).any(dim=-1)
            assert moved.tolist() == [False, True, False]


def test_patches_are_those_of_a_convolution() -> None:
    built, given = model(replace(TINY, layers=1)), images()
    weight = built.embedding.weight.unflatten(1, (3, 4, 4))
    wanted = (
        torch.nn.functional.conv2d(given, weight, built.embedding.bias, stride=4).flatten(2).permute(2, 0, 1)
    )
    seen = []
    built.embedding.register_forward_hook(lambda module, inputs, output: seen.append(output))
    built(given)
    torch.testing.assert_close(seen[0], wanted)


def test_pairs_equal_tied_heads_of_multi_head_attention() -> None:
    paired, full = model(), model(replace(TINY, pairing="mha"))
    full.load_state_dict({n: p for n, p in paired.state_dict().items() if ".qkv." not in n}, strict=False)
    with torch.no_grad():
        for one, other in zip(paired.layers, full.layers, strict=True):
            pairing = one.qkv.pairing
            sides = (("query", pairing.query_of), ("key", pairing.key_of), ("value", pairing.key_of))
            for name, heads in sides:
                for kind in ("weight", "bias"):
                    source = one.qkv.get_parameter(f"{name}_{kind}").unflatten(0, (-1, 4))
                    other.qkv.get_parameter(f"{name}_{kind}").copy_(source[list(heads)].flatten(0, 1))
        assert torch.equal(paired(images()), full(images()))


def test_it_learns() -> None:
    built, given, targets = model(), images(5), torch.arange(5)
    optimizer = torch.optim.AdamW(built.parameters(), lr=1e-2)
    losses = []
    for _ in range(30):
        loss = built(given, targets)
        losses.append(float(loss.detach()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[0] == pytest.approx(1.6, abs=0.3)
    assert losses[-1] < 0.1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layers": 0}, "model.layers is 0; it must be above 0"),
        ({"patch": 3}, "model.image is 8; model.patch 3 must divide it"),
        ({"heads": 5}, "model.hidden is 24; model.heads 5 must divide it"),
        ({"pairing": "gqkva-2.2"}, "pairing gqkva-2.2: 2 x 2 pairs are not the 6 heads"),
    ],
)
def test_sizes_that_do_not_fit_are_named(change: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=f"^{message}$"):
        replace(TINY, **change).validate()  # type: ignore[arg-type]
