"""Weight gradients of narrow parameters add up in fp32, whatever the mesh, and stay as they are elsewhere."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn.functional import linear
from torch.profiler import profile

from flashtrain.data import Corpus
from flashtrain.kernels.weight_gradient import Packing, WeightGradient, add_each
from flashtrain.models.decoder import Decoder
from flashtrain.nn.linear import Linear
from flashtrain.parallel import tensor as parallel
from flashtrain.parallel.mesh import Degrees
from flashtrain.train.settings import Training
from flashtrain.train.trainer import Trainer
from tests.distributed import run_distributed
from tests.train.runs import write_text
from tests.train.test_skips import _trainer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_products_and_gradients_add_up(dtype: torch.dtype, poisoned_memory: None) -> None:
    a, b, c = (torch.randn(8, 8, generator=torch.Generator().manual_seed(n)).to(dtype) for n in range(3))
    total = WeightGradient(c)
    for times in (1, 2):  # what is left of the last step does not count
        total.clear()
        total.add_product(a.t(), b)
        total.add(c)
        total.add_product(a.t(), b)
        total.add(c, torch.tensor(0.5))
        wanted = 2 * a.double().t() @ b.double() + 1.5 * c.double()
        assert total.total.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        torch.testing.assert_close(total.total.double(), wanted, rtol=1e-5, atol=1e-5, msg=f"step {times}")


def test_a_weight_made_of_two_gives_each_the_bits_of_its_rows(poisoned_memory: None) -> None:
    draw = torch.Generator().manual_seed(0)
    upper, lower = (torch.nn.Parameter(torch.randn(n, 8, generator=draw).bfloat16()) for n in (6, 4))
    packing = Packing(lambda *parts: torch.cat(parts), lambda whole: whole.split([6, 4]))
    assert packing.gradient(upper, lower) is None
    for part in (upper, lower):
        part.main_grad = WeightGradient(part)  # type: ignore[attr-defined]
    whole, both = WeightGradient(torch.cat([upper, lower])), packing.gradient(upper, lower)
    assert both is not None
    for times in (1, 2, 3):
        a, b = (torch.randn(32, n, generator=draw).bfloat16() for n in (10, 8))
        whole.add_product(a.t(), b)
        both.add_product(a.t(), b)
        found = torch.cat([part.main_grad.total for part in (upper, lower)])  # type: ignore[attr-defined]
        assert torch.equal(found, whole.total), f"after {times} products"


def test_gradients_of_many_weights_are_those_of_each_by_itself(poisoned_memory: None) -> None:
    draw = torch.Generator().manual_seed(0)
    weights = [torch.randn(n, 4, generator=draw).bfloat16() for n in (3, 1, 5, 2)]
    mains, singles = [WeightGradient(w) for w in weights], [WeightGradient(w) for w in weights]
    add_each({})
    for some in (slice(1, 3), slice(0, 4), slice(0, 2)):  # none, some and all of them hold a gradient
        given = [torch.randn(w.shape, generator=draw).bfloat16() for w in weights[some]]
        add_each(dict(zip(mains[some], given, strict=True)))
        for single, gradient in zip(singles[some], given, strict=True):
            single.add(gradient)
    assert all(torch.equal(one.total, other.total) for one, other in zip(mains, singles, strict=True))


@pytest.mark.parametrize("bias", [False, True])
def test_the_layer_is_torchs_but_for_its_weights_gradient(bias: bool) -> None:
    torch.manual_seed(0)
    plain = torch.nn.Linear(24, 40, bias=bias, dtype=torch.bfloat16)
    x = torch.randn(6, 3, 24, dtype=torch.bfloat16, requires_grad=True)
    dy = torch.randn(6, 3, 40, dtype=torch.bfloat16)
    wanted = plain(x)
    gradients = torch.autograd.grad(wanted, [x, *plain.parameters()], dy)
    plain.__class__ = Linear
    main = plain.weight.main_grad = WeightGradient(plain.weight)
    found = plain(x)
    found.backward(dy)
    assert torch.equal(found, wanted)
    assert x.grad is not None
    assert torch.equal(x.grad, gradients[0])
    assert plain.weight.grad is None
    true = dy.flatten(0, 1).double().t() @ x.detach().flatten(0, 1).double()
    torch.testing.assert_close(main.total.double(), true, rtol=1e-5, atol=1e-5)
    if bias:
        assert plain.bias.grad is not None
        assert torch.equal(plain.bias.grad, gradients[2])
    with torch.no_grad():
        assert torch.equal(plain(x), linear(x, plain.weight, plain.bias))


def _config(
    text: Path, tensor: int, data: int, dtype: str = "bfloat16", tied: bool = False
) -> Trainer.Config:
    return Trainer.Config(
        model=Decoder.Config(
            hidden=64, layers=2, heads=8, kv_heads=4, mlp_width=256, qkv_bias=True, tied_embeddings=tied
        ),
        data=Corpus.Config(source=str(text)),
        train=Training(batch=4, sequence=32, evaluation_windows=8, dtype=dtype),  # type: ignore[arg-type]
        parallel=Degrees(tensor=tensor, data=data),
    )


def _gradients(trainer: Trainer, passes: int) -> dict[str, Tensor]:
    """The gradients of ``passes`` backward passes over one batch, whole, in the order of the parameters."""
    for _ in range(passes):
        for tokens, targets in trainer.batches.of(1):
            trainer.model(tokens, targets).backward()
        trainer.optimizer.accumulate()
    whole = {}
    for name, gradient in trainer.optimizer.gradients.items():
        parameter = trainer.optimizer.parameters[name]
        sharded = isinstance(parameter, DTensor)
        whole[name] = trainer.optimizer._like(parameter, gradient).full_tensor() if sharded else gradient
    return whole


class _Zeros(torch.autograd.Function):
    """What autograd does by itself: zeros for what has no gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


def _compared(rank: int, world: int, config: Trainer.Config, out: Path) -> dict[str, float]:
    """How far each weight's gradient is from that of the same run whose gradients go through bf16."""
    trainer, other = _trainer(config, out), _trainer(config, out)
    for parameter in other.optimizer.parameters.values():
        del parameter.main_grad  # type: ignore[attr-defined]
    other.optimizer._main = {}
    found, wanted = _gradients(trainer, 2), _gradients(other, 2)
    assert all(parameter.grad is None for parameter in trainer.optimizer.parameters.values())
    fine = {name: g for name, g in found.items() if not torch.equal(g, g.bfloat16().float())}
    matrices = {
        n for n, p in trainer.optimizer.parameters.items() if p.dim() == 2 and n != "embedding.weight"
    }
    assert matrices <= fine.keys(), "a weight's gradient was rounded to bf16"
    again = _trainer(config, out)
    with profile():
        traced = _gradients(again, 2)
    assert all(torch.equal(g, traced[name]) for name, g in found.items()), "other bits where a profiler runs"
    for tokens, targets in again.batches.of(1):
        again.model(tokens, targets).backward()
    made = {name for name, parameter in again.optimizer.parameters.items() if parameter.grad is not None}
    assert made == again.optimizer.parameters.keys() - matrices, "autograd made what products have added"
    shard = parallel._local
    parallel._local = lambda parameter: _Zeros.apply(shard(parameter))
    zeros = _gradients(_trainer(config, out), 2)
    parallel._local = shard
    assert all(torch.equal(g, zeros[name]) for name, g in found.items()), "zeros make other bits"
    return {name: float((g - wanted[name]).norm() / wanted[name].norm()) for name, g in found.items()}


@pytest.mark.parametrize(("tensor", "tied"), [(1, False), (1, True), (2, False), (2, True)])
def test_gradients_go_past_bf16(tmp_path: Path, tensor: int, tied: bool) -> None:
    config = _config(write_text(tmp_path / "text.txt"), tensor, 1, tied=tied)
    for far in run_distributed(_compared, tensor, config, tmp_path):
        assert max(far.values()) < 4e-3, far
        assert far["head.weight" if not tied else "embedding.weight"] > 0


def _given(rank: int, world: int, config: Trainer.Config, out: Path) -> int:
    trainer = _trainer(config, out)
    result = trainer.step(1, 1e-3, trainer.batches.of(1))
    assert result.skipped is None
    return sum(hasattr(parameter, "main_grad") for parameter in trainer.model.parameters())


def test_fp32_and_what_fsdp_reduces_have_none(tmp_path: Path) -> None:
    text = write_text(tmp_path / "text.txt")
    assert run_distributed(_given, 1, _config(text, 1, 1, "float32"), tmp_path) == [0]
    assert run_distributed(_given, 2, _config(text, 1, 2), tmp_path) == [0, 0]


def _reduced(rank: int, world: int, config: Trainer.Config, out: Path) -> int:
    """How many gradients stay in the dtype that FSDP2 reduced them in; sums of two passes do not."""
    trainer = _trainer(config, out)
    passes = []
    for times in (1, 2):
        for tokens, targets in trainer.batches.of(1):
            trainer.model(tokens, targets).backward()
        if times == 2:
            passes.append({name: parallel._local(p.grad) for name, p in trainer.optimizer.parameters.items()})
        trainer.optimizer.accumulate()
        passes.append(dict(trainer.optimizer.gradients))
    first, second, both = passes
    assert first.keys() == trainer.optimizer.parameters.keys()
    assert {g.dtype for g in first.values()} == {torch.bfloat16}
    assert all(torch.equal(g, first[name].float() + second[name]) for name, g in both.items())
    return len(both)


@pytest.mark.parametrize(("tensor", "data"), [(1, 2), (2, 2)])
def test_reduced_gradients_of_one_pass_are_not_copied(tmp_path: Path, tensor: int, data: int) -> None:
    config = _config(write_text(tmp_path / "text.txt"), tensor, data)
    assert all(run_distributed(_reduced, tensor * data, config, tmp_path))
