"""Runs of hybrids: resumed ones are unbroken ones to the bit, also on other meshes; recipes hold together."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from flashtrain.comm import transport
from flashtrain.data import Corpus
from flashtrain.models.decoder import Decoder
from flashtrain.nn.flowhn import FlowHN
from flashtrain.nn.hybrid import Pattern
from flashtrain.nn.ssm import Mamba2
from flashtrain.parallel.mesh import Degrees
from flashtrain.train.settings import Training
from flashtrain.train.trainer import Trainer
from tests.distributed import run_distributed
from tests.train.runs import train, write_text
from tests.train.test_resume import _move

SHARED = Mamba2.Config(head_dim=16, states=8, norm_groups=2)
FLOWHN = FlowHN.Config(ssm=SHARED, align=8, f=0.5)
PATTERN = Pattern.Config(pattern="M*", ssm=SHARED)


def config(text: Path, degrees: Degrees, layout: Any) -> Trainer.Config:
    return Trainer.Config(
        model=Decoder.Config(hidden=64, layers=2, heads=8, kv_heads=4, mlp_width=256, layout=layout),
        data=Corpus.Config(source=str(text)),
        train=Training(steps=20, batch=4, sequence=32, evaluation_windows=8),
        parallel=degrees,
        comm=transport.Settings(timeout=60),
    )


@pytest.mark.parametrize(
    ("layout", "both"),
    [(FLOWHN, Degrees(tensor=2)), (PATTERN, Degrees(tensor=2)), (PATTERN, Degrees(context=2))],
)
def test_a_resumed_run_is_the_unbroken_one_also_on_other_meshes(
    layout: Any, both: Degrees, tmp_path: Path
) -> None:
    text = write_text(tmp_path / "text.txt")
    unbroken = run_distributed(_move, 2, config(text, both, layout), str(tmp_path / "whole"), 4)
    broken = str(tmp_path / "broken")
    run_distributed(_move, 2, config(text, both, layout), broken, 2)
    assert run_distributed(_move, 2, config(text, both, layout), broken, 2) == unbroken
    others = (Degrees(tensor=2), Degrees(context=2, data=2)) if both.context > 1 else ()
    for degrees in (Degrees(), Degrees(data=2), *others, both):
        moved = run_distributed(_move, degrees.world, config(text, degrees, layout), broken, 0)
        assert moved == [unbroken[0]] * degrees.world, degrees


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_run_by_branches_is_that_of_one_rank_and_goes_on_anywhere(dtype: str, tmp_path: Path) -> None:
    text, both = write_text(tmp_path / "text.txt"), Degrees(branches=2)

    def of(degrees: Degrees) -> Trainer.Config:
        found = config(text, degrees, FLOWHN)
        return replace(found, train=replace(found.train, dtype=dtype))

    (one,) = run_distributed(_move, 1, of(Degrees()), str(tmp_path / "one"), 4)
    unbroken = run_distributed(_move, 2, of(both), str(tmp_path / "whole"), 4)
    whole = unbroken[0] | unbroken[1]
    common = unbroken[0].keys() & unbroken[1].keys()
    assert whole.keys() == one.keys()
    assert all(unbroken[0][name] == unbroken[1][name] for name in common)
    assert {name for name in whole if ".ssm_branch." in name} == unbroken[0].keys() - common
    kept, close = ("", 1e-4) if dtype == "float32" else (".master", 5e-2)
    for name in one:
        if name.endswith(kept) and not name.endswith((".exp_avg", ".exp_avg_sq")):
            first, second = (
                torch.frombuffer(bytearray(run[name]), dtype=torch.float32) for run in (whole, one)
            )
            assert float((first - second).norm()) <= close * float(second.norm()), name
    broken = str(tmp_path / "broken")
    run_distributed(_move, 2, of(both), broken, 2)
    assert run_distributed(_move, 2, of(both), broken, 2) == unbroken
    others = (Degrees(data=2), Degrees(tensor=2), Degrees(branches=2, data=2)) if dtype == "float32" else ()
    for degrees in (Degrees(), *others, both):
        moved = run_distributed(_move, degrees.world, of(degrees), broken, 0)
        for rank, found in enumerate(moved):
            assert found == (unbroken[rank % 2] if degrees.branches == 2 else whole), degrees


def test_a_run_by_branches_trains_and_what_has_none_is_refused(tmp_path: Path) -> None:
    text = write_text(tmp_path / "text.txt")
    layout = {"model__layout__class": "FlowHN.Config", "model__layout__align": 8}
    degrees = {"parallel__tensor": 1, "parallel__branches": 2}
    ended = train(tmp_path / "run", text, train__steps=2, **degrees, **layout)
    assert ended.returncode == 0, ended.stderr
    assert "branch parallel over 2 ranks by" in ended.stdout
    assert "held-out loss" in ended.stdout
    for settings, message in (
        (
            degrees,
            "parallel.branches is 2, but blocks of model.layout None have no attention and SSM side by side: "
            "choose FlowHN.Config or ParallelHeads.Config",
        ),
        (
            degrees | layout | {"parallel__tensor": 2},
            "parallel.branches is 2 and parallel.tensor 2: set one of them to 1",
        ),
    ):
        refused = train(tmp_path / "wrong", text, train__steps=2, **settings)
        assert refused.returncode == 2
        lines = [line for line in refused.stderr.splitlines() if line.startswith("flashtrain: error:")]
        assert set(lines) == {f"flashtrain: error: {message}"}


def test_a_run_whose_model_cannot_decode_ends_well_and_says_why(tmp_path: Path) -> None:
    text = write_text(tmp_path / "text.txt")
    layout = {"model__layout__class": "FlowHN.Config", "model__layout__align": 8}
    ended = train(tmp_path / "run", text, train__steps=2, parallel__tensor=1, **layout)
    assert ended.returncode == 0, ended.stderr
    assert "set model.layout.length" in " ".join(ended.stdout.split())
    wrong = train(
        tmp_path / "wrong", text, train__steps=2, parallel__tensor=1, **layout | {"model__layout__align": 5}
    )
    assert wrong.returncode == 2
    lines = [line for line in wrong.stderr.splitlines() if line.startswith("flashtrain: error:")]
    assert lines == ["flashtrain: error: 32 tokens are no multiple of model.layout.align 5: choose another"]
