"""``flashtrain report``: the page, taken apart; in headless Chromium where there is one."""

import math
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from flashtrain.launch.main import main
from tests.launch.pages import Page, folder, loss_at, with_gpus

CHARTS = ["loss", "throughput", "mfu", "overlap", "step", "memory", "tflops", "gradient", "rate", "events"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return with_gpus(folder(tmp_path_factory.mktemp("runs") / "first"))


@pytest.fixture(scope="module")
def html(run: Path) -> str:
    assert main(["report", str(run)]) == 0
    return (run / "report.html").read_text()


@pytest.fixture(scope="module")
def page(html: str) -> Page:
    return Page(html)


def test_the_page_refers_to_nothing_outside(html: str, page: Page) -> None:
    for tag, attributes, _ in page.elements:
        assert tag not in ("link", "img", "iframe", "object", "embed", "base", "image", "use", "form")
        for name, value in attributes.items():
            assert name not in ("src", "srcset", "data", "action", "background", "poster", "style") or (
                name == "style" and "url" not in str(value)
            )
            assert not name.startswith("on")
            if name.endswith("href"):
                assert str(value).startswith("#"), (tag, value)
    styles = "".join(text for _, text in page.all("style"))
    assert styles
    assert not re.search(r"url\s*\(|@import|https?:|//", styles)
    scripts = [text for attributes, text in page.all("script") if "type" not in attributes]
    assert len(scripts) == 1
    assert not re.search(r"fetch|XMLHttp|WebSocket|import\s*\(|https?:|sendBeacon", scripts[0])
    ((policy, _),) = page.all("meta", **{"http-equiv": "Content-Security-Policy"})
    assert "default-src 'none'" in str(policy["content"])
    anchors = {str(attributes["href"])[1:] for attributes, _ in page.all("a")}
    assert anchors <= {str(attributes.get("id")) for _, attributes, _ in page.elements}


def test_every_plot_is_there(page: Page) -> None:
    assert set(page.charts()) == {*CHARTS, "power", "clock", "heat", "nvlink"}
    for key in CHARTS:
        assert page.places(key), key
    assert page.all("p", **{"class": "empty"}) == []
    described = [str(attributes["aria-label"]) for attributes, _ in page.all("svg", role="img")]
    assert described[0] == (
        "Loss, nats per token: training from 3.500 at step 1 to 1.600 at step 20; "
        "held out from 1.950 at step 10 to 1.850 at step 20"
    )


def test_the_script_gets_the_numbers_of_the_run(page: Page) -> None:
    data = page.data
    assert (data["first"], data["last"]) == (1, 20)
    training, held_out = data["charts"]["loss"]
    assert training["points"] == [[step, pytest.approx(loss_at(step), rel=1e-5)] for step in range(1, 21)]
    assert held_out["points"] == [[10, 1.95], [20, 1.85]]
    assert data["charts"]["mfu"][0]["points"][0] == [1, 40.0]
    assert data["charts"]["memory"][0]["points"][19] == [20, 5.0]
    assert data["charts"]["throughput"][0]["points"][4] == [5, 1005.0]
    assert data["charts"]["gradient"][0]["points"][14] == [15, None]
    # 10⁹ + 1000 bytes a step of 10 s
    assert data["charts"]["nvlink"][0]["points"][0] == [10, pytest.approx(0.1, rel=1e-5)]


def test_the_drawing_is_to_scale(page: Page) -> None:
    for key, index, value_at in (
        ("memory", 0, lambda step: step / 4),
        ("throughput", 0, None),
        ("overlap", 0, lambda step: 80.0),
        ("loss", 1, lambda step: loss_at(step) + 0.25),
    ):
        chart = page.charts()[key]
        low, high = float(str(chart["data-low"])), float(str(chart["data-high"]))
        places = page.places(key)[index]
        steps = [1 + x / 1000 * 19 for x, _ in places]
        values = [low + (1000 - y) / 1000 * (high - low) for _, y in places]
        np.testing.assert_allclose(steps, [10, 20] if key == "loss" else range(1, 21), atol=0.01)
        if value_at is not None:
            wanted = [value_at(round(step)) for step in steps]
            np.testing.assert_allclose(values, wanted, atol=0.001 * (high - low))
    gradient = page.charts()["gradient"]
    assert float(str(gradient["data-low"])) == 0.0
    assert float(str(gradient["data-high"])) < math.inf


def test_figures_are_right(page: Page) -> None:
    names = [text for _, text in page.all("dt")]
    values = [text for attributes, text in page.all("dd") if "class" not in attributes]
    assert dict(zip(names, values, strict=True)) == {
        "Held-out loss": "1.850",
        "Training loss": "1.600",
        "Steps": "20",
        "Tokens": "2.00 k",
        "Throughput": "1.01 k",
        "MFU": "40.0",
        "Communication hidden": "80.0",
        "Peak memory": "5.00",
        "Time in steps": "0:00:10",
        "Attempts": "2",
    }


def test_events_are_in_lanes_marks_and_the_table(page: Page) -> None:
    lanes = [
        text for attributes, text in page.all("div", **{"class": "lane"}) if "axis" not in str(attributes)
    ]
    assert lanes == ["start 1", "skipped step 2", "resume 1", "end 1"]
    marks = [text for _, text in page.all("path", **{"class": "mark"})]
    assert marks[:3] == [
        "step 10: skipped_step reason: before the kill",
        "step 9: resume ranks: 2",
        "step 15: skipped_step reason: </script><script>alert(1)</script>",
    ]
    rows = [text for _, text in page.all("tr")]
    assert any("1970-01-01 00:16:40 UTC 1 start ranks: 2" in row for row in rows)
    ((_, again),) = page.all("tr", **{"class": "again"})
    assert "10 skipped step reason: before the kill (done again after a resume)" in again
    ((_, state),) = page.all("span", **{"class": "state"})
    assert state == "finished at step 20"


def test_tables_say_what_the_run_was(page: Page, run: Path) -> None:
    (pre,) = [text for _, text in page.all("pre")]
    assert 'source = "<b>first</b>"' in pre
    rows = [text for _, text in page.all("tr")]
    assert "memory 8.0 GiB" in rows
    assert "gpus none" in rows
    assert "cuda n/a" in rows
    assert any(row.startswith("layers.0.mlp.down yes 2 chunks") for row in rows)
    assert "rank 1 4 601 700 power cap 50% 0 15 0" in rows
    assert "rank 0 4 600 700 never 0 15 0" in rows
    assert any(f"{run}: 20 steps read" in text for _, text in page.all("p"))


def test_other_peoples_text_is_no_markup(html: str, page: Page) -> None:
    assert "<b>first</b>" not in html
    assert "<script>alert" not in html
    assert len(page.all("script")) == 2


def test_several_runs_are_laid_over_each_other(run: Path, tmp_path: Path) -> None:
    other = folder(tmp_path / "second", steps=10, mfu=None, faster=2.0)
    out = tmp_path / "both.html"
    assert main(["report", str(run), str(other), "--out", str(out)]) == 0
    page = Page(out.read_text())
    assert [text for _, text in page.all("h1")] == ["first", "second"]
    series = {key: [one["name"] for one in chart] for key, chart in page.data["charts"].items()}
    assert series["throughput"] == ["first", "second"]
    assert series["loss"] == ["first", "second", "first, held out", "second, held out"]
    assert series["mfu"] == ["first"]
    assert page.data["charts"]["throughput"][1]["points"][9] == [10, 2010.0]
    rows = [text for _, text in page.all("tr")]
    assert "train.steps 20 10" in rows
    assert any(row.startswith("second 1.950 1.700 10 1.00 k 2.01 k n/a 80.0") for row in rows)
    assert page.all("path", **{"class": "mark"}) == []
    lanes = [
        text for attributes, text in page.all("div", **{"class": "lane"}) if "axis" not in str(attributes)
    ]
    assert "second: end 1" in lanes


def test_runs_of_one_name_are_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a/run", "b/run"):
        folder(tmp_path / name, steps=3)
    assert main(["report", "a/run", "b/run"]) == 0
    page = Page((tmp_path / "report.html").read_text())
    assert [text for _, text in page.all("h1")] == ["a/run", "b/run"]


def test_a_killed_runs_torn_line_is_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = folder(tmp_path / "run", steps=5)
    (out / "events.jsonl").write_text('{"event": "start", "step": 1, "time": 1}\n')
    with (out / "metrics.jsonl").open("a") as file:
        file.write('\n{"step": 6, "lo')
    assert main(["report", str(out)]) == 0
    assert f"{out / 'metrics.jsonl'}: 2 damaged, left out" in capsys.readouterr().out
    page = Page((out / "report.html").read_text())
    ((_, state),) = page.all("span", **{"class": "state"})
    assert state == "at step 5: running, or killed"
    assert any("2 damaged in metrics.jsonl, left out" in text for _, text in page.all("p"))


def test_a_run_without_a_step_still_has_a_page(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text("")
    assert main(["report", str(tmp_path)]) == 0
    page = Page((tmp_path / "report.html").read_text())
    empty = [text for _, text in page.all("p", **{"class": "empty"})]
    assert "no step was recorded" in empty
    assert "no event was recorded" in empty
    assert "the run did not say where it computed" in empty
    assert all(chart == [] for chart in page.data["charts"].values())


def test_a_long_run_is_thinned_but_keeps_its_extremes(tmp_path: Path) -> None:
    lines = []
    for step in range(1, 50_001):
        loss: object = {31_000: 99.0, 42_000: "nan"}.get(step, 2.0 + 1 / step)
        lines.append(f'{{"step": {step}, "loss": {loss if loss != "nan" else chr(34) + "nan" + chr(34)}}}')
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    assert main(["report", str(tmp_path)]) == 0
    html = (tmp_path / "report.html").read_text()
    page = Page(html)
    assert len(html) < 400_000
    points = page.data["charts"]["loss"][0]["points"]
    assert len(points) < 1500
    assert [31_000, 99.0] in points
    assert [42_000, None] in points
    assert points[0] == [1, 3.0]
    assert points[-1][0] == 50_000
    notes = [text for _, text in page.all("p", **{"class": "note"})]
    assert "1 value not finite: a gap in the line." in notes


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["nowhere"], "there is no run in nowhere: it holds no metrics.jsonl; give the --out of a run"),
        (
            ["run", "--out", "no/such/page.html"],
            "no/such/page.html cannot be written: No such file or directory",
        ),
        (["run", "--out", "run"], "--out run is a folder; give the name of a file in it"),
        (["run", "run"], "run is given twice; name each run once"),
        ([], "the following arguments are required: RUN"),
    ],
)
def test_bad_input_is_one_line(
    words: list[str],
    line: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    folder(tmp_path / "run", steps=2)
    before = sorted(path.name for path in tmp_path.rglob("*"))
    assert main(["report", *words]) == 2
    error = capsys.readouterr().err
    assert line in error
    assert error.count("\n") == 1
    assert sorted(path.name for path in tmp_path.rglob("*")) == before


CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
POINT = """<script>addEventListener("load", () => {
  const box = document.querySelector("#chart-loss .plot"), where = box.getBoundingClientRect();
  box.dispatchEvent(new PointerEvent("pointermove", {clientX: where.left + where.width * 9 / 19}));
});</script></body>"""


def browse(*options: str) -> subprocess.CompletedProcess[str]:
    assert CHROMIUM is not None
    fixed = [
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--enable-logging=stderr",
        "--hide-scrollbars",
    ]
    return subprocess.run(
        [CHROMIUM, *fixed, *options], capture_output=True, text=True, timeout=60, check=True
    )


@pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium: apt-get install chromium")
def test_in_chromium_the_page_draws_in_both_schemes_and_answers_the_pointer(
    html: str, tmp_path: Path
) -> None:
    from matplotlib.image import imread

    (tmp_path / "page.html").write_text(html.replace("</body>", POINT))
    address = f"file://{tmp_path / 'page.html'}"
    brightness = {}
    for scheme, number in (("light", 1), ("dark", 0)):
        shot = tmp_path / f"{scheme}.png"
        done = browse(
            f"--user-data-dir={tmp_path / 'profile'}",
            f"--blink-settings=preferredColorScheme={number}",
            "--window-size=1000,1400",
            f"--screenshot={shot}",
            address,
        )
        assert "CONSOLE" not in done.stderr, done.stderr
        picture = imread(shot)[..., :3]
        assert picture.std() > 0.03
        brightness[scheme] = picture.mean()
    assert brightness["light"] > 0.85
    assert brightness["dark"] < 0.25
    done = browse(f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", address)
    answered = Page(done.stdout)
    outputs = [text for _, text in answered.all("output")]
    assert outputs[0] == "1.7"  # the loss of step 10
    cursors = [attributes for attributes, _ in answered.all("div", **{"class": "cursor"})]
    assert cursors
    assert all("hidden" not in attributes for attributes in cursors)
