"""Sites whose products are measured, listed once for all benchmarks."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from flashtrain.errors import UserError
from flashtrain.models.decoder import Decoder
from flashtrain.recipes import demo

# Llama-3 8B and 70B, a decoder of 1.1e9 parameters in their proportions, and one to see a benchmark run.
MODELS = {
    "8B": Decoder.Config(hidden=4096, layers=32, heads=32, kv_heads=8, mlp_width=14336, vocabulary=128256),
    "70B": Decoder.Config(hidden=8192, layers=80, heads=64, kv_heads=8, mlp_width=28672, vocabulary=128256),
    "1B": Decoder.Config(hidden=2048, layers=16, heads=32, kv_heads=8, mlp_width=8192, vocabulary=32768),
    "tiny": Decoder.Config(hidden=32, layers=2, heads=2, kv_heads=2, mlp_width=64, vocabulary=64),
}
SITES = ("qkv", "o", "gate_up", "down")


@dataclass(frozen=True)
class Site:
    """One product of a model, ``[rows, inputs] · [outputs, inputs]ᵀ``, in unsharded sizes.

    column: all-gather of the input, then the product; the outputs are sharded. row: the product, then
    reduce-scatter of the output; the inputs are sharded.
    """

    shape: str
    name: str
    style: Literal["column", "row"]
    rows: int
    inputs: int
    outputs: int

    def local(self, world: int) -> tuple[int, int, int]:
        """``(M, N, K)`` of the product that one of ``world`` ranks computes; UserError if none can."""
        for what, size in (("rows", self.rows), (self._sharded, getattr(self, self._sharded))):
            if size % world:
                raise UserError(f"{self.shape} {self.name}: {size} {what} do not divide by {world} ranks")
        if self.style == "column":
            return self.rows, self.outputs // world, self.inputs
        return self.rows, self.outputs, self.inputs // world

    @property
    def width(self) -> int:
        """Columns of what the ranks exchange: the gathered input or the scattered output."""
        return self.inputs if self.style == "column" else self.outputs

    @property
    def _sharded(self) -> str:
        return "outputs" if self.style == "column" else "inputs"


def sites_of(shape: str, model: Decoder.Config, rows: int, head: bool = False) -> list[Site]:
    """The overlapped products of a decoder that sees ``rows`` (sequence times batch) at once."""
    width, attention = model.hidden, model.heads * model.head_dim
    found = [
        Site(shape, "qkv", "column", rows, width, attention + 2 * model.kv_heads * model.head_dim),
        Site(shape, "o", "row", rows, attention, width),
        Site(shape, "gate_up", "column", rows, width, 2 * model.mlp_width),
        Site(shape, "down", "row", rows, model.mlp_width, width),
    ]
    return [*found, Site(shape, "head", "column", rows, width, model.vocabulary)] if head else found


def quick() -> list[Site]:
    """One tiny shape, a column and a row site: to see a benchmark run, not to learn a number."""
    return sites_of("tiny", MODELS["tiny"], rows=64)[:2]


def gpu(models: Sequence[str], names: Sequence[str], rows: Sequence[int]) -> list[Site]:
    """The sites ``names`` of the ``MODELS`` called ``models``, each at all ``rows``."""
    of_all_rows = [
        [site for count in rows for site in sites_of(model, MODELS[model], count)] for model in models
    ]
    return [site for sites in of_all_rows for name in names for site in sites if site.name == name]


def cpu() -> list[Site]:
    """The sites of the demo recipe, then those of larger Llama-like decoders (8/3 wide MLPs, heads of 64)."""
    recipe = demo()
    assert isinstance(recipe.model, Decoder.Config)
    found = sites_of("demo", recipe.model, recipe.train.batch * recipe.train.sequence, head=True)
    for hidden, rows in ((512, 1024), (512, 4096), (1024, 2048), (2048, 1024)):
        model = Decoder.Config(
            hidden=hidden,
            heads=hidden // 64,
            kv_heads=hidden // 256,
            mlp_width=-(-hidden * 8 // 3 // 256) * 256,
        )
        found += sites_of(f"{hidden}x{rows}", model, rows)
    return found
