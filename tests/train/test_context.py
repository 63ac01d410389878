"""Runs whose ranks have a segment each of the same sequences: those of one rank, and what is refused."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from flashtrain.comm import transport
from flashtrain.errors import UserError
from flashtrain.nn.flowhn import FlowHN
from flashtrain.nn.mamba1 import Mamba1
from flashtrain.nn.ssm import Mamba2
from flashtrain.parallel.mesh import Degrees
from flashtrain.recipes import RECIPES
from flashtrain.train.faults import Fault
from flashtrain.train.settings import Training
from flashtrain.train.trainer import Trainer
from flashtrain.train.workbench import Workbench
from tests.distributed import run_distributed
from tests.train.runs import metrics, train, write_text
from tests.train.test_fault_plan import assert_same_end, plan
from tests.train.test_hybrid import PATTERN, config

STEPS = 5


def _run(rank: int, world: int, config: Trainer.Config) -> dict[str, Any]:
    """Losses and norms of a few steps, the held-out loss, and the tokens that this rank sees."""
    transport.configure(config.comm)
    trainer = Trainer(config, Path("unused"))
    trainer._build(torch.device("cpu"))
    steps, seen = [], []
    for step in range(1, STEPS + 1):
        batches = trainer.batches.of(step)
        result = trainer.step(step, 1e-3, batches)
        steps.append((result.loss, result.grad_norm))
        seen.append(torch.cat([torch.stack(batch) for batch in batches], dim=2).tolist())
    return {"steps": steps, "held out": trainer.batches.held_out_loss(trainer.model), "seen": seen}


def test_losses_are_those_of_one_rank_and_ranks_see_its_samples(tmp_path: Path) -> None:
    text = write_text(tmp_path / "text.txt")

    def of(degrees: Degrees, accumulate: int = 1, dtype: Any = "float32") -> list[dict[str, Any]]:
        given = config(text, degrees, PATTERN)
        given = replace(given, train=replace(given.train, accumulate=accumulate, dtype=dtype))
        return run_distributed(_run, degrees.world, given)

    (alone,) = of(Degrees())
    for degrees, accumulate in (
        (Degrees(context=2), 1),
        (Degrees(context=2, data=2), 2),
        (Degrees(context=2, tensor=2), 1),
    ):
        everyone = of(degrees, accumulate)
        for rank, found in enumerate(everyone):
            assert found["steps"] == everyone[0]["steps"]
            for (loss, norm), (wanted, wanted_norm) in zip(found["steps"], alone["steps"], strict=True):
                assert loss == pytest.approx(wanted, rel=1e-5), degrees
                assert norm == pytest.approx(wanted_norm, rel=1e-4), degrees
            assert found["held out"] == pytest.approx(alone["held out"], rel=1e-5)
            place = rank // degrees.tensor
            share, segment = torch.tensor(alone["seen"]), torch.tensor(found["seen"])
            share = share.chunk(degrees.data, dim=3)[place // 2].chunk(2, dim=2)[place % 2]
            assert torch.equal(segment, share), degrees
    narrow = of(Degrees(context=2), 2, "bfloat16")[0]["steps"]
    for (loss, norm), (wanted, wanted_norm) in zip(narrow, alone["steps"], strict=True):
        assert (loss, norm) == (pytest.approx(wanted, rel=2e-3), pytest.approx(wanted_norm, rel=2e-2))


def _measured(rank: int, world: int, config: Trainer.Config) -> tuple[int, float]:
    from flashtrain.parallel import mesh

    bench = Workbench(config, mesh.build(config.parallel, "cpu"), torch.device("cpu"))
    tokens, _ = bench._batches[0][0]
    bench.one().result()
    return tokens.shape[0], bench.built.flops_per_token


def test_a_timed_step_has_segments_and_counts_whole_sequences(tmp_path: Path) -> None:
    text = write_text(tmp_path / "text.txt")
    ((_, wanted),) = run_distributed(_measured, 1, config(text, Degrees(), PATTERN))
    found = run_distributed(_measured, 2, config(text, Degrees(context=2), PATTERN))
    assert found == [(16, wanted)] * 2


def test_a_killed_run_goes_on_to_the_bits_of_the_unbroken_one(tmp_path: Path) -> None:
    text, whole, broken = write_text(tmp_path / "text.txt"), tmp_path / "whole", tmp_path / "broken"
    layout = {"model__layout__class": "Pattern.Config", "model__layout__pattern": "M*"}
    sizes = {"model__layout__ssm__head_dim": 16, "model__layout__ssm__states": 8}
    degrees = {"parallel__tensor": 1, "parallel__context": 2}
    settings = {"train__steps": 4, "checkpoint__every": 2, **degrees, **layout, **sizes}
    ended = train(whole, text, **settings)
    assert ended.returncode == 0, ended.stderr
    settings["config"] = plan(tmp_path / "plan.toml", Fault(kind="kill", step=4, rank=1))
    killed = train(broken, text, **settings)
    assert killed.returncode not in (0, 2)
    again = train(broken, text, **settings)
    assert again.returncode == 0, again.stderr
    assert "resuming after step 2" in again.stderr
    assert_same_end(whole, broken)
    assert "context parallel over 2 ranks by" in ended.stdout
    assert "a sample, after" in ended.stdout
    sites = {site["name"] for site in json.loads((whole / "sites.json").read_text())}
    assert {"layers.0.ssm (context)", "layers.1.attention (context)", "layers.0 (data)"} <= sites
    assert [m["tokens"] for m in metrics(whole)] == [128, 256, 384, 512]


@pytest.mark.parametrize(
    ("recipe", "layout", "train", "degrees", "message"),
    [
        (
            "hybrid",
            None,
            Training(sequence=33),
            {},
            "train.sequence is 33; parallel.context 2 must divide it",
        ),
        (
            "demo",
            None,
            Training(document_mask=True),
            {},
            "train.document_mask is true, but documents do not end where segments do: set it to false, or "
            "parallel.context 2 to 1",
        ),
        (
            "epas",
            None,
            None,
            {},
            "parallel.context is 2, but layers that share heads need whole sequences: leave out "
            "model.sharing",
        ),
        (
            "flowhn",
            FlowHN.Config(ssm=Mamba2.Config(head_dim=16)),
            None,
            {},
            "parallel.context is 2, but windows of FlowHN are of whole sequences: set model.layout.strategy "
            "none",
        ),
        (
            "hybrid",
            replace(PATTERN, ssm=Mamba1.Config()),
            None,
            {},
            "parallel.context is 2, but Mamba-1 passes no states between ranks: choose Mamba2.Config as "
            "model.layout.ssm.class",
        ),
        (
            "hybrid",
            PATTERN,
            Training(sequence=4),
            {},
            "parallel.context is 2, but a segment of 2 tokens is shorter than the 3 before a token that "
            "model.layout.ssm.taps reach: set a longer train.sequence",
        ),
        (
            "flowhn",
            None,
            None,
            {"branches": 2},
            "parallel.branches is 2 and parallel.context 2: set one of them to 1",
        ),
        ("hybrid", None, None, {"context": 0}, "parallel.context is 0; it must be at least 1"),
    ],
)
def test_what_does_not_go_with_segments_is_refused(
    recipe: str, layout: Any, train: Training | None, degrees: dict[str, int], message: str
) -> None:
    given = RECIPES[recipe]()
    model = given.model if layout is None else replace(given.model, layout=layout)
    given = replace(
        given, model=model, train=train or given.train, parallel=Degrees(**{"context": 2} | degrees)
    )
    with pytest.raises(UserError) as caught:
        given.validate(data=False)
    assert str(caught.value) == message
