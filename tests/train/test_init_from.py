"""Runs that start with given weights: from Hugging Face, through more pre-training, and back."""

import argparse
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from flashtrain.comm import transport
from flashtrain.data import Corpus
from flashtrain.errors import UserError
from flashtrain.launch import main
from flashtrain.launch.train import resolve
from flashtrain.models.decoder import Decoder
from flashtrain.nn.rotary import Llama3Scaling
from flashtrain.parallel.mesh import Degrees
from flashtrain.train import convert, snapshot
from flashtrain.train.settings import Training
from flashtrain.train.trainer import Trainer
from tests.distributed import run_distributed
from tests.models import tiny_hf
from tests.train.runs import flashtrain, metrics, write_text

CASE = "llama, tied and scaled"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a text, and one model as transformers saved it ("hf") and converted ("base")."""
    folder = tmp_path_factory.mktemp("init")
    write_text(folder / "text.txt")
    tiny_hf.save(CASE, folder / "hf")
    convert.from_hf(folder / "hf", folder / "base", file_bytes=100_000)
    return folder


def words(folder: Path, **settings: object) -> list[str]:
    """Settings of a tiny run; two underscores stand for a dot."""
    given = {
        "train__init_from": folder / "base",
        "train__dtype": "float32",
        "train__batch": 4,
        "train__sequence": 32,
        "train__evaluation_windows": 8,
        "data__source": folder / "text.txt",
        "comm__timeout": 60,
    } | settings
    return [word for key, value in given.items() for word in (f"--{key.replace('__', '.')}", str(value))]


def train(out: Path, folder: Path, **settings: object) -> subprocess.CompletedProcess[str]:
    """Run on two ranks."""
    given = words(folder, parallel__tensor=2, **settings)
    return flashtrain(["train", "continue-pretraining", "--out", str(out), *given], 2)


def test_continue_pretraining_on_two_ranks_and_export_to_transformers(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "base", tmp_path / "base")
    settings: dict[str, Any] = {
        "train__init_from": tmp_path / "base",
        "optimizer__learning_rate": 1e-3,
        "optimizer__warmup": 0,
    }
    out = tmp_path / "run"
    run = train(out, folder, train__steps=2, **settings)
    assert run.returncode == 0, run.stderr
    assert f"starting with the weights of {tmp_path / 'base'}" in run.stderr

    # Gone: the run has what it needs, and goes on from its own checkpoint.
    shutil.rmtree(tmp_path / "base")
    run = train(out, folder, train__steps=3, **settings)
    assert run.returncode == 0, run.stderr
    assert [m["step"] for m in metrics(out)] == [1, 2, 3]
    assert "resuming after step 2" in run.stderr

    assert main.main(["convert", "ft2hf", str(out), str(tmp_path / "export"), "--file-size", "100KB"]) == 0
    trained, _ = snapshot.load_model(snapshot.find(out))
    assert trained.config == snapshot.model_config(folder / "base")
    with torch.no_grad():
        wanted = trained(tiny_hf.tokens())
    found = tiny_hf.logits(tmp_path / "export", tiny_hf.tokens())
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)
    moved = (found - tiny_hf.logits(folder / "hf", tiny_hf.tokens())).abs().max()
    assert moved > 1e-2, "training changed nothing"
    assert (tmp_path / "export/config.json").read_bytes() == (folder / "hf/config.json").read_bytes()


def _config(folder: Path, dtype: str, degrees: Degrees) -> Trainer.Config:
    return Trainer.Config(
        model=snapshot.model_config(folder / "base"),
        data=Corpus.Config(source=str(folder / "text.txt")),
        train=Training(
            batch=4, sequence=32, evaluation_windows=8, dtype=dtype, init_from=folder / "base"  # type: ignore[arg-type]
        ),
        parallel=degrees,
        comm=transport.Settings(timeout=60),
    )  # fmt: skip


def _first_state(rank: int, world: int, configs: list[Trainer.Config], out: str) -> list[dict[str, Tensor]]:
    """Weights and optimizer state, whole, before the first step."""
    found = []
    for number, config in enumerate(configs):
        transport.configure(config.comm)
        trainer = Trainer(config, Path(out) / str(number))
        trainer._build(torch.device("cpu"))
        assert trainer._resume() == (1, {})
        state = dict(trainer.model.named_parameters()) | trainer.optimizer.state()
        found.append(
            {n: (t.full_tensor() if isinstance(t, DTensor) else t).detach() for n, t in state.items()}
        )
    return found


@pytest.mark.parametrize("degrees", [Degrees(tensor=2, data=2), Degrees(data=2)])
def test_a_run_starts_with_the_weights_on_any_mesh(degrees: Degrees, folder: Path, tmp_path: Path) -> None:
    configs = [_config(folder, dtype, degrees) for dtype in ("float32", "bfloat16")]
    stored = dict(snapshot.load_model(folder / "base")[0].named_parameters())
    wide, narrow = run_distributed(_first_state, degrees.world, configs, str(tmp_path))[0]
    for name, weight in stored.items():
        assert torch.equal(wide[name], weight), name
        assert torch.equal(narrow[name], weight.bfloat16()), name
        assert torch.equal(narrow[f"{name}.master"], weight.bfloat16().float()), name
        assert not wide[f"{name}.exp_avg"].any()
    assert (tmp_path / "0/hf/config.json").read_bytes() == (folder / "hf/config.json").read_bytes()


def resolved(folder: Path, out: Path, *more: str) -> Trainer.Config:
    given = [*words(folder), *more]
    return resolve(argparse.Namespace(recipe="continue-pretraining", config=None, out=out, settings=given))


def test_the_model_comes_from_the_weights_and_settings_change_it(folder: Path, tmp_path: Path) -> None:
    model = snapshot.model_config(folder / "base")
    assert model.rope_scaling == Llama3Scaling(original_max_position_embeddings=24)
    assert resolved(folder, tmp_path).model == model
    assert resolved(folder, tmp_path, "--model.rope_theta", "7").model == replace(model, rope_theta=7.0)
    assert resolved(folder, tmp_path, "--model.rope_scaling", "None").model.rope_scaling is None
    fresh = resolved(folder, tmp_path, "--train.init_from", "None", "--parallel.tensor", "1")
    assert fresh.model == Decoder.Config()
    with pytest.raises(UserError, match=r"there is no checkpoint in .*nowhere"):
        resolved(folder, tmp_path, "--train.init_from", str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match="base is a checkpoint itself: choose another --out"):
        resolved(folder, folder / "base")


def test_weights_of_another_shape_are_refused_in_one_line(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    settings = words(folder, parallel__tensor=1, model__hidden=128)
    assert main.main(["train", "continue-pretraining", "--out", str(tmp_path / "run"), *settings]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("flashtrain: error: ")]
    assert len(lines) == 1
    assert "is of another model: model/embedding.weight is float32 [256, 64] there" in lines[0]
    assert not (tmp_path / "run").exists()
