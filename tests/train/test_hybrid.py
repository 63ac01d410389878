"""Runs of hybrids: resumed ones are unbroken ones to the bit, also on other meshes; recipes hold together."""

from pathlib import Path
from typing import Any

import pytest

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


def config(text: Path, degrees: Degrees, layout: Any) -> Trainer.Config:
    return Trainer.Config(
        model=Decoder.Config(hidden=64, layers=2, heads=8, kv_heads=4, mlp_width=256, layout=layout),
        data=Corpus.Config(source=str(text)),
        train=Training(steps=20, batch=4, sequence=32, evaluation_windows=8),
        parallel=degrees,
        comm=transport.Settings(timeout=60),
    )


@pytest.mark.parametrize("layout", [FLOWHN, Pattern.Config(pattern="M*", ssm=SHARED)])
def test_a_resumed_run_is_the_unbroken_one_also_on_other_meshes(layout: Any, tmp_path: Path) -> None:
    text, both = write_text(tmp_path / "text.txt"), Degrees(tensor=2)
    unbroken = run_distributed(_move, 2, config(text, both, layout), str(tmp_path / "whole"), 4)
    broken = str(tmp_path / "broken")
    run_distributed(_move, 2, config(text, both, layout), broken, 2)
    assert run_distributed(_move, 2, config(text, both, layout), broken, 2) == unbroken
    for degrees in (Degrees(), Degrees(data=2), both):
        moved = run_distributed(_move, degrees.world, config(text, degrees, layout), broken, 0)
        assert moved == [unbroken[0]] * degrees.world, degrees


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
