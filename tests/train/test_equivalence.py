"""Runs on other meshes, transports and sub-chunk counts train the same model."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from flashtrain.comm import transport
from flashtrain.data import Corpus
from flashtrain.models.decoder import Decoder
from flashtrain.parallel.mesh import Degrees
from flashtrain.recipes import demo
from flashtrain.train.optimizer import AdamW
from flashtrain.train.settings import Training
from flashtrain.train.trainer import Trainer
from tests.distributed import run_distributed
from tests.train.runs import write_text


def _config(text: Path, tensor: int, data: int, dtype: str = "float32", **comm: object) -> Trainer.Config:
    return Trainer.Config(
        model=Decoder.Config(hidden=64, layers=2, heads=8, kv_heads=4, mlp_width=256),
        data=Corpus.Config(source=str(text)),
        train=Training(steps=20, batch=4, sequence=30, dtype=dtype, evaluation_windows=8),
        optimizer=AdamW.Config(learning_rate=1e-3, warmup=5),
        parallel=Degrees(tensor=tensor, data=data),
        comm=transport.Settings(timeout=60, **comm),
    )


def _losses(
    rank: int, world: int, configs: list[Trainer.Config], steps: int
) -> list[list[tuple[float, float]]]:
    """Losses and gradient norms of ``steps`` steps of each config in turn, in one set of ranks."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    runs = []
    for config in configs:
        transport.configure(config.comm)
        trainer = Trainer(config, Path("unused"))
        trainer._build(torch.device("cpu"))
        results = []
        for step in range(1, steps + 1):
            result = trainer.step(
                step, config.optimizer.learning_rate_at(step, steps), trainer.batches.of(step)
            )
            results.append((result.loss, result.grad_norm))
        runs.append(results)
    return runs


def _first_gradients(rank: int, world: int, config: Trainer.Config) -> dict[str, torch.Tensor]:
    transport.configure(config.comm)
    trainer = Trainer(config, Path("unused"))
    trainer._build(torch.device("cpu"))
    for tokens, targets in trainer.batches.of(1):
        trainer.model(tokens, targets).backward()
    from flashtrain.parallel.apply import sum_replicated_gradients

    sum_replicated_gradients(trainer.model, trainer.mesh)
    return {
        name: (p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad).clone()
        for name, p in trainer.model.named_parameters()
    }


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text") / "text.txt")


@pytest.fixture(scope="module")
def one_rank(text: Path) -> list[tuple[float, float]]:
    return run_distributed(_losses, 1, [_config(text, 1, 1)], 20)[0][0]


@pytest.mark.parametrize(("tensor", "data"), [(2, 1), (1, 2), (2, 2), (4, 1)])
def test_losses_of_twenty_steps_agree_with_one_rank(
    text: Path, one_rank: list[tuple[float, float]], tensor: int, data: int
) -> None:
    everyone = run_distributed(_losses, tensor * data, [_config(text, tensor, data)], 20)
    for rank in everyone:
        assert rank == everyone[0], "the ranks report different losses"
    for step, ((loss, norm), (alone, norm_alone)) in enumerate(zip(everyone[0][0], one_rank, strict=True), 1):
        assert loss == pytest.approx(alone, rel=1e-5), f"step {step}"
        assert norm == pytest.approx(norm_alone, rel=1e-4), f"step {step}"


@pytest.mark.parametrize(("tensor", "data"), [(2, 1), (4, 1), (2, 2)])
def test_gradients_of_every_parameter_agree_with_one_rank(text: Path, tensor: int, data: int) -> None:
    alone = run_distributed(_first_gradients, 1, _config(text, 1, 1))[0]
    for gradients in run_distributed(_first_gradients, tensor * data, _config(text, tensor, data)):
        for name, expected in alone.items():
            error = (gradients[name] - expected).norm() / expected.norm()
            assert error < 1e-5, name


def _held_out(rank: int, world: int, configs: list[Trainer.Config]) -> list[float]:
    found = []
    for config in configs:
        transport.configure(config.comm)
        trainer = Trainer(config, Path("unused"))
        trainer._build(torch.device("cpu"))
        found.append(trainer.batches.held_out_loss(trainer.model))
    return found


def test_every_held_out_window_counts_once_on_any_number_of_ranks(text: Path) -> None:
    def of(data: int) -> list[float]:
        given = _config(text, 1, data)
        counts = [replace(given, train=replace(given.train, evaluation_windows=n)) for n in (1, 3, 5, 8)]
        first, *others = run_distributed(_held_out, data, counts)
        assert all(other == first for other in others)
        return first

    wanted = of(1)
    assert of(2) == pytest.approx(wanted, rel=1e-6)
    assert of(4) == pytest.approx(wanted, rel=1e-6)


def test_bits_do_not_depend_on_transport_subchunks_or_run(text: Path) -> None:
    """One config after the other in the same two ranks, so that leftovers of a run would show too."""
    variants = [
        _config(text, 2, 1),
        _config(text, 2, 1),
        _config(text, 2, 1, transport="group"),
        _config(text, 2, 1, transport="host"),
        _config(text, 2, 1, subchunks=3),
        _config(text, 2, 1, transport="group", subchunks=5),
    ]
    for rank in run_distributed(_losses, 2, variants, 6):
        for config, losses in zip(variants, rank, strict=True):
            assert losses == rank[0], config.comm


def test_bits_of_tensor_and_data_parallelism_do_not_depend_on_the_transport(text: Path) -> None:
    variants = [_config(text, 2, 2), _config(text, 2, 2, transport="group"), _config(text, 2, 2, subchunks=2)]
    for rank in run_distributed(_losses, 4, variants, 4):
        assert rank[1] == rank[0]
        assert rank[2] == rank[0]


def test_keeping_the_gather_and_bfloat16_train_alike(text: Path, one_rank: list[tuple[float, float]]) -> None:
    kept = _config(text, 2, 1, keep_gather=True)
    narrow = _config(text, 2, 1, dtype="bfloat16")
    narrow_both = _config(text, 1, 2, dtype="bfloat16")
    (kept_losses, narrow_losses, narrow_data), _ = run_distributed(
        _losses, 2, [kept, narrow, narrow_both], 20
    )
    for (loss, _), (alone, _) in zip(kept_losses, one_rank, strict=True):
        assert loss == pytest.approx(alone, rel=1e-5)
    for losses in (narrow_losses, narrow_data):
        for (loss, _), (alone, _) in zip(losses, one_rank, strict=True):
            assert loss == pytest.approx(alone, rel=2e-2)
    assert narrow_losses[-1][0] < narrow_losses[0][0] - 0.5


def test_gradient_accumulation_equals_one_large_batch(
    text: Path, one_rank: list[tuple[float, float]]
) -> None:
    from dataclasses import replace

    for tensor, data in ((1, 1), (1, 2)):
        config = _config(text, tensor, data)
        config = replace(config, train=replace(config.train, accumulate=2))
        losses = run_distributed(_losses, tensor * data, [config], 20)[0][0]
        for (loss, _), (alone, _) in zip(losses, one_rank, strict=True):
            assert loss == pytest.approx(alone, rel=1e-5)


def test_the_demo_recipe_is_what_it_promises() -> None:
    config = demo()
    config.validate()
    parameters = Decoder(config.model).parameter_count()
    assert 2e6 <= parameters <= 6e6
    assert config.parallel == Degrees(tensor=2, data=1)
    assert config.model.kv_heads < config.model.heads
    assert not dist.is_initialized()
