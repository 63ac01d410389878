"""``flashtrain bench mfu``: measured on two CPU ranks, written, printed; what it refuses."""

import importlib.util
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from matplotlib import image

from flashtrain.launch import main, mfu, ranks, titan
from flashtrain.metrics.step_time import KINDS
from flashtrain.recipes import RECIPES

SMALL = ["--model.layers", "2", "--model.hidden", "64", "--model.heads", "4", "--model.kv_heads", "2"]
SMALL += ["--model.mlp_width", "128", "--train.batch", "4", "--train.sequence", "32"]
SMALL += ["--data.source", "/no/such/text", "--comm.timeout", "60"]  # no data is read


@pytest.fixture(autouse=True)
def _no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)


def test_two_ranks_are_measured_and_all_is_written(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    words = ["bench", "mfu", "demo", "--steps=3", "--warmup=1", "--policies", f"--out={tmp_path}"]
    words += [*SMALL, "--train.document_mask", "true", "--parallel.tensor", "2"]
    assert main.main(words) == 0
    shown = capfd.readouterr().out
    assert "demo: tensor parallel over 2 ranks by host" in shown
    assert "MFU           n/a: the peak of this device is not known" in shown
    report = json.loads((tmp_path / "mfu.json").read_text())
    one = report["systems"]["flashtrain"]
    assert len(one["step_s"]) == 3
    assert one["skipped"] == 0
    assert 0 <= one["hidden"] <= 1
    assert list(one["kinds_s"]) == list(KINDS)
    assert one["kinds_s"]["matrix products"] > 0
    # 128 tokens a step; 6 N + 6 L s d with this model's N.
    weights = 256 * 64 + 2 * (64 * 64 * 3 + 3 * 64 * 128 + 2 * 64) + 64
    assert one["weights"] == weights
    assert one["attention_flops"] == 6 * 2 * 32 * 64
    assert one["tokens_per_s_per_rank"] == pytest.approx(128 / one["median_s"] / 2)
    rate = one["tokens_per_s_per_rank"] * (6 * weights + one["attention_flops"]) / 1e12
    assert one["tflops_per_s_per_rank"] == pytest.approx(rate)
    assert list(report["recompute"]) == ["full", "attention", "pointwise", "none"]
    assert image.imread(tmp_path / "step.png").shape[1] > 1000


def measured(rank: int) -> dict[str, Any]:
    """What a GPU rank might have measured."""
    sample = SimpleNamespace(
        power_w=600.0 + 20 * rank, power_limit_w=700.0, sm_clock_mhz=1700, throttled=("power cap",)
    )
    timed = SimpleNamespace(
        seconds=[1.0 + rank, 2.0],
        peak_bytes=3 << 30,
        held_bytes=1 << 30,
        allocations=rank,
        retries=0,
        gpu=[sample],
    )
    kinds = dict.fromkeys(KINDS, 0.1) | {"exposed communication": 0.2}
    account = SimpleNamespace(_asdict=lambda: {"seconds": 0.8, "kinds": kinds, "moving": 0.8})
    return json.loads(json.dumps(mfu.of_rank(timed, account)))


def test_ranks_become_one_record_and_lines_with_the_formula() -> None:
    figures = mfu.across_ranks([measured(0), measured(1)])
    assert figures["step_s"] == [2.0, 2.0]
    assert figures["power_w"] == 610.0
    assert figures["allocations"] == 1
    assert figures["hidden"] == pytest.approx(0.75)
    model = mfu.Model(1_000_000, 7e6, 1e9)
    rated = mfu.rated(mfu.merged([figures, figures]), model, tokens=400, ranks=2)
    assert len(rated["step_s"]) == 4
    assert rated["mfu"] == pytest.approx(100 * 7e6 / 1e9)
    slower = rated | {"median_s": 3.0}
    lines = mfu.lines({"systems": {"flashtrain": rated, "torchtitan": slower}})
    text = "\n".join(lines)
    assert "70.0% = (6 x 1,000,000 + 1,000,000 of attention) FLOPs x 100 tokens/s / 0.0 TFLOP/s" in text
    assert "75.0% hidden, 200.0 ms a step exposed" in text
    assert "after the warm-up 1 cudaMalloc, 0 retries" in text
    assert "610 W of 700 W, 1700 MHz, throttled: power cap" in text
    assert "flashtrain is 1.500 times as fast as torchtitan" in text


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["demoo"], "unknown recipe demoo; the nearest is demo"),
        (["demo", "--steps", "0"], "--steps is 0; it must be at least 1"),
        (["demo", "--out", __file__], f"{__file__}: File exists: choose another path"),
        (["demo", "--against", "megatron"], "invalid choice: 'megatron'"),
        (["demo", "--model.layer", "2"], "unknown key --model.layer; the nearest is --model.layers"),
        (["llama-8b", "--parallel.tensor", "3"], "parallel.tensor 3 must divide it"),
    ],
)
def test_wrong_words_are_one_line_before_any_rank_starts(
    words: list[str], line: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ranks, "launch", lambda *_: pytest.fail("ranks were started"))
    assert main.main(["bench", "mfu", *words]) == 2
    err = capsys.readouterr().err
    assert line in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("settings", "installed", "gpus", "line"),
    [
        ([], False, True, "torchtitan: it is not installed; pip install torchtitan==0.2.2"),
        ([], True, False, "it needs GPUs, and there are none here"),
        (["--model.tied_embeddings", "true"], True, True, "its Llama has no model.tied_embeddings"),
        (["--model.pairing", "MQA"], True, True, "its Llama has no model.pairing"),
        (["--train.dtype", "float32"], True, True, "it computes in bf16"),
        (["--train.document_mask", "true"], True, True, "its batches are not cut"),
        (["--parallel.context", "2"], True, True, "set parallel.context 1"),
    ],
)
def test_a_peer_that_cannot_run_is_one_line(
    settings: list[str],
    installed: bool,
    gpus: bool,
    line: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = importlib.util.find_spec("json") if installed else None
    monkeypatch.setattr(titan.importlib.util, "find_spec", lambda name: found)  # type: ignore[attr-defined]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus)
    monkeypatch.setattr(ranks, "launch", lambda *_: pytest.fail("ranks were started"))
    assert main.main(["bench", "mfu", "llama-8b", "--against", "torchtitan", *settings]) == 2
    assert line in capsys.readouterr().err


@pytest.mark.parametrize(
    ("recipe", "parameters"),
    [("llama-1b", 1_235_814_400), ("llama-8b", 8_030_261_248), ("llama-70b", 70_553_706_496)],
)
def test_llamas_have_the_parameters_of_their_namesakes(recipe: str, parameters: int) -> None:
    from flashtrain.models.decoder import Decoder

    config = RECIPES[recipe]()
    config.validate(data=False)
    with torch.device("meta"):
        assert Decoder(config.model).parameter_count() == parameters
    four = RECIPES["llama-70b-4layers"]()
    four.validate(data=False)
    assert (four.model.hidden, four.model.layers) == (8192, 4)
