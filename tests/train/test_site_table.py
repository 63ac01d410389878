import io
import json
from dataclasses import replace
from pathlib import Path

from flashtrain.parallel.sites import Site
from flashtrain.train.site_table import SiteTable, merged
from tests.train.records import run_view

SITE = Site("layers.0.mlp.down", "[8, 4] x [4, 2]", "forward", "backward", True, "2 chunks")
SITES = [
    Site("embedding", "", "reduce-scatter", "all-gather", False, "a look-up"),
    *(replace(SITE, name=f"layers.{layer}.mlp.{name}") for layer in range(12) for name in ("up", "down")),
    replace(SITE, name="layers.5.extra"),
    *(replace(SITE, name=f"layers.{layer} (data)", overlapped=False) for layer in (0, 1, 3)),
]


def test_layers_that_agree_share_a_line() -> None:
    assert [site.name for site in merged(SITES)] == [
        "embedding",
        "layers.0-11.mlp.up",
        "layers.0-11.mlp.down",
        "layers.5.extra",
        "layers.0-1,3 (data)",
    ]
    odd = [replace(site, why="3 chunks") if site.name == "layers.4.mlp.up" else site for site in SITES]
    names = [site.name for site in merged(odd)]
    assert "layers.0-3,5-11.mlp.up" in names
    assert "layers.4.mlp.up" in names


def test_the_table_is_printed_and_every_site_kept(tmp_path: Path) -> None:
    out = io.StringIO()
    SiteTable(SITES, out).on_start(run_view(tmp_path / "run"))
    text = out.getvalue()
    assert "25 of 29 sites are overlapped" in text
    assert "\x1b" not in text
    for word in ("layers.0-11.mlp.down", "2 chunks", "a look-up", "yes", "no"):
        assert word in text
    kept = json.loads((tmp_path / "run" / "sites.json").read_text())
    assert [Site(**site) for site in kept] == SITES


def test_one_rank_has_nothing_to_overlap(tmp_path: Path) -> None:
    out = io.StringIO()
    SiteTable([], out).on_start(run_view(tmp_path))
    assert out.getvalue() == "one rank: there is no communication to overlap\n"
    assert json.loads((tmp_path / "sites.json").read_text()) == []
